// Many rows of inputs times a panel with AMX, Intel's unit for products of tiles: sixteen rows of 64 bytes each. Included by rows.cpp.
//
// A tile of inputs [16 rows, 64 bytes] times a tile of weights [16 groups of columns, 16 rows] is 16 x 16 sums: what `out` holds.
// A panel of 8 bits lies in memory as such tiles; bf16 rows are turned once a panel. 4 bits gain nothing: a scale for every 32 columns
// leaves two products between what is done with their sums.
#pragma once
#include "inputs.h"

#if HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>

namespace amx {

const int64_t LEAST = 8;  // rows of inputs from which it pays

// Linux gives a process the registers only when asked.
static inline bool allowed() {
  static const bool given = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return given;
}

struct Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// What follows may be read by instructions whose reads the compiler does not know.
static inline void written(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

// Tiles 0 to 3 are sums of `rows` rows of inputs, 4 and 5 inputs of `bytes` bytes, 6 weights.
static inline void configure(int64_t rows, int64_t bytes) {
  Config c;
  for (int t = 0; t < 7; t++) c.rows[t] = t < 6 ? rows : bytes / 4, c.bytes[t] = t == 4 || t == 5 ? bytes : 64;
  written(&c);
  _tile_loadconfig(&c);
}

// -- 8 bits: the sums of rows.cpp's panel_tile, to the bit ----------------------------------------------------------------------

// Sums of one group of columns, of up to 16 rows of inputs: to tiles HIGH and LOW, and from there to `sums` [2, 16, 16 rows].
#define SUM_GROUP(HIGH, LOW, x, sums)                     \
  _tile_zero(HIGH);                                       \
  _tile_zero(LOW);                                        \
  for (int64_t k = 0; k < w.group; k += step) {           \
    _tile_loadd(6, codes + k * PANEL, 64);                \
    _tile_loadd(4, (x) + k, in.stride);                   \
    _tile_loadd(5, (x) + in.width + k, in.stride);        \
    _tile_dpbsud(HIGH, 4, 6);                             \
    _tile_dpbsud(LOW, 5, 6);                              \
  }                                                       \
  _tile_stored(HIGH, sums, 64);                           \
  _tile_stored(LOW, (sums) + 16 * PANEL, 64);

static inline void add_group(const int32_t* sums, const Inputs& in, int64_t at, int64_t rows, int64_t g, f32x16 row_scale, float* out) {
#pragma GCC unroll 4
  for (int64_t m = 0; m < rows; m++) {
    const int64_t cell = (at + m) * in.groups + g;
    const i32x16 all = (load<i32x16>(sums + m * PANEL) << 8) + (load<i32x16>(sums + (16 + m) * PANEL) + in.offset[cell]);
    f32x16 total = load<f32x16>(out + m * PANEL);
    total += __builtin_convertvector(all, f32x16) * (row_scale * in.scale[cell]);
    store(out + m * PANEL, total);
  }
}

// `codes`: a group of a panel, [columns / 4, 16 rows, 4]. Two tiles of inputs at a time hide what one of them waits for.
static inline void group(const Weight& w, const uint8_t* codes, const Inputs& in, int64_t at, int64_t count, int64_t rows, int64_t g,
                         f32x16 row_scale, float* out) {
  alignas(64) int32_t first[32 * PANEL], second[32 * PANEL];
  const int64_t step = std::min<int64_t>(w.group, 64), columns = g * w.group;
  int64_t m = 0;
  for (; m + 2 * rows <= count; m += 2 * rows) {
    SUM_GROUP(0, 1, in.row(at + m) + columns, first)
    SUM_GROUP(2, 3, in.row(at + m + rows) + columns, second)
    add_group(first, in, at + m, rows, g, row_scale, out + m * PANEL);
    add_group(second, in, at + m + rows, rows, g, row_scale, out + (m + rows) * PANEL);
  }
  if (m < count) {
    SUM_GROUP(0, 1, in.row(at + m) + columns, first)
    add_group(first, in, at + m, rows, g, row_scale, out + m * PANEL);
  }
}
#undef SUM_GROUP

static void bytes(const Weight& w, int64_t panel, const Inputs& in, int64_t at, int64_t count, float* out) {
  const int64_t groups = ceil_div(w.columns, w.group), size = PANEL * w.group;
  const uint8_t* codes = w.codes + panel * groups * size;
  const uint8_t* scale = w.scale + panel * PANEL * groups * 2;
  std::fill_n(out, count * PANEL, 0.0f);
  for (int64_t first = 0; first < count;) {  // whole tiles, then what is left
    const int64_t rows = std::min<int64_t>(16, count - first), end = rows < 16 ? count : first + (count - first) / 16 * 16;
    configure(rows, std::min<int64_t>(w.group, 64));
    for (int64_t g = 0; g < groups; g++) {
      const f32x16 row_scale = from_bf16(load<u16x16>(scale + 2 * PANEL * g));
      group(w, codes + g * size, in, at + first, end - first, rows, g, row_scale, out + first * PANEL);
    }
    first = end;
  }
  _tile_release();
}

// -- bf16 ----------------------------------------------------------------------------------------------------------------------

// N times 16 rows of inputs (at most `rows` of them where N is 1) over all columns. `turned`: tiles of [16 pairs of columns, 16 rows].
template <int N>
static void floats(const uint8_t* turned, int64_t columns, const Inputs& in, int64_t at, float* out) {
  const int64_t next = 16 * in.stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int p = 0; p < in.planes; p++) {
    const uint8_t *x = in.row(at) + p * 2 * in.width, *w = turned;
    for (int64_t k = 0; k < columns; k += 32, x += 64, w += 1024) {
      _tile_loadd(6, w, 64);
      _tile_loadd(4, x, in.stride);
      _tile_dpbf16ps(0, 4, 6);
      if (N > 1) {
        _tile_loadd(5, x + next, in.stride);
        _tile_dpbf16ps(1, 5, 6);
      }
      if (N > 2) {
        _tile_loadd(4, x + 2 * next, in.stride);
        _tile_dpbf16ps(2, 4, 6);
      }
      if (N > 3) {
        _tile_loadd(5, x + 3 * next, in.stride);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
  }
  _tile_stored(0, out, 64);
  if (N > 1) _tile_stored(1, out + 16 * PANEL, 64);
  if (N > 2) _tile_stored(2, out + 32 * PANEL, 64);
  if (N > 3) _tile_stored(3, out + 48 * PANEL, 64);
}

static void floats(const Weight& w, int64_t panel, const Inputs& in, int64_t at, int64_t count, float* out) {
  static thread_local std::vector<f32x16> kept;
  kept.resize(ceil_div(w.columns, 32) * 16);
  const int64_t row = panel * PANEL, valid = std::min<int64_t>(PANEL, w.rows - row);
  f32x16 block[16] = {};
  for (int64_t k = 0; k < w.columns; k += 32) {
    const __mmask32 mask = k + 32 <= w.columns ? ~0u : (1u << (w.columns - k)) - 1;
    for (int64_t r = 0; r < valid; r++)
      block[r] = (f32x16)_mm512_maskz_loadu_epi16(mask, w.codes + ((row + r) * w.columns + k) * 2);
    turn(block, &kept[k / 2]);
  }
  const uint8_t* turned = (const uint8_t*)kept.data();
  written(turned);
  int64_t m = 0;
  if (count >= 16) configure(16, 64);
  for (; m + 64 <= count; m += 64) floats<4>(turned, w.columns, in, at + m, out + m * PANEL);
  for (; m + 32 <= count; m += 32) floats<2>(turned, w.columns, in, at + m, out + m * PANEL);
  for (; m + 16 <= count; m += 16) floats<1>(turned, w.columns, in, at + m, out + m * PANEL);
  if (m < count) configure(count - m, 64), floats<1>(turned, w.columns, in, at + m, out + m * PANEL);
  _tile_release();
}

// -- which products --------------------------------------------------------------------------------------------------------------

static inline bool suits(const Weight& w, const int64_t* at, int64_t count) {
  if (count < LEAST || !(w.kind == BF16 || (w.kind == INT8 && (w.group == 32 || w.group % 64 == 0))) || !allowed()) return false;
  for (int64_t i = 1; i < count; i++)  // rows equally far apart, so that a tile of them can be loaded
    if (at[i] != at[0] + i) return false;
  return true;
}

static void multiply(const Weight& w, int64_t panel, const Inputs& in, int64_t at, int64_t count, float* out) {
  w.kind == BF16 ? floats(w, panel, in, at, count, out) : bytes(w, panel, in, at, count, out);
}

}  // namespace amx
#endif
