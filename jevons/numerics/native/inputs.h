// Activations in the form that a kind of weight multiplies: padded with zeros, split or quantised, once per call.
#pragma once
#include "common.h"

// FLOATS: float32. SPLIT: one or two bf16 numbers whose sum is x to 16 bits (float32 inputs take two). SPLIT_FP8: the same in the
// order in which FP8 codes unfold. GROUPS: 16-bit integers with a float scale for each group of columns.
enum Form { FLOATS, SPLIT, SPLIT_FP8, GROUPS };

static inline Form form_of(const Weight& w) {
  if (w.kind >= INT8) return GROUPS;
#if defined(DOT_BF16)
  if (w.kind == BF16) return SPLIT;
#endif
#if defined(TABLE_FP8)
  if (w.kind == FP8) return SPLIT_FP8;
#endif
  return FLOATS;
}

struct Inputs {
  Form form;
  int64_t columns, width;  // width: padded columns
  int64_t stride;          // bytes from row to row
  int64_t group, groups;
  int planes;
  uint8_t* data;
  float* scale;     // GROUPS: [rows, groups]
  int32_t* offset;  // GROUPS: what the codes' bias adds to a group's sum, negated

  const uint8_t* row(int64_t m) const { return data + m * stride; }
};

// Room that grows and is kept, so that a call allocates nothing.
struct Room {
  std::vector<uint8_t> data, scale, offset;
};

static Inputs make_inputs(const Weight& w, bool bf16, int64_t rows, Room& room) {
  Inputs in = {};
  in.form = form_of(w);
  in.columns = w.columns;
  in.group = in.form == GROUPS ? w.group : BLOCK;
  in.width = ceil_div(w.columns, in.group) * in.group;
  in.groups = in.width / in.group;
  in.planes = in.form == FLOATS || (in.form != GROUPS && bf16) ? 1 : 2;
  in.stride = in.width * (in.form == FLOATS ? 4 : in.form == GROUPS ? 2 : 2 * in.planes);
  auto aligned = [](std::vector<uint8_t>& v, int64_t bytes) {
    if ((int64_t)v.size() < bytes + 64) v.resize(bytes + 64);
    return v.data() + (64 - (uintptr_t)v.data() % 64) % 64;
  };
  in.data = aligned(room.data, rows * in.stride);
  if (in.form == GROUPS) {
    in.scale = (float*)aligned(room.scale, rows * in.groups * 4);
    in.offset = (int32_t*)aligned(room.offset, rows * in.groups * 4);
  }
  return in;
}

// One group of a row: x is about (256 high + low) * scale, or NaN where it holds a number that is not finite.
static void quantise_group(const Inputs& in, int64_t m, int64_t g, const uint8_t* x, bool bf16, int32_t bias) {
  const int64_t first = g * in.group, size = bf16 ? 2 : 4;
  f32x16 magnitude = {}, poison = {};
  for (int64_t k = first; k < first + in.group; k += 16) {
    f32x16 v = load_numbers(x + k * size, bf16, std::max<int64_t>(0, in.columns - k));
    f32x16 a = (f32x16)((u32x16)v & 0x7FFFFFFF);
    poison += v * 0.0f;  // stays zero unless v is not finite
    magnitude = a > magnitude ? a : magnitude;
  }
  float top = largest(magnitude), bad = sum(poison);
  float scale = top / 32512.0f, inverse = top > 1e-30f ? 32512.0f / top : 0.0f;
  if (bad != 0.0f || bad != bad) scale = std::numeric_limits<float>::quiet_NaN(), inverse = 0.0f;
  in.scale[m * in.groups + g] = scale;
  uint8_t* row = in.data + m * in.stride;
  i32x16 total = {};
  for (int64_t k = first; k < first + in.group; k += 16) {
    f32x16 v = load_numbers(x + k * size, bf16, std::max<int64_t>(0, in.columns - k));
    v = inverse == 0.0f ? f32x16{} : v * inverse;
    // rounded to the nearest by the float that has no room for fractions
    i32x16 q = __builtin_convertvector((v + 12582912.0f) - 12582912.0f, i32x16);
    total += q;
#if defined(DOT_BYTES)
    typedef int8_t i8x16 __attribute__((vector_size(16)));
    i32x16 high = (q + 128) >> 8;
    store(row + k, __builtin_convertvector(high, i8x16));
    store(row + in.width + k, __builtin_convertvector(q - (high << 8), i8x16));
#else
    typedef int16_t i16x16 __attribute__((vector_size(32)));
    store(row + 2 * k, __builtin_convertvector(q, i16x16));
#endif
  }
  int32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += total[i];
  in.offset[m * in.groups + g] = -bias * sum;
}

static void fill_row(const Inputs& in, int64_t m, const uint8_t* x, bool bf16, const Weight& w) {
  const int64_t size = bf16 ? 2 : 4;
  uint8_t* row = in.data + m * in.stride;
  if (in.form == GROUPS) {
    for (int64_t g = 0; g < in.groups; g++) quantise_group(in, m, g, x, bf16, w.kind == INT8 ? 128 : 8);
    return;
  }
  for (int64_t k = 0; k < in.width; k += 16) {
    f32x16 v = load_numbers(x + k * size, bf16, std::max<int64_t>(0, in.columns - k));
    if (in.form == FLOATS) {
      store(row + 4 * k, v);
      continue;
    }
    for (int p = 0; p < in.planes; p++) {
      u16x16 part = to_bf16(v);
      v -= from_bf16(part);
      uint8_t* plane = row + p * 2 * in.width;
      if (in.form == SPLIT) {
        store(plane + 2 * k, part);
      } else {  // eight numbers from every 16 codes unfold into the first half of a 64, the other eight into the second
        const int64_t base = k / 64 * 64, j = k % 64 / 16;
        memcpy(plane + 2 * (base + 8 * j), &part, 16);
        memcpy(plane + 2 * (base + 32 + 8 * j), (const uint8_t*)&part + 16, 16);
      }
    }
  }
}

static inline void copy_row(const Inputs& in, int64_t from, int64_t to) {
  memcpy(in.data + to * in.stride, in.row(from), in.stride);
  if (in.form != GROUPS) return;
  memcpy(in.scale + to * in.groups, in.scale + from * in.groups, in.groups * 4);
  memcpy(in.offset + to * in.groups, in.offset + from * in.groups, in.groups * 4);
}

// Rows panel * 16 and the fifteen after it, times the input rows at[0..count): out[i * PANEL + r]. In rows.cpp.
void multiply_panel(const Weight& w, int64_t panel, const Inputs& in, const int64_t* at, int64_t count, float* out);

static inline int64_t panel_bytes(const Weight& w) {
  static const int bits[] = {32, 16, 8, 8, 4};
  return PANEL * w.columns * bits[w.kind] / 8;
}
