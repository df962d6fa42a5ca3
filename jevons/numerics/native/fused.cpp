// The small steps between a training step's products, forward and backward in one pass over memory each: norms, SwiGLU, cross
// entropy, and rows on their way to the experts and back. All arithmetic is float32; numbers in memory are float32 or bf16.
//
// Rows are shared among OpenMP's threads. Where rows are summed (a norm's weight), they are summed CHUNK by CHUNK, whatever the
// number of threads, so that a gradient does not depend on it.
#include "lanes.h"

namespace {
constexpr int64_t CHUNK = 64;
}

// y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps); rstd [rows] is kept.
extern "C" void jevons_norm(Matrix x, int64_t rows, int64_t dim, const float* weight, float eps, Matrix y, float* rstd) {
  typed([=](auto x, auto y) {
#pragma omp parallel for if (rows * dim > ALONE)
    for (int64_t r = 0; r < rows; r++) {
      f32x16 squares = {};
      across(dim, [&](int64_t i, auto n) {
        const f32x16 v = get(x[r] + i, n);
        squares += v * v;
      });
      const float scale = rstd[r] = 1.0f / std::sqrt(sum(squares) / dim + eps);
      across(dim, [&](int64_t i, auto n) { put(y[r] + i, get(x[r] + i, n) * scale * get(weight + i, n), n); });
    }
  }, x, y);
}

// dx = rstd (g w - xhat mean(g w xhat)) + plus (null: 0), dw = sum over rows of g xhat, xhat = x rstd. `parts` is
// [ceil(rows / 64), dim]. `copy` (null: none) gets dx rounded to bf16, rows of `dim`.
extern "C" void jevons_norm_grad(Matrix g, Matrix x, int64_t rows, int64_t dim, const float* weight, const float* rstd,
                                 const float* plus, Matrix dx, void* copy, float* parts, float* dw) {
  const int64_t chunks = ceil_div(rows, CHUNK);
  typed([=](auto g, auto x) {
    const decltype(x) out = {(decltype(x.data))dx.data, dx.stride};
#pragma omp parallel for if (rows * dim > ALONE)
    for (int64_t c = 0; c < chunks; c++) {
      float* part = parts + c * dim;
      std::fill(part, part + dim, 0.0f);
      for (int64_t r = c * CHUNK; r < std::min(rows, (c + 1) * CHUNK); r++) {
        f32x16 along = {};
        const float scale = rstd[r];
        across(dim, [&](int64_t i, auto n) {
          const f32x16 h = get(x[r] + i, n) * scale, grad = get(g[r] + i, n), both = grad * h;
          along += both * get(weight + i, n);
          put(part + i, get(part + i, n) + both, n);
        });
        const float mean = sum(along) / dim;
        across(dim, [&](int64_t i, auto n) {
          f32x16 d = (get(g[r] + i, n) * get(weight + i, n) - get(x[r] + i, n) * scale * mean) * scale;
          if (plus) d += get(plus + r * dim + i, n);
          put(out[r] + i, d, n);
          if (copy) put((bf16*)copy + r * dim + i, d, n);
        });
      }
    }
  }, g, x);
  std::fill(dw, dw + dim, 0.0f);
  for (int64_t c = 0; c < chunks; c++)
    for (int64_t i = 0; i < dim; i++) dw[i] += parts[c * dim + i];
}

// x + more, and the norm of it; rows of x, more and total are `dim` apart.
extern "C" void jevons_add_norm(const float* x, Matrix more, int64_t rows, int64_t dim, const float* weight, float eps, float* total,
                                Matrix y, float* rstd) {
  typed([=](auto more, auto y) {
#pragma omp parallel for if (rows * dim > ALONE)
    for (int64_t r = 0; r < rows; r++) {
      f32x16 squares = {};
      float* row = total + r * dim;
      across(dim, [&](int64_t i, auto n) {
        const f32x16 v = get(x + r * dim + i, n) + get(more[r] + i, n);
        squares += v * v;
        put(row + i, v, n);
      });
      const float scale = rstd[r] = 1.0f / std::sqrt(sum(squares) / dim + eps);
      across(dim, [&](int64_t i, auto n) { put(y[r] + i, get(row + i, n) * scale * get(weight + i, n), n); });
    }
  }, more, y);
}

// x + more in float32
extern "C" void jevons_add(const float* x, Matrix more, int64_t rows, int64_t dim, float* total) {
  typed([=](auto more) {
#pragma omp parallel for if (rows * dim > ALONE)
    for (int64_t r = 0; r < rows; r++)
      across(dim, [&](int64_t i, auto n) { put(total + r * dim + i, get(x + r * dim + i, n) + get(more[r] + i, n), n); });
  }, more);
}

// y [rows, inter] = silu(gate) * up, h [rows, 2 inter] = [gate | up].
extern "C" void jevons_swiglu(Matrix h, int64_t rows, int64_t inter, Matrix y) {
  typed([=](auto h) {
    const decltype(h) out = {(decltype(h.data))y.data, y.stride};
#pragma omp parallel for if (rows * inter > ALONE)
    for (int64_t r = 0; r < rows; r++)
      across(inter, [&](int64_t i, auto n) {
        const f32x16 gate = get(h[r] + i, n);
        put(out[r] + i, gate * sigmoid16(gate) * get(h[r] + inter + i, n), n);
      });
  }, h);
}

