// The small steps between a training step's products, forward and backward in one pass over memory each: norms, SwiGLU, cross
// entropy, and rows on their way to the experts and back. All arithmetic is float32; numbers in memory are float32 or bf16.
//
// Rows are shared among OpenMP's threads. Where rows are summed (a norm's weight), they are summed CHUNK by CHUNK, whatever the
// number of threads, so that a gradient does not depend on it.
#include "common.h"

namespace {
constexpr int64_t CHUNK = 64, ALONE = 1 << 14;  // numbers up to which another thread is not worth waking

// e^v to about 1 unit in the last place; 0 where v is under -87.
inline f32x16 exp16(f32x16 v) {
  const f32x16 low = splat(-87.0f), high = splat(88.0f);
  const i32x16 gone = v < low;
  v = v < low ? low : v;
  v = v > high ? high : v;
  const float magic = 12582912.0f;  // adding it rounds to a whole number
  const f32x16 n = (v * 1.44269504f + magic) - magic;
  const f32x16 r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const f32x16 scale = (f32x16)((__builtin_convertvector(n, i32x16) + 127) << 23);
  return (f32x16)((i32x16)(p * scale) & ~gone);
}

inline f32x16 sigmoid16(f32x16 v) { return 1.0f / (1.0f + exp16(-v)); }

inline int left(int64_t n, int64_t i) { return (int)std::min<int64_t>(16, n - i); }
inline f32x16 get(const Matrix& m, int64_t row, int64_t i, int64_t n) { return load_numbers(m.at(row, i), m.bf16, left(n, i)); }
inline void put(const Matrix& m, int64_t row, int64_t i, int64_t n, f32x16 v) { store_numbers(m.at(row, i), m.bf16, v, left(n, i)); }
}  // namespace

// y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps); rstd [rows] is kept.
extern "C" void jevons_norm(Matrix x, int64_t rows, int64_t dim, const float* weight, float eps, Matrix y, float* rstd) {
#pragma omp parallel for if (rows * dim > ALONE)
  for (int64_t r = 0; r < rows; r++) {
    f32x16 squares = {};
    for (int64_t i = 0; i < dim; i += 16) {
      const f32x16 v = get(x, r, i, dim);
      squares += v * v;
    }
    rstd[r] = 1.0f / std::sqrt(sum(squares) / dim + eps);
    for (int64_t i = 0; i < dim; i += 16)
      put(y, r, i, dim, get(x, r, i, dim) * rstd[r] * load_numbers((const uint8_t*)(weight + i), false, left(dim, i)));
  }
}

// dx = rstd (g w - xhat mean(g w xhat)), dw = sum over rows of g xhat, xhat = x rstd. `parts` is [ceil(rows / 64), dim].
extern "C" void jevons_norm_grad(Matrix g, Matrix x, int64_t rows, int64_t dim, const float* weight, const float* rstd, Matrix dx,
                                 float* parts, float* dw) {
  const int64_t chunks = ceil_div(rows, CHUNK);
#pragma omp parallel for if (rows * dim > ALONE)
  for (int64_t c = 0; c < chunks; c++) {
    float* part = parts + c * dim;
    std::fill(part, part + dim, 0.0f);
    for (int64_t r = c * CHUNK; r < std::min(rows, (c + 1) * CHUNK); r++) {
      f32x16 along = {};
      for (int64_t i = 0; i < dim; i += 16) {
        const int n = left(dim, i);
        const f32x16 h = get(x, r, i, dim) * rstd[r], grad = get(g, r, i, dim);
        along += grad * load_numbers((const uint8_t*)(weight + i), false, n) * h;
        store_numbers((uint8_t*)(part + i), false, load_numbers((const uint8_t*)(part + i), false, n) + grad * h, n);
      }
      const float mean = sum(along) / dim;
      for (int64_t i = 0; i < dim; i += 16) {
        const f32x16 w = load_numbers((const uint8_t*)(weight + i), false, left(dim, i));
        put(dx, r, i, dim, (get(g, r, i, dim) * w - get(x, r, i, dim) * rstd[r] * mean) * rstd[r]);
      }
    }
  }
  std::fill(dw, dw + dim, 0.0f);
  for (int64_t c = 0; c < chunks; c++)
    for (int64_t i = 0; i < dim; i++) dw[i] += parts[c * dim + i];
}

// y [rows, inter] = silu(gate) * up, h [rows, 2 inter] = [gate | up].
extern "C" void jevons_swiglu(Matrix h, int64_t rows, int64_t inter, Matrix y) {
#pragma omp parallel for if (rows * inter > ALONE)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < inter; i += 16) {
      const f32x16 gate = get(h, r, i, inter), up = load_numbers(h.at(r, inter + i), h.bf16, left(inter, i));
      put(y, r, i, inter, gate * sigmoid16(gate) * up);
    }
}

