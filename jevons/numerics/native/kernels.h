// The kernels as C++ sees them, and the records that describe their work; Python mirrors both (numerics/).
#pragma once
#include "common.h"

// How a gate chooses (model/moe.py). `groups` 1: among all experts.
struct Choice {
  int64_t experts, k, groups, kept;
  int32_t softmax, normalise;
  float scale;
};

// down(silu(gate x) * up x)
struct Expert {
  Weight gate, up, down;
};

// The choice of each of n tokens: k of `count` experts with their weights. `experts` is one an expert, or, with strides (bytes
// from expert to expert of each codes), the first of a stack.
struct Routed {
  const Expert* experts;
  int64_t count, k;
  int64_t stride[3];
  const int64_t* chosen;
  const float* weights;

  Expert at(int64_t e) const {
    if (stride[0] == 0) return experts[e];
    Expert one = experts[0];
    one.gate.codes += e * stride[0], one.up.codes += e * stride[1], one.down.codes += e * stride[2];
    return one;
  }
};

namespace paged {

// What one layer's heads read of a cell. Key and value of group g begin at key_at + g * key_step, value_at + g * value_step.
struct Heads {
  int64_t heads, groups;         // query heads, and the keys they share
  int64_t plain, rotary, value;  // a key is `plain` elements, then `rotary` rotated ones; width of a value
  int64_t cell;                  // elements of a cell
  int64_t key_at, key_step, value_at, value_step;
  int64_t adjacent;              // rotated pairs are dims 2i, 2i + 1 (then de-interleaved), else i, i + rotary / 2
  float scale, epsilon;
};

// Sequence s brings tokens starts[s] .. starts[s + 1] at positions contexts[s] ...
struct Batch {
  int64_t sequences, page_size, table_width, table_stride;
  const int64_t *table, *starts, *contexts;
};

}  // namespace paged

// Head by head: x[token, head] of `in` numbers times w[head], [out, in] or, `across`, [in, out]; to y[token, head]. Strides in
// elements; x and y have one precision.
struct HeadProduct {
  const void* x;
  int64_t x_token, x_head;
  void* y;
  int64_t y_token, y_head;
  int64_t n, heads, in, out;
  const void* w;
  int64_t w_head;
  int32_t bf16, w_bf16, across;
};
void multiply_heads(const HeadProduct& p);

extern "C" {
void jevons_linear(const Weight* parts, int32_t count, void* x, int64_t stride, int32_t bf16, int64_t rows, void* bias,
                   int32_t bias_bf16, void* y);
void jevons_rms_norm(void* from, int64_t stride, int32_t bf16, int64_t rows, int64_t dim, void* weight, int32_t weight_bf16,
                     float eps, void* to);
void jevons_gate(const Choice* choice, void* from, int64_t stride, int32_t bf16, int64_t n, int64_t dim, void* weight,
                 int32_t weight_bf16, const float* bias, int64_t* chosen, float* weights, int64_t* rows, float* load_E);
void jevons_experts(const Routed* routed, const Expert* shared, void* from, int64_t stride, int32_t bf16, int64_t n, void* to);
void jevons_draw(void* logits, int64_t stride, int32_t bf16, int64_t n, int64_t vocabulary, const float* temperature,
                 const float* top_p, const uint64_t* seeds, const int64_t* positions, int64_t* tokens, float* logprobs);
int paged_store(const paged::Heads* h, const paged::Batch* b, int from_type, void* values, int64_t values_token, void* rotary,
                int64_t rotary_token, int64_t rotary_head, int norm_type, const void* norm, const float* rope, int cell_type,
                void* layer, int64_t pages);
int paged_attention(const paged::Heads* h, const paged::Batch* b, int from_type, void* plain, int64_t plain_token,
                    int64_t plain_head, void* rotary, int64_t rotary_token, int64_t rotary_head, const float* rope, int cell_type,
                    const void* layer, int64_t pages, void* out, int64_t out_token, int64_t out_head);
}
