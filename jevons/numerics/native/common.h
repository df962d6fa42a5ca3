// What the kernels share: vectors of sixteen lanes, conversions, and how Python hands a weight over.
//
// Vectors are the compiler's own (GCC, Clang), so arithmetic is written once for every processor; where an instruction
// matters (dot products of bf16 and of bytes, table lookups) it is chosen by the macros below.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define DOT_BF16 1
#if defined(__AVX512VBMI__)
#define TABLE_FP8 1
#endif
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define DOT_BYTES 1
#endif
#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(DOT_BYTES) && defined(__linux__)
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

enum Kind : int32_t { F32, BF16, FP8, INT8, INT4 };

// A weight [rows, columns]. F32, BF16: row by row. FP8: E4M3 row by row, a float scale for each 128 x 128 block. INT8, INT4: panels
// of 16 rows (numerics/packed.py), a bf16 scale for each row and `group` columns. Mirrored by ctypes.
struct Weight {
  const uint8_t* codes;
  const uint8_t* scale;
  int64_t rows, columns;
  int32_t kind, group;
};

// A matrix of activations, float32 or bf16, `stride` elements from row to row.
struct Matrix {
  uint8_t* data;
  int64_t stride;
  int32_t bf16;
  uint8_t* at(int64_t row, int64_t column = 0) const { return data + (row * stride + column) * (bf16 ? 2 : 4); }
};

static const int PANEL = 16, BLOCK = 128;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class V>
static inline V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
static inline void store(void* p, const V& v) {
  memcpy(p, &v, sizeof v);
}

static inline f32x16 splat(float value) { return value - f32x16{}; }

static inline f32x16 from_bf16(u16x16 v) { return (f32x16)(__builtin_convertvector(v, u32x16) << 16); }

// To the nearest, ties to even; NaN stays NaN.
static inline u16x16 to_bf16(f32x16 v) {
  u32x16 bits = (u32x16)v;
  u32x16 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  u32x16 number = (u32x16)((bits & 0x7FFFFFFF) <= 0x7F800000);
  return __builtin_convertvector((rounded & number) | (((bits >> 16) | 0x40) & ~number), u16x16);
}

// n (at most 16) numbers of a row; lanes past them are zero.
static inline f32x16 load_numbers(const uint8_t* p, bool bf16, int64_t n) {
  if (n >= 16) return bf16 ? from_bf16(load<u16x16>(p)) : load<f32x16>(p);
  uint8_t kept[64] = {};
  memcpy(kept, p, n * (bf16 ? 2 : 4));
  return bf16 ? from_bf16(load<u16x16>(kept)) : load<f32x16>(kept);
}

static inline void store_numbers(uint8_t* p, bool bf16, f32x16 v, int64_t n) {
  const u16x16 narrow = bf16 ? to_bf16(v) : u16x16{};
  if (n >= 16)  // a size that the compiler knows: one store
    bf16 ? memcpy(p, &narrow, 32) : memcpy(p, &v, 64);
  else
    bf16 ? memcpy(p, &narrow, 2 * n) : memcpy(p, &v, 4 * n);
}

static inline float sum(f32x16 v) {
  typedef float f32x8 __attribute__((vector_size(32)));
  typedef float f32x4 __attribute__((vector_size(16)));
  const f32x8 eight = load<f32x8>(&v) + load<f32x8>((const float*)&v + 8);
  const f32x4 four = load<f32x4>(&eight) + load<f32x4>((const float*)&eight + 4);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

static inline float largest(f32x16 v) {  // of magnitudes: no NaN expected
  float best = 0;
  for (int i = 0; i < 16; i++) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x to a few units in the last place; 0 under -87, at most e^88. NaN stays NaN.
static inline f32x16 exponential(f32x16 x) {
  const f32x16 y = x * 1.44269504f, bounded = y > 127.0f ? splat(127.0f) : y < -126.0f ? splat(-126.0f) : y;
  const f32x16 shifted = bounded + 12582912.0f;  // rounds to whole numbers
  // x less whole * ln 2, in two parts, keeps its digits; 2^f by its series
  const f32x16 whole = shifted - 12582912.0f, f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const f32x16 result = (f32x16)((i32x16)p + ((i32x16)shifted << 23));
  return y > 127.0f ? splat(std::exp2(127.0f)) : y < -126.0f ? f32x16{} : result;
}

// Columns of 16 x 16 as rows.
#if defined(__AVX512F__)
static inline void turn(const f32x16* from, f32x16* to) {
  __m512 r[16], t[16];
  memcpy(r, from, sizeof r);
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  for (int i = 0; i < 16; i++) {
    const __m512d a = (__m512d)t[i / 4 * 4 + i % 4 / 2], b = (__m512d)t[i / 4 * 4 + i % 4 / 2 + 2];
    r[i] = (__m512)(i % 2 ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
  }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 16; j += 8) {
      t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  for (int i = 0; i < 8; i++) {
    to[i] = (f32x16)_mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    to[i + 8] = (f32x16)_mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}
#else
static inline void turn(const f32x16* from, f32x16* to) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) to[j][i] = from[i][j];
}
#endif
