// Sixteen rows of a weight times every row of the inputs: the unit of work that threads share.
#include "amx.h"

// -- weights that lie row by row ----------------------------------------------------------------------------------------------
//
// A policy says how STEP codes become what is multiplied (`get`, `tail` for fewer of them) and adds their products with x to sums
// (`dot`). Sums live in plain local arrays, indexed by unrolled loops: anything else and the compiler keeps them in memory.

struct RowF32 {
  static const int STEP = 16;
  static const bool BLOCKS = false;
  typedef f32x16 Codes;
  static int64_t at(int64_t k) { return 4 * k; }
  static Codes get(const uint8_t* p) { return load<f32x16>(p); }
  static Codes tail(const uint8_t* p, int64_t n) { return load_numbers(p, false, n); }
  static f32x16 dot(f32x16 sums, const Codes& w, const uint8_t* x, int64_t k, int64_t) { return sums + w * load<f32x16>(x + 4 * k); }
};

#if defined(DOT_BF16)
template <int PLANES>
struct RowBf16 {
  static const int STEP = 32;
  static const bool BLOCKS = false;
  typedef __m512bh Codes;
  static int64_t at(int64_t k) { return 2 * k; }
  static Codes get(const uint8_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Codes tail(const uint8_t* p, int64_t n) { return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, p); }
  static f32x16 dot(f32x16 sums, const Codes& w, const uint8_t* x, int64_t k, int64_t width) {
    sums = (f32x16)_mm512_dpbf16_ps((__m512)sums, w, (__m512bh)_mm512_loadu_si512(x + 2 * k));
    if (PLANES == 2) sums = (f32x16)_mm512_dpbf16_ps((__m512)sums, w, (__m512bh)_mm512_loadu_si512(x + 2 * (width + k)));
    return sums;
  }
};
#else
struct RowBf16 : RowF32 {
  static int64_t at(int64_t k) { return 2 * k; }
  static Codes get(const uint8_t* p) { return from_bf16(load<u16x16>(p)); }
  static Codes tail(const uint8_t* p, int64_t n) { return load_numbers(p, true, n); }
};
#endif

#if defined(TABLE_FP8)
// The bf16 number of each E4M3 magnitude, as its low and its high byte.
struct Fp8Table {
  alignas(64) uint8_t low[128], high[128];
  Fp8Table() {
    for (int u = 0; u < 128; u++) {
      float v = u < 8 ? std::ldexp((float)u, -9) : std::ldexp(1.0f + (u & 7) / 8.0f, (u >> 3) - 7);
      uint32_t bits;
      memcpy(&bits, &v, 4);
      if (u == 127) bits = 0x7FC00000;
      low[u] = bits >> 16, high[u] = bits >> 24;
    }
  }
};
static const Fp8Table fp8_table;

template <int PLANES>
struct RowFp8 {
  static const int STEP = 64;
  static const bool BLOCKS = true;
  struct Codes {
    __m512bh first, second;
  };
  static int64_t at(int64_t k) { return k; }
  static Codes unfold(__m512i u) {
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(fp8_table.low), u, _mm512_load_si512(fp8_table.low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(fp8_table.high), u, _mm512_load_si512(fp8_table.high + 64));
    high = _mm512_ternarylogic_epi32(high, u, _mm512_set1_epi8((char)0x80), 0xF8);  // high | (u & 0x80)
    return {(__m512bh)_mm512_unpacklo_epi8(low, high), (__m512bh)_mm512_unpackhi_epi8(low, high)};
  }
  static Codes get(const uint8_t* p) { return unfold(_mm512_loadu_si512(p)); }
  static Codes tail(const uint8_t* p, int64_t n) { return unfold(_mm512_maskz_loadu_epi8((1ull << n) - 1, p)); }
  static f32x16 dot(f32x16 sums, const Codes& w, const uint8_t* x, int64_t k, int64_t width) {
    for (int p = 0; p < PLANES; p++, x += 2 * width) {
      sums = (f32x16)_mm512_dpbf16_ps((__m512)sums, w.first, (__m512bh)_mm512_loadu_si512(x + 2 * k));
      sums = (f32x16)_mm512_dpbf16_ps((__m512)sums, w.second, (__m512bh)_mm512_loadu_si512(x + 2 * k + 64));
    }
    return sums;
  }
};
#else
struct RowFp8 : RowF32 {
  static const bool BLOCKS = true;
  static int64_t at(int64_t k) { return k; }
  static Codes get(const uint8_t* p) {
    const u32x16 u = __builtin_convertvector(load<u8x16>(p), u32x16), magnitude = u & 0x7F;
    const f32x16 v = (f32x16)((magnitude << 20) | ((u & 0x80) << 24)) * 0x1p120f;
    return (f32x16)((u32x16)v | (u32x16)(magnitude == 0x7F));  // all bits set is NaN
  }
  static Codes tail(const uint8_t* p, int64_t n) {
    uint8_t codes[16] = {};
    memcpy(codes, p, n);
    return get(codes);
  }
};
#endif

