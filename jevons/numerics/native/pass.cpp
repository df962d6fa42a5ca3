// A whole pass over a network for few tokens: one call from Python, where a dozen a block would take longer than the work itself.
// It calls the other kernels in the order of jevons/model/network.py, rounds where torch rounds, and allocates nothing.
#include "kernels.h"
#include "pool.h"

// -- a network, mirrored by jevons/model/native_pass.py --------------------------------------------------------------------------

struct Projection {
  const Weight* parts;  // one below the other
  int64_t count, rows;
  void* bias;
  int32_t bias_bf16;
};

struct Norm {
  void* weight;
  int32_t bf16;
  float epsilon;
};

struct Block {
  Norm before, between;  // before attention, and before the MLP
  Projection qkv, q_b, output;
  // latent attention: `qkv` gives [q_rank | latent | rotary] or, q_rank 0, the queries in its first part's place
  Norm q_norm, kv_norm;
  int64_t q_rank, latent, nope, value;  // latent 0: grouped queries, keys and values
  void* kv;                             // [heads, nope + value, latent]
  int32_t kv_bf16, gate_bf16;
  paged::Heads heads;
  // a mixture, or, with choice.k 0, the one MLP `shared`
  void* gate;
  const float* gate_bias;
  Choice choice;
  Routed routed;
  const Expert* shared;
};

struct Call {
  const int64_t *tokens, *positions;
  void* embedding;    // [vocabulary, dim]; null: x comes as it is
  void* x;            // [n, dim]: hidden states, overwritten
  void* out;          // [n, dim]: normed
  const float* rope;  // [positions, rotary]
  uint8_t* cache;     // the first block's layer
  const paged::Batch* batch;
  int64_t n, dim, cache_stride, pages;  // bytes from layer to layer
  int32_t bf16, cell_bf16;
  Norm last;
};

namespace {
struct Scratch {
  std::vector<uint8_t> normed, qkv, ranked, query, absorbed, seen, heads, added;
  std::vector<float> rope, weights, load;
  std::vector<int64_t> chosen, rows;
};

const int64_t APART = 1 << 16;  // elements from which threads share norms and sums

void* room(std::vector<uint8_t>& v, int64_t bytes) {
  if ((int64_t)v.size() < bytes) v.resize(bytes);
  return v.data();
}

struct Pass {
  const Call& c;
  Scratch& s;
  int64_t size;  // bytes of an activation

  uint8_t* at(void* p, int64_t elements) const { return (uint8_t*)p + elements * size; }

  template <class F>
  void each_token(int64_t width, const F& work) const {
    Pool::get().run(c.n, 8, c.n * width >= APART ? omp_get_max_threads() : 1, work);
  }

  void norm(const Norm& norm, void* from, int64_t stride, int64_t width, void* to) const {
    each_token(width, [&](int64_t m) {
      jevons_rms_norm(at(from, m * stride), stride, c.bf16, 1, width, norm.weight, norm.bf16, norm.epsilon, at(to, m * width));
    });
  }

  void project(const Projection& p, void* from, int64_t stride, void* to) const {
    jevons_linear(p.parts, p.count, from, stride, c.bf16, c.n, p.bias, p.bias_bf16, to);
  }

  // x += y, then normed.
  void add_and_norm(void* y, const Norm& next, void* to) const {
    each_token(c.dim, [&](int64_t m) {
      uint8_t *x = at(c.x, m * c.dim), *from = at(y, m * c.dim);
      for (int64_t k = 0; k < c.dim; k += 16) {
        const f32x16 sum = load_numbers(x + k * size, c.bf16, c.dim - k) + load_numbers(from + k * size, c.bf16, c.dim - k);
        store_numbers(x + k * size, c.bf16, sum, c.dim - k);
      }
      jevons_rms_norm(x, c.dim, c.bf16, 1, c.dim, next.weight, next.bf16, next.epsilon, at(to, m * c.dim));
    });
  }

