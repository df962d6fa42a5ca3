// y = x W^T + bias for few rows of x: decoding, checking drafts, the rows of one expert. Bound by reading W.
#include "pool.h"
#include "inputs.h"

static const int64_t BATCH = 256;         // rows of x that are prepared together: they stay in the second-level cache
static const int64_t CHUNK_BYTES = 1 << 16;

static void multiply(const Weight* parts, int32_t count, const Matrix& x, int64_t rows, const Matrix* bias, const Matrix& y) {
  static thread_local Room own_room;
  Room& room = own_room;  // a thread_local seen by the threads below would be each one's own
  int64_t order[BATCH];
  for (int64_t m = 0; m < BATCH; m++) order[m] = m;
  for (int64_t first = 0; first < rows; first += BATCH) {
    const int64_t n = std::min(BATCH, rows - first);
    Inputs in = {};
    int64_t column = 0;
    for (int32_t i = 0; i < count; i++) {
      const Weight& w = parts[i];
      const bool again = i == 0 || form_of(w) != form_of(parts[i - 1]) || w.group != parts[i - 1].group || w.kind != parts[i - 1].kind;
      if (again) in = make_inputs(w, x.bf16, n, room);
      const int64_t panels = ceil_div(w.rows, PANEL);
      const int threads = threads_for(panels * panel_bytes(w), n);
      const int64_t chunk = std::max<int64_t>(1, std::min(CHUNK_BYTES / panel_bytes(w), panels / (4 * threads)));
      auto fill = [&](int64_t m) { fill_row(in, m, x.at(first + m), x.bf16, w); };
      auto work = [&](int64_t p) {
        float out[BATCH * PANEL];
        multiply_panel(w, p, in, order, n, out);
        const int64_t begin = p * PANEL, width = std::min<int64_t>(PANEL, w.rows - begin);
        const f32x16 b = bias ? load_numbers(bias->at(0, column + begin), bias->bf16, width) : f32x16{};
        for (int64_t m = 0; m < n; m++)
          store_numbers(y.at(first + m, column + begin), y.bf16, load<f32x16>(out + m * PANEL) + b, width);
      };
      if (again) Pool::get().run(n, 4, n < 16 ? 1 : threads, fill);
      Pool::get().run(panels, chunk, threads, work, n <= READING);
      column += w.rows;
    }
  }
}

// x [rows, columns of all parts]; the parts' rows lie one below the other in y [rows, sum of their rows], which has x's precision.
extern "C" void jevons_linear(const Weight* parts, int32_t count, void* x, int64_t stride, int32_t bf16, int64_t rows, void* bias,
                              int32_t bias_bf16, void* y) {
  int64_t width = 0;
  for (int32_t i = 0; i < count; i++) width += parts[i].rows;
  const Matrix b = {(uint8_t*)bias, 0, bias_bf16};
  multiply(parts, count, {(uint8_t*)x, stride, bf16}, rows, bias ? &b : nullptr, {(uint8_t*)y, width, bf16});
}

// The same with one weight, dense.
extern "C" void jevons_linear_plain(void* codes, int32_t kind, int64_t out, int64_t columns, void* x, int64_t stride, int32_t bf16,
                                    int64_t rows, void* bias, int32_t bias_bf16, void* y) {
  const Weight w = {(const uint8_t*)codes, nullptr, out, columns, kind, 0};
  jevons_linear(&w, 1, x, stride, bf16, rows, bias, bias_bf16, y);
}

// FP8 blocks as numbers, float32 or bf16: [rows, columns].
extern "C" void jevons_unpack(const Weight* w, int32_t bf16, void* to) {
  const Matrix y = {(uint8_t*)to, w->columns, bf16};
  Pool::get().run(w->rows, 16, threads_for(w->rows * w->columns, 1), [&](int64_t row) {
    const float* scale = (const float*)w->scale + row / BLOCK * ceil_div(w->columns, BLOCK);
    for (int64_t k = 0; k < w->columns; k += 16) {
      const int64_t n = std::min<int64_t>(16, w->columns - k);
      u8x16 codes = {};
      memcpy(&codes, w->codes + row * w->columns + k, n);
      const u32x16 u = __builtin_convertvector(codes, u32x16), magnitude = u & 0x7F;
      const f32x16 v = (f32x16)((magnitude << 20) | ((u & 0x80) << 24)) * 0x1p120f;
      store_numbers(y.at(row, k), bf16, (f32x16)((u32x16)v | (u32x16)(magnitude == 0x7F)) * scale[k / BLOCK], n);
    }
  });
}

// [rows, dim]: x / sqrt(mean(x^2) + eps) * weight, in x's precision.
extern "C" void jevons_rms_norm(void* from, int64_t stride, int32_t bf16, int64_t rows, int64_t dim, void* weight, int32_t weight_bf16,
                                float eps, void* to) {
  const Matrix x = {(uint8_t*)from, stride, bf16}, y = {(uint8_t*)to, dim, bf16}, w = {(uint8_t*)weight, 0, weight_bf16};
  for (int64_t m = 0; m < rows; m++) {
    f32x16 squares = {};
    for (int64_t k = 0; k < dim; k += 16) {
      const f32x16 v = load_numbers(x.at(m, k), bf16, dim - k);
      squares += v * v;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
    for (int64_t k = 0; k < dim; k += 16) {
      const f32x16 v = load_numbers(x.at(m, k), bf16, dim - k) * scale * load_numbers(w.at(0, k), weight_bf16, dim - k);
      store_numbers(y.at(m, k), bf16, v, dim - k);
    }
  }
}

// Reads `bytes` (a multiple of 256) with so many threads; the result only keeps the compiler from leaving it out.
extern "C" uint64_t jevons_read(const uint8_t* data, int64_t bytes, int32_t threads) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
  for (int64_t part = 0; part < 4 * threads; part++) {
    const int64_t begin = bytes / 256 * part / (4 * threads), end = bytes / 256 * (part + 1) / (4 * threads);
    u32x16 a = {}, b = {}, c = {}, d = {};
    for (const uint8_t* p = data + begin * 256; p < data + end * 256; p += 256)
      a ^= load<u32x16>(p), b ^= load<u32x16>(p + 64), c ^= load<u32x16>(p + 128), d ^= load<u32x16>(p + 192);
    a ^= b ^ c ^ d;
    for (int i = 0; i < 16; i++) total += a[i];
  }
  return total;
}