static const int64_t AHEAD = 1 << 14;  // bytes: what is asked for arrives before it is needed
static const int64_t SOON = 1 << 12;   // of one stream: over the ends of pages and panels, where the processor stops by itself

// R rows from `row` on times M rows of inputs: out[m * PANEL + r]. One row at a time is read in one stream, which the processor
// fetches ahead by itself; R streams it does not, so the next R rows are asked for while these are multiplied.
template <class L, int R, int M>
static void row_tile(const Weight& w, int64_t row, const Inputs& in, const uint8_t* const* rows, float* out) {
  const int UNROLL = R == 1 && !L::BLOCKS ? (M == 1 ? 4 : M == 2 ? 2 : 1) : 1;  // sums that hide each other's latency
  const int64_t bytes = L::at(w.columns), width = in.width, block = L::BLOCKS ? BLOCK : w.columns;
  const uint8_t* codes = w.codes + row * bytes;
  const uint8_t* next = codes + (R > 1 ? std::max<int64_t>(R * bytes, AHEAD) : SOON);
  const float* scale = (const float*)w.scale + row / BLOCK * ceil_div(w.columns, BLOCK);
  const uint8_t* x[M];
  for (int m = 0; m < M; m++) x[m] = rows[m];
  f32x16 total[R][M], sums[UNROLL][R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) total[r][m] = f32x16{};
  for (int64_t begin = 0; begin < w.columns; begin += block) {
    const int64_t end = std::min(begin + block, w.columns);
#pragma GCC unroll 4
    for (int u = 0; u < UNROLL; u++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) sums[u][r][m] = f32x16{};
    int64_t k = begin;
    for (; k + UNROLL * L::STEP <= end; k += UNROLL * L::STEP)
#pragma GCC unroll 4
      for (int u = 0; u < UNROLL; u++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const typename L::Codes c = L::get(codes + r * bytes + L::at(k + u * L::STEP));
          __builtin_prefetch(next, 0, 2), next += 64;
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) sums[u][r][m] = L::dot(sums[u][r][m], c, x[m], k + u * L::STEP, width);
        }
    for (; k < end; k += L::STEP)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const uint8_t* p = codes + r * bytes + L::at(k);
        const typename L::Codes c = k + L::STEP <= end ? L::get(p) : L::tail(p, end - k);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) sums[0][r][m] = L::dot(sums[0][r][m], c, x[m], k, width);
      }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        f32x16 all = sums[0][r][m];
#pragma GCC unroll 4
        for (int u = 1; u < UNROLL; u++) all += sums[u][r][m];
        total[r][m] += L::BLOCKS ? all * scale[begin / BLOCK] : all;
      }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) out[m * PANEL + r] = sum(total[r][m]);
}

// -- many rows of inputs over float32 rows: sixteen rows are turned once, so that nothing is summed across lanes --------------------

static const int MANY = 12;  // rows of inputs from which turning pays

template <int M>
static void turned_tile(const f32x16* w, int64_t columns, const uint8_t* const* rows, int64_t count, float* out) {
  if (count < M) {
    if constexpr (M > 1) turned_tile<M - 1>(w, columns, rows, count, out);
    return;
  }
  const float* x[M];
  f32x16 sums[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) x[m] = (const float*)rows[m], sums[m] = f32x16{};
  for (int64_t k = 0; k < columns; k++)
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sums[m] += w[k] * x[m][k];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) store(out + m * PANEL, sums[m]);
  if (count > M) turned_tile<8>(w, columns, rows + M, count - M, out + M * PANEL);
}

static void turned_panel(const Weight& w, int64_t panel, const uint8_t* const* x, int64_t count, float* out) {
  static thread_local std::vector<f32x16> kept;
  kept.resize(ceil_div(w.columns, 16) * 16);
  const int64_t row = panel * PANEL, rows = std::min<int64_t>(PANEL, w.rows - row);
  for (int64_t k = 0; k < w.columns; k += 16) {
    f32x16 block[16] = {};
    for (int64_t r = 0; r < rows; r++) block[r] = load_numbers(w.codes + ((row + r) * w.columns + k) * 4, false, w.columns - k);
    turn(block, &kept[k]);
  }
  turned_tile<8>(kept.data(), w.columns, x, count, out);
}

// -- panels: sixteen rows interleaved, so that a vector holds four columns of each and nothing is summed across lanes ---------