extern "C" void jevons_swiglu_grad(Matrix g, Matrix h, int64_t rows, int64_t inter, Matrix dh) {
#pragma omp parallel for if (rows * inter > ALONE)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < inter; i += 16) {
      const int n = left(inter, i);
      const f32x16 gate = get(h, r, i, inter), up = load_numbers(h.at(r, inter + i), h.bf16, n), grad = get(g, r, i, inter);
      const f32x16 s = sigmoid16(gate);
      put(dh, r, i, inter, grad * up * s * (1.0f + gate * (1.0f - s)));
      store_numbers(dh.at(r, inter + i), dh.bf16, grad * gate * s, n);
    }
}

// losses[r] = log sum exp(logits[r]) - logits[r, target]; the first part is kept in lse.
extern "C" void jevons_cross_entropy(Matrix logits, int64_t rows, int64_t vocab, const int64_t* targets, float* losses, float* lse) {
#pragma omp parallel for if (rows * vocab > ALONE)
  for (int64_t r = 0; r < rows; r++) {
    f32x16 high = splat(-INFINITY), total = {};
    int64_t i = 0;
    for (; i + 16 <= vocab; i += 16) {
      const f32x16 v = get(logits, r, i, vocab);
      high = v > high ? v : high;
    }
    float top = -INFINITY, rest = 0;
    for (int l = 0; l < 16; l++) top = std::max(top, high[l]);
    const int64_t whole = i;
    if (whole < vocab) {
      const f32x16 tail = get(logits, r, whole, vocab);
      for (int l = 0; l < vocab - whole; l++) top = std::max(top, tail[l]);
      for (int l = 0; l < vocab - whole; l++) rest += std::exp(tail[l] - top);
    }
    for (i = 0; i < whole; i += 16) total += exp16(get(logits, r, i, vocab) - top);
    lse[r] = top + std::log(sum(total) + rest);
    losses[r] = lse[r] - get(logits, r, targets[r], targets[r] + 1)[0];
  }
}

// d[r] = g[r] (softmax(logits[r]) - onehot(target))
extern "C" void jevons_cross_entropy_grad(const float* g, Matrix logits, int64_t rows, int64_t vocab, const int64_t* targets,
                                          const float* lse, Matrix d) {
#pragma omp parallel for if (rows * vocab > ALONE)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < vocab; i += 16) {
      f32x16 p = exp16(get(logits, r, i, vocab) - lse[r]);
      if (targets[r] >= i && targets[r] < i + 16) p[targets[r] - i] -= 1.0f;
      put(d, r, i, vocab, p * g[r]);
    }
}

// Token n's row goes to its k cells; the cells of `out` (`size` of them) that no token has are zero.
extern "C" void jevons_dispatch(Matrix x, int64_t n, int64_t dim, const int64_t* cells, int64_t k, const float* weights, Matrix out,
                                int64_t size) {
  std::vector<int64_t> from(size, -1);
  for (int64_t i = 0; i < n * k; i++) from[cells[i]] = i;
#pragma omp parallel for if (size * dim > ALONE)
  for (int64_t c = 0; c < size; c++) {
    if (from[c] < 0) {
      memset(out.at(c), 0, dim * (out.bf16 ? 2 : 4));
      continue;
    }
    const float w = weights ? weights[from[c]] : 1.0f;
    for (int64_t i = 0; i < dim; i += 16) put(out, c, i, dim, get(x, from[c] / k, i, dim) * w);
  }
}

// out[n] = sum over its k cells of weight * y[cell] (weights null: 1).
extern "C" void jevons_collect(Matrix y, int64_t n, int64_t dim, const int64_t* cells, int64_t k, const float* weights, Matrix out) {
#pragma omp parallel for if (n * dim > ALONE)
  for (int64_t t = 0; t < n; t++)
    for (int64_t i = 0; i < dim; i += 16) {
      f32x16 total = {};
      for (int64_t j = 0; j < k; j++) total += get(y, cells[t * k + j], i, dim) * (weights ? weights[t * k + j] : 1.0f);
      put(out, t, i, dim, total);
    }
}

// dots[n, j] = g[n] . y[cell n, j]: the gradient of collect's weights.
extern "C" void jevons_collect_dots(Matrix g, Matrix y, int64_t n, int64_t dim, const int64_t* cells, int64_t k, float* dots) {
#pragma omp parallel for if (n * k * dim > ALONE)
  for (int64_t c = 0; c < n * k; c++) {
    f32x16 total = {};
    for (int64_t i = 0; i < dim; i += 16) total += get(g, c / k, i, dim) * get(y, cells[c], i, dim);
    dots[c] = sum(total);
  }
}
