// Sixteen lanes at a time over rows whose element type the compiler knows, for the kernels of training.
#pragma once
#include <type_traits>

#include "common.h"

// 16 bits of a bfloat16; float32 is `float`.
struct bf16 {
  uint16_t bits;
};

constexpr int64_t ALONE = 1 << 14;  // numbers up to which another thread is not worth waking

// What `f(i, n)` is called with for every 16 numbers of a row: n is a constant but in the last, partial one.
template <class F>
inline void across(int64_t dim, F f) {
  int64_t i = 0;
  for (; i + 16 <= dim; i += 16) f(i, std::integral_constant<int, 16>{});
  if (i < dim) f(i, (int)(dim - i));
}

template <class N>
inline f32x16 get(const float* p, N n) {
  if (n == 16) return load<f32x16>(p);
  f32x16 v = {};
  memcpy(&v, p, n * 4);
  return v;
}

template <class N>
inline f32x16 get(const bf16* p, N n) {
  if (n == 16) return from_bf16(load<u16x16>(p));
  u16x16 v = {};
  memcpy(&v, p, n * 2);
  return from_bf16(v);
}

inline u16x16 narrowed(f32x16 v) {
#if DOT_BF16
  return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  return to_bf16(v);
#endif
}

template <class N>
inline void put(float* p, f32x16 v, N n) {
  if (n == 16)
    store(p, v);
  else
    memcpy(p, &v, n * 4);
}

template <class N>
inline void put(bf16* p, f32x16 v, N n) {
  const u16x16 narrow = narrowed(v);
  if (n == 16)
    store(p, narrow);
  else
    memcpy(p, &narrow, n * 2);
}

// A matrix of one known type.
template <class T>
struct Typed {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

// f(Typed...) for the types that the matrices have.
template <class F>
inline void typed(F f) {
  f();
}

template <class F, class... Rest>
inline void typed(F f, const Matrix& m, const Rest&... rest) {
  if (m.bf16)
    typed([&](auto... more) { f(Typed<bf16>{(bf16*)m.data, m.stride}, more...); }, rest...);
  else
    typed([&](auto... more) { f(Typed<float>{(float*)m.data, m.stride}, more...); }, rest...);
}

// e^v to about 1 unit in the last place, and at most e^88; nothing, or next to it, where v is under -87. NaN stays NaN.
inline f32x16 exp16(f32x16 v) {
  const f32x16 high = splat(88.0f);
#if defined(__AVX512F__)
  const f32x16 low = splat(-104.0f);
  v = (f32x16)_mm512_max_ps((__m512)low, _mm512_min_ps((__m512)high, (__m512)v));
  const f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)(v * 1.44269504f), 0);
#else
  const f32x16 low = splat(-87.0f);
  v = v < low ? low : v;
  v = v > high ? high : v;
  const float magic = 12582912.0f;  // adding it rounds to a whole number
  const f32x16 n = (v * 1.44269504f + magic) - magic;
#endif
  const f32x16 r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (f32x16)((__builtin_convertvector(n, i32x16) + 127) << 23);
#endif
}

// 1 / (1 + e^-v)
inline f32x16 sigmoid16(f32x16 v) {
  const f32x16 d = 1.0f + exp16(-v);
#if defined(__AVX512F__)  // a division takes as long as the rest; one step of Newton's after 14 bits
  const f32x16 y = (f32x16)_mm512_rcp14_ps((__m512)d);
  return y * (2.0f - d * y);
#else
  return 1.0f / d;
#endif
}

inline float highest(f32x16 v) {
  float top = v[0];
  for (int l = 1; l < 16; l++) top = std::max(top, v[l]);
  return top;
}