#if defined(DOT_BYTES)
struct PanelSum {
  i32x16 high, low;
};
typedef __m512i PanelCodes;
static inline void begin(PanelSum& s, int32_t offset) { s.high = i32x16{}, s.low = offset - i32x16{}; }
static inline PanelCodes bytes_of(const uint8_t* p) { return _mm512_loadu_si512(p); }
static inline void nibbles_of(const uint8_t* p, PanelCodes& first, PanelCodes& second) {
  const __m512i both = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(0x0F);
  first = _mm512_and_si512(both, mask);
  second = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
static inline void dot(PanelSum& s, const PanelCodes& w, const uint8_t* x, int64_t k, int64_t width) {
  s.high = (i32x16)_mm512_dpbusd_epi32((__m512i)s.high, w, _mm512_set1_epi32(load<int32_t>(x + k)));
  s.low = (i32x16)_mm512_dpbusd_epi32((__m512i)s.low, w, _mm512_set1_epi32(load<int32_t>(x + width + k)));
}
static inline f32x16 finish(const PanelSum& s) { return __builtin_convertvector((s.high << 8) + s.low, f32x16); }
static const int WIDE = 8;  // rows of inputs at once: as many sums as there are registers
#elif defined(__AVX2__)
struct PanelSum {
  __m256i pair[4];  // each holds four rows, two sums a row
};
struct PanelCodes {
  __m256i part[4];
};
static inline void begin(PanelSum& s, int32_t offset) {
  s.pair[0] = s.pair[1] = s.pair[2] = s.pair[3] = _mm256_set1_epi64x((uint32_t)offset);
}
static inline PanelCodes bytes_of(const uint8_t* p) {
  PanelCodes c;
  for (int i = 0; i < 4; i++) c.part[i] = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(p + 16 * i)));
  return c;
}
static inline void nibbles_of(const uint8_t* p, PanelCodes& first, PanelCodes& second) {
  const PanelCodes both = bytes_of(p);
  for (int i = 0; i < 4; i++) {
    first.part[i] = _mm256_and_si256(both.part[i], _mm256_set1_epi16(0x0F));
    second.part[i] = _mm256_srli_epi16(both.part[i], 4);
  }
}
static inline void dot(PanelSum& s, const PanelCodes& w, const uint8_t* x, int64_t k, int64_t) {
  const __m256i four = _mm256_set1_epi64x(load<int64_t>(x + 2 * k));
  for (int i = 0; i < 4; i++) s.pair[i] = _mm256_add_epi32(s.pair[i], _mm256_madd_epi16(w.part[i], four));
}
static inline f32x16 finish(const PanelSum& s) {
  int32_t sums[32];
  memcpy(sums, s.pair, sizeof sums);
  f32x16 v;
  for (int r = 0; r < 16; r++) v[r] = (float)(sums[2 * r] + sums[2 * r + 1]);
  return v;
}
static const int WIDE = 2;
#else
struct PanelSum {
  int32_t row[16];
};
struct PanelCodes {
  uint8_t code[64];
};
static inline void begin(PanelSum& s, int32_t offset) { std::fill(s.row, s.row + 16, offset); }
static inline PanelCodes bytes_of(const uint8_t* p) { return load<PanelCodes>(p); }
static inline void nibbles_of(const uint8_t* p, PanelCodes& first, PanelCodes& second) {
  for (int i = 0; i < 64; i++) first.code[i] = p[i] & 0x0F, second.code[i] = p[i] >> 4;
}
static inline void dot(PanelSum& s, const PanelCodes& w, const uint8_t* x, int64_t k, int64_t) {
  int16_t four[4];
  memcpy(four, x + 2 * k, 8);
  for (int r = 0; r < 16; r++)
    for (int j = 0; j < 4; j++) s.row[r] += w.code[4 * r + j] * four[j];
}
static inline f32x16 finish(const PanelSum& s) {
  f32x16 v;
  for (int r = 0; r < 16; r++) v[r] = (float)s.row[r];
  return v;
}
static const int WIDE = 4;
#endif

