// The small steps between products, which cost more to dispatch than to compute: a gate's choice, products head by head, the draw
// of a token.
#include "kernels.h"
#include "pool.h"
#include "inputs.h"

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
  static thread_local std::vector<uint8_t> taken;
  taken.assign(n, 0);
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
                            int32_t weight_bf16, const float* bias, int64_t* all_chosen, float* all_weights, int64_t* rows, float* load_E) {
  const Matrix x = {(uint8_t*)from, stride, bf16}, w = {(uint8_t*)weight, dim, weight_bf16};
  const int64_t experts = choice->experts, k = choice->k, size = experts / choice->groups;
  Pool::get().run(n, 4, threads_for(experts * dim, n), [&](int64_t m) {
    static thread_local std::vector<float> token, scores, biased, groups;
    static thread_local std::vector<int64_t> best;
    token.resize(dim), scores.resize(experts), biased.resize(experts), groups.resize(choice->groups), best.resize(choice->groups);
    int64_t* chosen = all_chosen + m * k;
    float* weights = all_weights + m * k;
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
    for (int64_t i = 0; i < k; i++) weights[i] = (choice->normalise ? weights[i] / total : weights[i]) * choice->scale;
  });
  std::fill(rows, rows + experts, 0);
  for (int64_t i = 0; i < n * k; i++) rows[all_chosen[i]]++;
  for (int64_t e = 0; e < experts; e++) load_E[e] = rows[e];
}

namespace {
// M tokens of a head, [M, in] as float32, times V * 16 columns of a matrix [in, out].
template <int M, int V>
void across(const HeadProduct& p, const float* const* x, const uint8_t* w, float* out, int64_t left) {
  const int64_t size = p.w_bf16 ? 2 : 4;
  f32x16 sums[M][V] = {};
  for (int64_t i = 0; i < p.in; i++, w += p.out * size) {
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      const f32x16 c = V > 1 ? load_numbers(w + v * 16 * size, p.w_bf16, 16) : load_numbers(w, p.w_bf16, left);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) sums[m][v] += x[m][i] * c;
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) store(out + (m * V + v) * 16, sums[m][v]);
}
}  // namespace

void multiply_heads(const HeadProduct& p) {
  const int64_t size = p.bf16 ? 2 : 4, w_size = p.w_bf16 ? 2 : 4, bytes = p.heads * p.in * p.out * w_size;
  const int64_t padded = ceil_div(p.in, 16) * 16;
  auto from = [&](int64_t m, int64_t h) { return (const uint8_t*)p.x + (m * p.x_token + h * p.x_head) * size; };
  auto to = [&](int64_t m, int64_t h, int64_t at) { return (uint8_t*)p.y + (m * p.y_token + h * p.y_head + at) * size; };
  if (!p.across) {  // rows of the matrix against rows of x
    static thread_local Room own_room;
    static thread_local std::vector<int64_t> own_order;
    std::vector<int64_t>& order = own_order;
    const Weight first = {(const uint8_t*)p.w, nullptr, p.out, p.in, p.w_bf16 ? BF16 : F32, 0};
    const Inputs in = make_inputs(first, p.bf16, p.n * p.heads, own_room);
    const int64_t panels = ceil_div(p.out, PANEL), BATCH = 64;
    const int threads = threads_for(bytes, p.n);
    order.resize(p.n * p.heads);
    Pool::get().run(p.n * p.heads, 16, threads, [&](int64_t i) {  // a head's tokens one after the other
      order[i] = i;
      fill_row(in, i, from(i % p.n, i / p.n), p.bf16, first);
    });
    Pool::get().run(p.heads * panels, 2, threads, [&](int64_t unit) {
      const int64_t h = unit / panels, panel = unit % panels, row = panel * PANEL, valid = std::min<int64_t>(PANEL, p.out - row);
      Weight w = first;
      w.codes += h * p.w_head * w_size;
      float out[BATCH * PANEL];
      for (int64_t m = 0; m < p.n; m += BATCH) {
        const int64_t count = std::min(BATCH, p.n - m);
        multiply_panel(w, panel, in, &order[h * p.n + m], count, out);
        for (int64_t i = 0; i < count; i++) store_numbers(to(m + i, h, row), p.bf16, load<f32x16>(out + i * PANEL), valid);
      }
    });
    return;
  }
  // wide, so that one token reads the matrix in as few streams as may be; several share what is read
  const int64_t WIDE = p.n < 4 ? 128 : 64, blocks = ceil_div(p.out, WIDE);
  Pool::get().run(p.heads * blocks, 1, threads_for(bytes, p.n), [&](int64_t unit) {
    const int64_t h = unit / blocks, first = unit % blocks * WIDE, end = std::min(p.out, first + WIDE);
    const uint8_t* matrix = (const uint8_t*)p.w + h * p.w_head * w_size;
    thread_local std::vector<float> kept;
    kept.resize(4 * padded);
    float out[256];
    for (int64_t m = 0; m < p.n;) {
      const int64_t count = p.n - m < 4 ? 1 : 4;
      const float* x[4];
      for (int64_t i = 0; i < count; i++) {
        x[i] = &kept[i * padded];
        for (int64_t k = 0; k < p.in; k += 16) store(&kept[i * padded + k], load_numbers(from(m + i, h) + k * size, p.bf16, p.in - k));
      }
      for (int64_t at = first; at < end;) {
        const int64_t left = end - at, width = count == 1 && left >= 128 ? 128 : left >= 64 ? 64 : std::min<int64_t>(left, 16);
        const uint8_t* w = matrix + at * w_size;
        if (count == 1) width == 128 ? across<1, 8>(p, x, w, out, 16) : width == 64 ? across<1, 4>(p, x, w, out, 16) : across<1, 1>(p, x, w, out, left);
        else width == 64 ? across<4, 4>(p, x, w, out, 16) : across<4, 1>(p, x, w, out, left);
        const int64_t step = width < 16 ? 16 : width;
        for (int64_t i = 0; i < count; i++)
          for (int64_t k = 0; k < width; k += 16)
            store_numbers(to(m + i, h, at + k), p.bf16, load<f32x16>(out + i * step + k), width - k);
        at += width;
      }
      m += count;
    }
  });
}

