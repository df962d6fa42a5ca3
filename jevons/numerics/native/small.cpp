// The small steps between products, which cost more to dispatch than to compute: a gate's choice, products head by head.
#include "kernels.h"
#include "pool.h"

namespace {
float dot(const float* x, const uint8_t* w, bool bf16, int64_t n) {
  f32x16 sums = {}, others = {};
  int64_t i = 0;
  if (bf16)
    for (; i + 32 <= n; i += 32) {
      sums += load<f32x16>(x + i) * from_bf16(load<u16x16>(w + 2 * i));
      others += load<f32x16>(x + i + 16) * from_bf16(load<u16x16>(w + 2 * i + 32));
    }
  else
    for (; i + 32 <= n; i += 32) {
      sums += load<f32x16>(x + i) * load<f32x16>(w + 4 * i);
      others += load<f32x16>(x + i + 16) * load<f32x16>(w + 4 * i + 64);
    }
  for (; i < n; i += 16)
    sums += load_numbers((const uint8_t*)(x + i), false, n - i) * load_numbers(w + i * (bf16 ? 2 : 4), bf16, n - i);
  return sum(sums + others);
}

// Indices of the largest `count` of values[0..n), the first among equals first. NaN is never the largest.
void pick(float* values, int64_t n, int64_t count, int64_t* chosen) {
  std::vector<bool> taken(n);
  for (int64_t c = 0; c < count; c++) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
      if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    taken[best] = true, chosen[c] = best;
  }
}
}  // namespace

// weight [experts, dim]; bias [experts] or null. Fills chosen and weights [n, k], and how many tokens each expert got.
extern "C" void jevons_gate(const Choice* choice, void* from, int64_t stride, int32_t bf16, int64_t n, int64_t dim, void* weight,
                            int32_t weight_bf16, const float* bias, int64_t* chosen, float* weights, int64_t* rows, float* load_E) {
  const Matrix x = {(uint8_t*)from, stride, bf16}, w = {(uint8_t*)weight, dim, weight_bf16};
  const int64_t experts = choice->experts, k = choice->k, size = experts / choice->groups;
  std::vector<float> token(dim), scores(experts), biased(experts), groups(choice->groups);
  std::vector<int64_t> best(choice->groups);
  std::fill(rows, rows + experts, 0);
  for (int64_t m = 0; m < n; m++, chosen += k, weights += k) {
    for (int64_t i = 0; i < dim; i += 16) store_numbers((uint8_t*)&token[i], false, load_numbers(x.at(m, i), bf16, dim - i), dim - i);
    for (int64_t e = 0; e < experts; e++) scores[e] = dot(token.data(), w.at(e), weight_bf16, dim);
    if (choice->softmax) {
      const float top = *std::max_element(scores.begin(), scores.end());
      float total = 0;
      for (float& s : scores) total += s = std::exp(s - top);
      for (float& s : scores) s /= total;
    } else {
      for (float& s : scores) s = 1 / (1 + std::exp(-s));
    }
    for (int64_t e = 0; e < experts; e++) biased[e] = scores[e] + (bias ? bias[e] : 0);
    if (choice->groups > 1) {  // a group's worth: with a bias the sum of its two best, else its best
      for (int64_t g = 0; g < choice->groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int64_t e = g * size; e < (g + 1) * size; e++) {
          if (biased[e] > first) second = first, first = biased[e];
          else if (biased[e] > second) second = biased[e];
        }
        groups[g] = bias ? first + second : first;
      }
      pick(groups.data(), choice->groups, choice->groups, best.data());
      for (int64_t i = choice->kept; i < choice->groups; i++)
        std::fill_n(biased.begin() + best[i] * size, size, -INFINITY);
    }
    pick(biased.data(), experts, k, chosen);
    float total = 1e-20f;
    for (int64_t i = 0; i < k; i++) total += weights[i] = scores[chosen[i]];
    for (int64_t i = 0; i < k; i++) {
      weights[i] = (choice->normalise ? weights[i] / total : weights[i]) * choice->scale;
      rows[chosen[i]]++;
    }
  }
  for (int64_t e = 0; e < experts; e++) load_E[e] = rows[e];
}

void multiply_heads(const HeadProduct& p) {
  const int64_t size = p.bf16 ? 2 : 4, w_size = p.w_bf16 ? 2 : 4, WIDE = 64, in = p.in;
  const int64_t blocks = ceil_div(p.out, WIDE);
  Pool::get().run(p.heads * blocks, 1, threads_for(p.heads * in * p.out * w_size, p.n), [&](int64_t unit) {
    const int64_t h = unit / blocks, first = unit % blocks * WIDE, width = std::min(WIDE, p.out - first);
    const uint8_t* matrix = (const uint8_t*)p.w + h * p.w_head * w_size;
    thread_local std::vector<float> numbers;
    numbers.resize(ceil_div(in, 16) * 16);
    for (int64_t m = 0; m < p.n; m++) {
      const uint8_t* from = (const uint8_t*)p.x + (m * p.x_token + h * p.x_head) * size;
      uint8_t* to = (uint8_t*)p.y + (m * p.y_token + h * p.y_head + first) * size;
      for (int64_t i = 0; i < in; i += 16) store(&numbers[i], load_numbers(from + i * size, p.bf16, in - i));
      float result[64] = {};
      if (!p.across) {
        for (int64_t r = 0; r < width; r++) result[r] = dot(numbers.data(), matrix + (first + r) * in * w_size, p.w_bf16, in);
      } else if (width == WIDE && p.w_bf16) {
        f32x16 a = {}, b = {}, c = {}, d = {};
        const uint8_t* w = matrix + first * 2;
        for (int64_t i = 0; i < in; i++, w += p.out * 2) {
          a += numbers[i] * from_bf16(load<u16x16>(w)), b += numbers[i] * from_bf16(load<u16x16>(w + 32));
          c += numbers[i] * from_bf16(load<u16x16>(w + 64)), d += numbers[i] * from_bf16(load<u16x16>(w + 96));
        }
        store(result, a), store(result + 16, b), store(result + 32, c), store(result + 48, d);
      } else {
        for (int64_t r = 0; r < width; r += 16) {
          f32x16 a = {};
          for (int64_t i = 0; i < in; i++)
            a += numbers[i] * load_numbers(matrix + (i * p.out + first + r) * w_size, p.w_bf16, width - r);
          store(result + r, a);
        }
      }
      for (int64_t r = 0; r < width; r += 16) store_numbers(to + r * size, p.bf16, load<f32x16>(result + r), width - r);
    }
  });
}

// The same; y [heads, n, out] is dense.
extern "C" void jevons_heads(void* x, int64_t token, int64_t head, int32_t bf16, int64_t n, int64_t heads, int64_t in, void* w,
                             int64_t w_head, int32_t w_bf16, int64_t out, int32_t across, void* y) {
  multiply_heads({x, token, head, y, out, n * out, n, heads, in, out, w, w_head, bf16, w_bf16, across});
}