template <int BITS, int M>
static inline void panel_tile(const Weight& w, int64_t panel, const Inputs& in, const uint8_t* const* x, const int64_t* at,
                              float* out) {
  const int64_t groups = ceil_div(w.columns, w.group);
  const uint8_t* codes = w.codes + panel * PANEL * groups * w.group * BITS / 8;
  const uint8_t* scale = w.scale + panel * PANEL * groups * 2;
  const int64_t step = 32 / BITS;  // columns in a vector of 64 bytes
  f32x16 total[M] = {};
  for (int64_t g = 0; g < groups; g++) {
    PanelSum sums[M];
    for (int m = 0; m < M; m++) begin(sums[m], in.offset[at[m] * in.groups + g]);
    for (int64_t k = g * in.group; k < (g + 1) * in.group; k += step, codes += 64) {
      if (M == 1) __builtin_prefetch(codes + SOON, 0, 2);
      if (BITS == 8) {
        const PanelCodes c = bytes_of(codes);
        for (int m = 0; m < M; m++) dot(sums[m], c, x[m], k, in.width);
      } else {
        PanelCodes first, second;
        nibbles_of(codes, first, second);
        for (int m = 0; m < M; m++) dot(sums[m], first, x[m], k, in.width), dot(sums[m], second, x[m], k + 4, in.width);
      }
    }
    const f32x16 row_scale = from_bf16(load<u16x16>(scale + 2 * PANEL * g));
    for (int m = 0; m < M; m++) total[m] += finish(sums[m]) * (row_scale * in.scale[at[m] * in.groups + g]);
  }
  for (int m = 0; m < M; m++) store(out + m * PANEL, total[m]);
}

// -- one unit ------------------------------------------------------------------------------------------------------------------

static const int FEW = 4;  // rows of inputs at once for weights that lie row by row

template <class L, int R, int M>
static void row_tiles(const Weight& w, int64_t row, const Inputs& in, const uint8_t* const* x, int64_t count, float* out) {
  if (count >= M) {
    row_tile<L, R, M>(w, row, in, x, out);
    if (count > M) row_tiles<L, R, FEW>(w, row, in, x + M, count - M, out + M * PANEL);
  } else if constexpr (M > 1) {
    row_tiles<L, R, M - 1>(w, row, in, x, count, out);
  }
}

template <class L>
static void row_panel(const Weight& w, int64_t panel, const Inputs& in, const uint8_t* const* x, int64_t count, float* out) {
  const int R = L::BLOCKS ? 2 : 4;
  int64_t row = panel * PANEL;
  const int64_t end = std::min<int64_t>(row + PANEL, w.rows);
  if (count > (L::BLOCKS ? 1 : 3))  // fewer are bound by reading, and one stream is read fastest
    for (; row + R <= end; row += R) row_tiles<L, R, FEW>(w, row, in, x, count, out + row % PANEL);
  for (; row < end; row++) row_tiles<L, 1, FEW>(w, row, in, x, count, out + row % PANEL);
}

template <int BITS, int M>
static void panel_tiles(const Weight& w, int64_t panel, const Inputs& in, const uint8_t* const* x, const int64_t* at, int64_t count,
                        float* out) {
  if (count >= M) {
    panel_tile<BITS, M>(w, panel, in, x, at, out);
    if (count > M) panel_tiles<BITS, WIDE>(w, panel, in, x + M, at + M, count - M, out + M * PANEL);
  } else if constexpr (M > 1) {
    panel_tiles<BITS, M - 1>(w, panel, in, x, at, count, out);
  }
}

// Rows panel * 16 and the fifteen after it, times the input rows at[0..count): out[i * PANEL + r].
void multiply_panel(const Weight& w, int64_t panel, const Inputs& in, const int64_t* at, int64_t count, float* out) {
#if HAS_TILES
  if (amx::suits(w, at, count)) return amx::multiply(w, panel, in, at[0], count, out);
#endif
  const uint8_t* x[64];
  for (int64_t first = 0; first < count; first += 64) {
    const int64_t n = std::min<int64_t>(64, count - first);
    for (int64_t i = 0; i < n; i++) x[i] = in.row(at[first + i]);
    float* to = out + first * PANEL;
    if (w.kind == INT8) {
      panel_tiles<8, WIDE>(w, panel, in, x, at + first, n, to);
    } else if (w.kind == INT4) {
      panel_tiles<4, WIDE>(w, panel, in, x, at + first, n, to);
    } else if (w.kind == F32) {
      n < MANY ? row_panel<RowF32>(w, panel, in, x, n, to) : turned_panel(w, panel, x, n, to);
#if defined(DOT_BF16)
    } else if (w.kind == BF16) {
      in.planes == 1 ? row_panel<RowBf16<1>>(w, panel, in, x, n, to) : row_panel<RowBf16<2>>(w, panel, in, x, n, to);
#else
    } else if (w.kind == BF16) {
      row_panel<RowBf16>(w, panel, in, x, n, to);
#endif
#if defined(TABLE_FP8)
    } else {
      in.planes == 1 ? row_panel<RowFp8<1>>(w, panel, in, x, n, to) : row_panel<RowFp8<2>>(w, panel, in, x, n, to);
#else
    } else {
      row_panel<RowFp8>(w, panel, in, x, n, to);
#endif
    }
  }
}
