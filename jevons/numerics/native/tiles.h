// Scores and weighted values of a few rows over a few cells, in registers; what attention.cpp is made of.
//
// Vectors are the compiler's own (GCC, Clang), as wide as the processor's: AVX-512, AVX2, or 16 bytes. Loops whose bounds are
// template arguments are unrolled, and their arrays live in registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paged {

struct bf16 {
    uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

constexpr int ROWS = LANES == 16 ? 4 : 2;  // rows x CELLS scores are summed in registers at a time
constexpr int CELLS = 4;
constexpr int TILE = 64;  // cells from a row of scores to the next one

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

inline Vec splat(float x) { return x - Vec{}; }
inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, bf16& to) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &x, 4);
    to.bits = x != x ? uint16_t(bits >> 16 | 64) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline Vec load(const bf16* p) {
    Halves h;
    memcpy(&h, p, sizeof h);
    Ints i = __builtin_convertvector(h, Ints) << 16;
    Vec v;
    memcpy(&v, &i, sizeof v);
    return v;
}
template <class T>
inline Vec load_part(const T* p, int count) {  // the lanes past `count` are zero, and not read
    T padded[LANES] = {};
    memcpy(padded, p, count * sizeof(T));
    return load(padded);
}
inline void put(float* p, Vec v) { memcpy(p, &v, sizeof v); }

// 2^x to a few units in the last place for x <= 0, and 0 under 2^-125. NaN gives NaN.
inline Vec exp2(Vec x) {
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
    Vec shifted = x + magic, f = x - (shifted - magic);
    Vec p = splat(1.54035304e-4f);
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    Ints whole, bits;
    memcpy(&whole, &shifted, sizeof whole);
    memcpy(&bits, &p, sizeof bits);
    bits += whole << 23;  // magic's own bits leave at the top
    memcpy(&p, &bits, sizeof p);
    return x < -125.0f ? Vec{} : p;
}

inline float sum_lanes(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = v[0];
    for (int i = 1; i < LANES; i++) total += v[i];
    return total;
#endif
}
inline float highest_lane(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float high = v[0];
    for (int i = 1; i < LANES; i++) high = std::max(high, v[i]);
    return high;
#endif
}

// The four vectors' own sums, to s[0 .. 4].
inline void sum4(Vec a, Vec b, Vec c, Vec d, float* s) {
#if defined(__AVX512F__)
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(s, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
    __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
    _mm_storeu_ps(s, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
    s[0] = sum_lanes(a), s[1] = sum_lanes(b), s[2] = sum_lanes(c), s[3] = sum_lanes(d);
#endif
}

// -- scores: R rows of queries times CELLS keys -------------------------------------------------------------------------

template <int R, class Cell>
inline void score(const float* q, int64_t stride, const Cell* const* keys, int width, float* s) {
    Vec sum[R][CELLS] = {};
    auto step = [&](int w, int left) {
        Vec k[CELLS];
        for (int c = 0; c < CELLS; c++) k[c] = left >= LANES ? load(keys[c] + w) : load_part(keys[c] + w, left);
        for (int r = 0; r < R; r++) {
            Vec x = load(q + r * stride + w);  // padded with zeros
            for (int c = 0; c < CELLS; c++) sum[r][c] += x * k[c];
        }
    };
    int w = 0;
    for (; w + LANES <= width; w += LANES) step(w, LANES);
    if (w < width) step(w, width - w);
    for (int r = 0; r < R; r++) sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], s + r * TILE);
}

// -- values: out[r] += sum over cells of p[r][cell] * value[cell], V vectors of the width at a time ----------------------

template <int R, int V, class Cell>
inline void mix(const float* p, const Cell* const* values, int cells, int at, int left, float* out, int64_t stride) {
    Vec sum[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = load(out + r * stride + at + v * LANES);
    for (int c = 0; c < cells; c++) {
        Vec x[V];
        for (int v = 0; v < V; v++)
            x[v] = left >= V * LANES ? load(values[c] + at + v * LANES) : load_part(values[c] + at, left);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sum[r][v] += p[r * TILE + c] * x[v];
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) put(out + r * stride + at + v * LANES, sum[r][v]);
}

template <int R, class Cell>
inline void mix_width(const float* p, const Cell* const* values, int cells, int width, float* out, int64_t stride) {
    int at = 0;
    for (; at + 4 * LANES <= width; at += 4 * LANES) mix<R, 4>(p, values, cells, at, 4 * LANES, out, stride);
    for (; at + LANES <= width; at += LANES) mix<R, 1>(p, values, cells, at, LANES, out, stride);
    if (at < width) mix<R, 1>(p, values, cells, at, width - at, out, stride);
}

#if HAS_PAIRS
// The same two for bf16 queries over bf16 cells: 32 products an instruction.

inline __m512bh load_pairs(const bf16* p, int left) {
    return (__m512bh)(left >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << left) - 1, p));
}

inline void narrow_tile(const float* from, bf16* to) {
    for (int c = 0; c < TILE; c += 16) {
        __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + c));
        memcpy(to + c, &half, sizeof half);
    }
}

template <int R>
inline void score(const bf16* q, int64_t stride, const bf16* const* keys, int width, float* s) {
    __m512 sum[R][CELLS] = {};
    auto step = [&](int w, int left) {
        __m512bh k[CELLS];
        for (int c = 0; c < CELLS; c++) k[c] = load_pairs(keys[c] + w, left);
        for (int r = 0; r < R; r++) {
            __m512bh x = load_pairs(q + r * stride + w, 32);
            for (int c = 0; c < CELLS; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], x, k[c]);
        }
    };
    int w = 0;
    for (; w + 32 <= width; w += 32) step(w, 32);
    if (w < width) step(w, width - w);
    for (int r = 0; r < R; r++) sum4((Vec)sum[r][0], (Vec)sum[r][1], (Vec)sum[r][2], (Vec)sum[r][3], s + r * TILE);
}

template <int R, int V>  // V times 32 elements of the width
inline void mix(const bf16* p, const bf16* const* values, int cells, int at, int left, float* out, int64_t stride) {
    __m512 sum[R][2 * V] = {};
    for (int c = 0; c < cells; c += 2) {
        __m512bh x[2 * V];
        for (int v = 0; v < V; v++) {
            __m512i a = (__m512i)load_pairs(values[c] + at + v * 32, V > 1 ? 32 : left);
            __m512i b = (__m512i)load_pairs(values[c + 1] + at + v * 32, V > 1 ? 32 : left);
            x[2 * v] = (__m512bh)_mm512_unpacklo_epi16(a, b);
            x[2 * v + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
        }
        for (int r = 0; r < R; r++) {
            int32_t pair;
            memcpy(&pair, p + r * TILE + c, 4);
            for (int v = 0; v < 2 * V; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)_mm512_set1_epi32(pair), x[v]);
        }
    }
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            float* to = out + r * stride + at + v * 32;
            put(to, load(to) + (Vec)_mm512_permutex2var_ps(sum[r][2 * v], low, sum[r][2 * v + 1]));
            put(to + 16, load(to + 16) + (Vec)_mm512_permutex2var_ps(sum[r][2 * v], high, sum[r][2 * v + 1]));
        }
}

template <int R>
inline void mix_width(const bf16* p, const bf16* const* values, int cells, int width, float* out, int64_t stride) {
    int at = 0;
    for (; at + 64 <= width; at += 64) mix<R, 2>(p, values, cells, at, 64, out, stride);
    for (; at < width; at += 32) mix<R, 1>(p, values, cells, at, std::min(32, width - at), out, stride);
}
#endif

}  // namespace paged
