// Attention of training rows around its batched products: rows of projections become heads' own, rotated, and back; softmax.
#include "lanes.h"

namespace {
// Token n's first head lies in row at[n] of the heads' tensors [rows * H * L, width], its next ones step[n] further each.
struct Places {
  std::vector<int64_t> at, step;
  // `segments` is pairs (rows, length)
  Places(const int64_t* segments, int64_t count, int64_t heads) {
    for (int64_t s = 0, first = 0; s < count; s++) {
      const int64_t rows = segments[2 * s], length = segments[2 * s + 1];
      for (int64_t r = 0; r < rows; r++)
        for (int64_t t = 0; t < length; t++) at.push_back(first + r * heads * length + t), step.push_back(length);
      first += rows * length * heads;
    }
  }
};

template <class A, class B>
inline void copy(const A* from, B* to, int64_t dim) {
  across(dim, [&](int64_t i, auto n) { put(to + i, get(from + i, n), n); });
}

constexpr int64_t MOST = 512;  // rotated dims of a head

// Pairs (2i, 2i + 1) turned; the first ones then lie in the first half. `rope` is cos, then sin, of each pair.
template <class T>
inline void rotate(const T* from, const float* rope, T* to, int64_t dim) {
  float a[MOST], b[MOST];
  const int64_t half = dim / 2;
  copy(from, a, dim);
  for (int64_t i = 0; i < half; i++) {
    b[i] = a[2 * i] * rope[i] - a[2 * i + 1] * rope[half + i];
    b[half + i] = a[2 * i + 1] * rope[i] + a[2 * i] * rope[half + i];
  }
  copy(b, to, dim);
}

// The gradient's way back, of float32 numbers.
template <class T>
inline void rotate_back(const float* from, const float* rope, T* to, int64_t dim) {
  float b[MOST];
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i++) {
    b[2 * i] = from[i] * rope[i] + from[half + i] * rope[half + i];
    b[2 * i + 1] = from[half + i] * rope[i] - from[i] * rope[half + i];
  }
  copy(b, to, dim);
}
}  // namespace

// Widths of one head: not rotated, rotated, of a value.
struct Widths {
  int64_t heads, plain, rotary, value;
};

// q [N, H (plain + rotary)], kv [N, H (plain + value)], key [N, rotary] of all heads, to the heads' queries, keys and values.
extern "C" void jevons_split_heads(const Widths* w, const int64_t* segments, int64_t count, Matrix q, Matrix kv, Matrix key,
                                   const float* rope, void* queries, void* keys, void* values) {
  const Places places(segments, count, w->heads);
  const int64_t n = places.at.size(), plain = w->plain, rotary = w->rotary, value = w->value, width = plain + rotary;
  typed([&](auto q) {
    using T = std::remove_pointer_t<decltype(q.data)>;
#pragma omp parallel for if (n * w->heads * width > ALONE)
    for (int64_t t = 0; t < n; t++) {
      const T *from = q[t], *both = (const T*)kv.data + t * kv.stride;
      const float* turn = rope + t * rotary;
      T shared[MOST];
      rotate((const T*)key.data + t * key.stride, turn, shared, rotary);
      for (int64_t h = 0; h < w->heads; h++, from += width, both += plain + value) {
        const int64_t row = places.at[t] + h * places.step[t];
        T *to = (T*)queries + row * width, *k = (T*)keys + row * width;
        copy(from, to, plain);
        rotate(from + plain, turn, to + plain, rotary);
        copy(both, k, plain);
        copy(shared, k + plain, rotary);
        copy(both + plain, (T*)values + row * value, value);
      }
    }
  }, q);
}