// The same; y [heads, n, out] is dense.
extern "C" void jevons_heads(void* x, int64_t token, int64_t head, int32_t bf16, int64_t n, int64_t heads, int64_t in, void* w,
                             int64_t w_head, int32_t w_bf16, int64_t out, int32_t across, void* y) {
  multiply_heads({x, token, head, y, out, n * out, n, heads, in, out, w, w_head, bf16, w_bf16, across});
}

namespace {
// Zeroes all but the fewest of the largest numbers whose sum is enough (one at least), of equals the first. Their sum.
double keep_largest(float* p, int64_t n, double enough) {
  static thread_local std::vector<std::pair<float, int64_t>> heap;
  heap.clear();
  for (int64_t i = 0; i < n; i++)
    if (p[i] > 0) heap.push_back({p[i], -i}), p[i] = 0;
  std::make_heap(heap.begin(), heap.end());
  double sum = 0;
  for (auto end = heap.end(); end != heap.begin() && (sum == 0 || sum < enough);) {
    std::pop_heap(heap.begin(), end--);
    p[-end->second] = end->first, sum += end->first;
  }
  return sum;
}
}  // namespace

// Tokens of n rows of logits, and their log-probabilities with the row's temperature (0: greedy, and as with 1), before top-p. The
// noise of a token is a function of its seed and position: engine/sampler.py, which draws the same.
extern "C" void jevons_draw(void* logits, int64_t stride, int32_t bf16, int64_t n, int64_t vocabulary, const float* temperature,
                            const float* top_p, const uint64_t* seeds, const int64_t* positions, int64_t* tokens, float* logprobs) {
  const Matrix x = {(uint8_t*)logits, stride, bf16};
  Pool::get().run(n, 1, n * vocabulary >= (1 << 18) ? omp_get_max_threads() : 1, [&](int64_t m) {
    thread_local std::vector<float> kept;
    const int64_t blocks = ceil_div(vocabulary, 16);
    kept.resize(blocks * 16);
    float *p = kept.data(), heat = temperature[m] == 0 ? 1.0f : temperature[m];
    f32x16 high = splat(-INFINITY);
    for (int64_t i = 0; i < vocabulary; i += 16) {
      const int64_t count = std::min<int64_t>(16, vocabulary - i);
      f32x16 v = load_numbers(x.at(m, i), bf16, count) / heat;
      for (int64_t lane = count; lane < 16; lane++) v[lane] = -INFINITY;
      store(p + i, v);
      high = v > high ? v : high;
    }
    float top = -INFINITY;
    for (int i = 0; i < 16; i++) top = high[i] > top ? high[i] : top;
    double total = 0;
    for (int64_t i = 0; i < blocks; i++) {
      const f32x16 e = exponential(load<f32x16>(p + 16 * i) - top);
      store(p + 16 * i, e);
      total += sum(e);
    }
    int64_t token = 0;
    if (temperature[m] == 0) {
      while (token < vocabulary - 1 && p[token] != 1.0f) token++;
    } else {
      uint64_t z = seeds[m] * 0x9E3779B97F4A7C15 + (uint64_t)positions[m] * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D;
      z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
      z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
      const double kept = top_p[m] < 1 ? keep_largest(p, vocabulary, top_p[m] * total) : total;
      const double point = ((z ^ (z >> 31)) >> 11) * 0x1p-53 * kept;
      double before = 0, inside = 0;
      int64_t chosen = 0;  // the block where the cumulative sum passes the point, or the last that has any
      for (int64_t block = 0; block < blocks; block++) {
        const double own = sum(load<f32x16>(p + 16 * block));
        if (own > 0) chosen = block, inside = before;
        before += own;
        if (before > point) break;
      }
      for (int64_t i = 16 * chosen; i < std::min(16 * chosen + 16, vocabulary); i++) {
        if (p[i] == 0) continue;
        token = i, inside += p[i];
        if (inside > point) break;
      }
    }
    float own[16];
    store(own, load_numbers(x.at(m, token), bf16, 1) / heat);
    tokens[m] = token, logprobs[m] = own[0] - (top + (float)std::log(total));
  });
}