extern "C" void jevons_swiglu_grad(Matrix g, Matrix h, int64_t rows, int64_t inter, Matrix dh) {
  typed([=](auto g, auto h) {
    const decltype(h) out = {(decltype(h.data))dh.data, dh.stride};
#pragma omp parallel for if (rows * inter > ALONE)
    for (int64_t r = 0; r < rows; r++)
      across(inter, [&](int64_t i, auto n) {
        const f32x16 gate = get(h[r] + i, n), up = get(h[r] + inter + i, n), grad = get(g[r] + i, n), s = sigmoid16(gate);
        put(out[r] + i, grad * up * s * (1.0f + gate * (1.0f - s)), n);
        put(out[r] + inter + i, grad * gate * s, n);
      });
  }, g, h);
}

// losses[r] = log sum exp(logits[r]) - logits[r, target]; the first part is kept in lse.
extern "C" void jevons_cross_entropy(Matrix logits, int64_t rows, int64_t vocab, const int64_t* targets, float* losses, float* lse) {
  typed([=](auto logits) {
#pragma omp parallel for if (rows * vocab > ALONE)
    for (int64_t r = 0; r < rows; r++) {
      const auto* row = logits[r];
      const int64_t whole = vocab / 16 * 16;
      f32x16 high = splat(-INFINITY), total = {};
      across(whole, [&](int64_t i, auto n) {
        const f32x16 v = get(row + i, n);
        high = v > high ? v : high;
      });
      float top = highest(high), rest = 0;
      const f32x16 tail = get(row + whole, (int)(vocab - whole));
      for (int l = 0; l < vocab - whole; l++) top = std::max(top, tail[l]);
      for (int l = 0; l < vocab - whole; l++) rest += std::exp(tail[l] - top);
      across(whole, [&](int64_t i, auto n) { total += exp16(get(row + i, n) - top); });
      lse[r] = top + std::log(sum(total) + rest);
      losses[r] = lse[r] - get(row + targets[r], 1)[0];
    }
  }, logits);
}

// d[r] = g[r] (softmax(logits[r]) - onehot(target))
extern "C" void jevons_cross_entropy_grad(const float* g, Matrix logits, int64_t rows, int64_t vocab, const int64_t* targets,
                                          const float* lse, Matrix d) {
  typed([=](auto logits) {
    const decltype(logits) out = {(decltype(logits.data))d.data, d.stride};
#pragma omp parallel for if (rows * vocab > ALONE)
    for (int64_t r = 0; r < rows; r++) {
      across(vocab, [&](int64_t i, auto n) { put(out[r] + i, exp16(get(logits[r] + i, n) - lse[r]) * g[r], n); });
      const int64_t at = targets[r];
      put(out[r] + at, (exp16(get(logits[r] + at, 1) - lse[r]) - 1.0f) * g[r], 1);
    }
  }, logits);
}

// Token n's row goes to its k cells; the cells of `out` (`size` of them) that no token has are zero.
extern "C" void jevons_dispatch(Matrix x, int64_t n, int64_t dim, const int64_t* cells, int64_t k, const float* weights, Matrix out,
                                int64_t size) {
  std::vector<int64_t> kept(size, -1);
  for (int64_t i = 0; i < n * k; i++) kept[cells[i]] = i;
  const int64_t* from = kept.data();
  typed([=](auto x, auto out) {
#pragma omp parallel for if (size * dim > ALONE)
    for (int64_t c = 0; c < size; c++) {
      if (from[c] < 0) {
        memset((void*)out[c], 0, dim * sizeof *out.data);
        continue;
      }
      const float w = weights ? weights[from[c]] : 1.0f;
      const auto* row = x[from[c] / k];
      across(dim, [&](int64_t i, auto n) { put(out[c] + i, get(row + i, n) * w, n); });
    }
  }, x, out);
}

// out[n] = sum over its k cells of weight * y[cell] (weights null: 1).
extern "C" void jevons_collect(Matrix y, int64_t n, int64_t dim, const int64_t* cells, int64_t k, const float* weights, Matrix out) {
  typed([=](auto y, auto out) {
#pragma omp parallel for if (n * dim > ALONE)
    for (int64_t t = 0; t < n; t++)
      across(dim, [&](int64_t i, auto lanes) {
        f32x16 total = {};
        for (int64_t j = t * k; j < (t + 1) * k; j++) total += get(y[cells[j]] + i, lanes) * (weights ? weights[j] : 1.0f);
        put(out[t] + i, total, lanes);
      });
  }, y, out);
}

// dots[n, j] = g[n] . y[cell n, j]: the gradient of collect's weights.
extern "C" void jevons_collect_dots(Matrix g, Matrix y, int64_t n, int64_t dim, const int64_t* cells, int64_t k, float* dots) {
  typed([=](auto g, auto y) {
#pragma omp parallel for if (n * k * dim > ALONE)
    for (int64_t c = 0; c < n * k; c++) {
      f32x16 total = {};
      across(dim, [&](int64_t i, auto lanes) { total += get(g[c / k] + i, lanes) * get(y[cells[c]] + i, lanes); });
      dots[c] = sum(total);
    }
  }, g, y);
}