// The same for gradients, the other way; `rest` tokens past the segments get zeros.
extern "C" void jevons_split_heads_grad(const Widths* w, const int64_t* segments, int64_t count, int64_t rest, const void* queries,
                                        const void* keys, const void* values, const float* rope, Matrix q, Matrix kv, Matrix key) {
  const Places places(segments, count, w->heads);
  const int64_t n = places.at.size(), plain = w->plain, rotary = w->rotary, value = w->value, width = plain + rotary;
  typed([&](auto q) {
    using T = std::remove_pointer_t<decltype(q.data)>;
#pragma omp parallel for if (n * w->heads * width > ALONE)
    for (int64_t t = 0; t < n + rest; t++) {
      T *to = q[t], *both = (T*)kv.data + t * kv.stride, *shared = (T*)key.data + t * key.stride;
      if (t >= n) {
        memset((void*)to, 0, w->heads * width * sizeof(T));
        memset((void*)both, 0, w->heads * (plain + value) * sizeof(T));
        memset((void*)shared, 0, rotary * sizeof(T));
        continue;
      }
      const float* turn = rope + t * rotary;
      float total[MOST] = {}, own[MOST];
      for (int64_t h = 0; h < w->heads; h++, to += width, both += plain + value) {
        const int64_t row = places.at[t] + h * places.step[t];
        const T *from = (const T*)queries + row * width, *k = (const T*)keys + row * width;
        copy(from, to, plain);
        copy(from + plain, own, rotary);
        rotate_back(own, turn, to + plain, rotary);
        copy(k, both, plain);
        across(rotary, [&](int64_t i, auto lanes) { put(total + i, get(total + i, lanes) + get(k + plain + i, lanes), lanes); });
        copy((const T*)values + row * value, both + plain, value);
      }
      rotate_back(total, turn, shared, rotary);
    }
  }, q);
}

// Rows [N, H value] to or from the heads' [rows * H * L, value].
extern "C" void jevons_move_heads(int64_t heads, int64_t value, const int64_t* segments, int64_t count, int64_t rest, Matrix rows,
                                  void* cells, int32_t to_rows) {
  const Places places(segments, count, heads);
  const int64_t n = places.at.size(), size = value * (rows.bf16 ? 2 : 4);
#pragma omp parallel for if (n * heads * value > ALONE)
  for (int64_t t = 0; t < n + rest; t++) {
    if (t >= n) {
      if (to_rows) memset(rows.at(t), 0, heads * size);
      continue;
    }
    for (int64_t h = 0; h < heads; h++) {
      uint8_t *row = rows.at(t) + h * size, *cell = (uint8_t*)cells + (places.at[t] + h * places.step[t]) * size;
      to_rows ? memcpy(row, cell, size) : memcpy(cell, row, size);
    }
  }
}

// In place: softmax of scale * scores over what row i of each [length, length] may see, its first i + 1 cells; zeros after.
extern "C" void jevons_causal_softmax(Matrix scores, int64_t rows, int64_t length, float scale) {
  typed([=](auto scores) {
#pragma omp parallel for if (rows * length > ALONE)
    for (int64_t r = 0; r < rows; r++) {
      auto* row = scores[r];
      const int64_t seen = r % length + 1, whole = seen / 16 * 16;
      f32x16 high = splat(-INFINITY), sums = {};
      across(whole, [&](int64_t i, auto n) {
        const f32x16 v = get(row + i, n);
        high = v > high ? v : high;
      });
      float top = highest(high);
      f32x16 tail = get(row + whole, (int)(seen - whole));
      for (int l = 0; l < seen - whole; l++) top = std::max(top, tail[l]);
      across(whole, [&](int64_t i, auto n) { sums += exp16((get(row + i, n) - top) * scale); });
      tail = exp16((tail - top) * scale);
      for (int l = seen - whole; l < 16; l++) tail[l] = 0;
      const float share = 1.0f / sum(sums + tail);
      across(whole, [&](int64_t i, auto n) { put(row + i, exp16((get(row + i, n) - top) * scale) * share, n); });
      put(row + whole, tail * share, (int)(seen - whole));
      memset((void*)(row + seen), 0, (length - seen) * sizeof *row);
    }
  }, scores);
}

// g = scale p (g - sum(p g)), in place.
extern "C" void jevons_causal_softmax_grad(Matrix probs, Matrix g, int64_t rows, int64_t length, float scale) {
  typed([=](auto probs) {
    const decltype(probs) grads = {(decltype(probs.data))g.data, g.stride};
#pragma omp parallel for if (rows * length > ALONE)
    for (int64_t r = 0; r < rows; r++) {
      const int64_t seen = r % length + 1;
      const auto* p = probs[r];
      auto* row = grads[r];
      f32x16 along = {};
      across(seen, [&](int64_t i, auto n) { along += get(p + i, n) * get(row + i, n); });
      const float mean = sum(along);
      across(seen, [&](int64_t i, auto n) { put(row + i, get(p + i, n) * (get(row + i, n) - mean) * scale, n); });
      memset((void*)(row + seen), 0, (length - seen) * sizeof *row);
    }
  }, probs);
}