  int attend(const Block& b, void* layer, void* to) const {
    const paged::Heads& h = b.heads;
    const int64_t key = b.nope + h.rotary, count = h.heads;
    void* qkv = room(s.qkv, c.n * b.qkv.rows * size);
    project(b.qkv, s.normed.data(), c.dim, qkv);
    if (!b.latent) {
      const int64_t keys = count * h.rotary, values = keys + h.groups * h.rotary, all = b.qkv.rows;
      void* seen = room(s.seen, c.n * keys * size);
      if (paged_store(&h, c.batch, c.bf16, at(qkv, values), all, at(qkv, keys), all, h.rotary, 0, nullptr, s.rope.data(), c.cell_bf16,
                      layer, c.pages))
        return 1;
      paged_attention(&h, c.batch, c.bf16, qkv, all, h.rotary, qkv, all, h.rotary, s.rope.data(), c.cell_bf16, layer, c.pages, seen,
                      keys, h.rotary);
      project(b.output, seen, keys, to);
      return 0;
    }
    void* query = qkv;
    int64_t stride = b.qkv.rows, first = b.q_rank ? b.q_rank : count * key;
    if (b.q_rank) {
      void* ranked = room(s.ranked, c.n * b.q_rank * size);
      norm(b.q_norm, qkv, stride, b.q_rank, ranked);
      query = room(s.query, c.n * count * key * size);
      project(b.q_b, ranked, b.q_rank, query);
    }
    if (paged_store(&h, c.batch, c.bf16, at(qkv, first), stride, at(qkv, first + b.latent), stride, 0, b.kv_norm.bf16, b.kv_norm.weight,
                    s.rope.data(), c.cell_bf16, layer, c.pages))
      return 1;
    if (b.q_rank) stride = count * key;
    const int64_t wide = count * b.latent, narrow = count * b.value, matrix = (b.nope + b.value) * b.latent;
    void *absorbed = room(s.absorbed, c.n * wide * size), *seen = room(s.seen, c.n * wide * size);
    void* heads = room(s.heads, c.n * narrow * size);
    multiply_heads({query, stride, key, absorbed, wide, b.latent, c.n, count, b.nope, b.latent, b.kv, matrix, c.bf16, b.kv_bf16, true});
    paged_attention(&h, c.batch, c.bf16, absorbed, wide, b.latent, at(query, b.nope), stride, key, s.rope.data(), c.cell_bf16, layer,
                    c.pages, seen, wide, b.latent);
    const uint8_t* w_v = (const uint8_t*)b.kv + b.nope * b.latent * (b.kv_bf16 ? 2 : 4);
    multiply_heads({seen, wide, b.latent, heads, narrow, b.value, c.n, count, b.latent, b.value, w_v, matrix, c.bf16, b.kv_bf16, false});
    project(b.output, heads, narrow, to);
    return 0;
  }

  void feed(const Block& b, void* to) const {
    Routed routed = b.routed;
    if (b.choice.k) {
      s.chosen.resize(c.n * b.choice.k), s.weights.resize(c.n * b.choice.k);
      s.rows.resize(b.choice.experts), s.load.resize(b.choice.experts);
      jevons_gate(&b.choice, s.normed.data(), c.dim, c.bf16, c.n, c.dim, b.gate, b.gate_bf16, b.gate_bias, s.chosen.data(),
                  s.weights.data(), s.rows.data(), s.load.data());
      routed.chosen = s.chosen.data(), routed.weights = s.weights.data();
    }
    jevons_experts(b.choice.k ? &routed : nullptr, b.shared, s.normed.data(), c.dim, c.bf16, c.n, to);
  }

  int run(const Block* blocks, int64_t count) const {
    const int64_t rotary = blocks[0].heads.rotary;
    s.rope.resize(c.n * rotary);
    for (int64_t m = 0; m < c.n; m++) {
      memcpy(&s.rope[m * rotary], c.rope + c.positions[m] * rotary, rotary * 4);
      if (c.embedding) memcpy(at(c.x, m * c.dim), at(c.embedding, c.tokens[m] * c.dim), c.dim * size);
    }
    void *normed = room(s.normed, c.n * c.dim * size), *added = room(s.added, c.n * c.dim * size);
    norm(blocks[0].before, c.x, c.dim, c.dim, normed);
    for (int64_t i = 0; i < count; i++) {
      const Block& b = blocks[i];
      if (attend(b, c.cache + i * c.cache_stride, added)) return 1;
      add_and_norm(added, b.between, normed);
      feed(b, added);
      const bool last = i + 1 == count;
      add_and_norm(added, last ? c.last : blocks[i + 1].before, last ? c.out : normed);
    }
    return 0;
  }
};
}  // namespace

// Returns 0, or 1 where the page table leads outside the cache. Tokens and positions must be within their tables.
extern "C" int32_t jevons_pass(const Block* blocks, int64_t count, const Call* call) {
  static thread_local Scratch own;
  return Pass{*call, own, call->bf16 ? 2 : 4}.run(blocks, count);
}
