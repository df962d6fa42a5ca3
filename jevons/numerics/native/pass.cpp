// A whole pass over a network for few tokens: one call from Python, where a dozen a block would take longer than the work itself.
// With the head and the draw of tokens behind it, it is a decode step; with the MTP module before it, repeated, it drafts.
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

// The MTP module's way in: project [norm(embedding of the next token) | norm(hidden state)].
struct Merge {
  Norm embedding, hidden;
  Projection project;
};

struct Call {
  const int64_t *tokens, *positions;
  void* embedding;    // [vocabulary, dim]
  void* x;            // [n, dim]: hidden states, overwritten; null: tokens are embedded
  void* out;          // [n, dim]: normed
  const float* rope;  // [length, rotary]
  uint8_t* cache;     // the first block's layer
  const paged::Batch* batch;
  int64_t n, dim, vocabulary, length, cache_stride, pages;  // bytes from layer to layer
  int32_t bf16, cell_bf16;
  Norm last;
};

// The engine's rows: each has pages, and says how its tokens are drawn.
struct Rows {
  const int64_t* table;
  int64_t width, stride;
  const float *temperature, *top_p;
  const uint64_t* seeds;
};

// Sequence s brings counts[s] tokens, from position contexts[s] on, and belongs to row rows[s].
struct Step {
  int64_t sequences, page_size;
  const int64_t *contexts, *counts, *rows;
  const Rows* all;
  Projection head;
  void* logits;  // [n, vocabulary], and what is drawn from them; a draft needs none of these
  int64_t* drawn;
  float* logprobs;
  int64_t picks;  // where `picked` is not null, so many of the n tokens have logits, and a step has no draft
  const int64_t* picked;
};

// wanted[s] drafts of each sequence, the rest of its `most` as they are. Its last token's state is row last[s] of `hidden`, those
// of the tokens before it lie before.
struct Draft {
  const Block* block;
  const Merge* way;
  const Call* call;  // over the module's own cache
  void* hidden;
  const int64_t *last, *wanted;
  int64_t most;
  int64_t* drafts;
};

enum Outcome : int32_t { DONE, NO_PAGE, OUTSIDE };

namespace {
struct Scratch {
  std::vector<uint8_t> x, out, normed, qkv, ranked, query, absorbed, seen, heads, added, pairs, picked, logits;
  std::vector<float> rope, weights, load, heat, top_p, logprobs;
  std::vector<int64_t> chosen, rows, starts, positions, table, next;
  std::vector<int64_t> live, from, rows_of, contexts, ones, tokens;  // of a draft
  std::vector<int64_t> counts, last, wanted, follow;                 // of the tokens that a step has accepted
  std::vector<uint64_t> seeds;

  static Scratch& own() {
    static thread_local Scratch scratch;
    return scratch;
  }
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

  uint8_t* embedding(int64_t m) const { return at(c.embedding, c.tokens[m] * c.dim); }

  bool within() const {
    for (int64_t m = 0; m < c.n; m++)
      if (c.positions[m] < 0 || c.positions[m] >= c.length || (c.tokens && (c.tokens[m] < 0 || c.tokens[m] >= c.vocabulary))) return false;
    return true;
  }

  // `rows` of `hidden` and the tokens' embeddings, to `to`.
  void merge(const Merge& way, void* hidden, const int64_t* rows, void* to) const {
    void* pairs = room(s.pairs, c.n * 2 * c.dim * size);
    each_token(2 * c.dim, [&](int64_t m) {
      const Norm &first = way.embedding, &second = way.hidden;
      jevons_rms_norm(embedding(m), c.dim, c.bf16, 1, c.dim, first.weight, first.bf16, first.epsilon, at(pairs, 2 * m * c.dim));
      jevons_rms_norm(at(hidden, rows[m] * c.dim), c.dim, c.bf16, 1, c.dim, second.weight, second.bf16, second.epsilon,
                      at(pairs, (2 * m + 1) * c.dim));
    });
    project(way.project, pairs, 2 * c.dim, to);
  }

  Outcome run(const Block* blocks, int64_t count) const {
    const int64_t rotary = blocks[0].heads.rotary;
    s.rope.resize(c.n * rotary);
    for (int64_t m = 0; m < c.n; m++) memcpy(&s.rope[m * rotary], c.rope + c.positions[m] * rotary, rotary * 4);
    void *normed = room(s.normed, c.n * c.dim * size), *added = room(s.added, c.n * c.dim * size);
    norm(blocks[0].before, c.x, c.dim, c.dim, normed);
    for (int64_t i = 0; i < count; i++) {
      const Block& b = blocks[i];
      if (attend(b, c.cache + i * c.cache_stride, added)) return NO_PAGE;
      add_and_norm(added, b.between, normed);
      feed(b, added);
      const bool last = i + 1 == count;
      add_and_norm(added, last ? c.last : blocks[i + 1].before, last ? c.out : normed);
    }
    return DONE;
  }
};

Outcome run_tokens(Call call, const Block* blocks, int64_t count) {
  Scratch& s = Scratch::own();
  const int64_t size = call.bf16 ? 2 : 4;
  const bool embed = !call.x;
  if (embed) call.x = room(s.x, call.n * call.dim * size);
  const Pass pass{call, s, size};
  if (!pass.within()) return OUTSIDE;
  for (int64_t m = 0; embed && m < call.n; m++) memcpy(pass.at(call.x, m * call.dim), pass.embedding(m), call.dim * size);
  return pass.run(blocks, count);
}

// Where tokens belong: sequence i brings counts[i], from position contexts[i] on, and has row rows[i]. Pages are copied as far as
// they are needed; positions lie in the scratch.
paged::Batch lay(const Step& step, int64_t sequences, const int64_t* rows, const int64_t* contexts, const int64_t* counts) {
  Scratch& s = Scratch::own();
  const Rows& all = *step.all;
  int64_t width = 1;
  s.starts.assign(1, 0), s.positions.clear();
  for (int64_t i = 0; i < sequences; i++) {
    for (int64_t k = 0; k < counts[i]; k++) s.positions.push_back(contexts[i] + k);
    s.starts.push_back(s.positions.size());
    width = std::max(width, ceil_div(contexts[i] + counts[i], step.page_size));
  }
  width = std::min(width, all.width);
  s.table.resize(sequences * width);
  for (int64_t i = 0; i < sequences; i++) memcpy(&s.table[i * width], all.table + rows[i] * all.stride, width * 8);
  return {sequences, step.page_size, width, width, s.table.data(), s.starts.data(), contexts};
}

void head(const Step& step, const Call& call, void* hidden, int64_t n, void* logits) {
  jevons_linear(step.head.parts, step.head.count, hidden, call.dim, call.bf16, n, step.head.bias, step.head.bias_bf16, logits);
}

// A token for each of n rows of logits: the one that follows position at[i], as row rows[i] draws it.
void draw(const Step& step, const Call& call, void* logits, int64_t n, const int64_t* rows, const int64_t* at, int64_t* tokens,
          float* logprobs) {
  Scratch& s = Scratch::own();
  s.heat.resize(n), s.top_p.resize(n), s.seeds.resize(n), s.next.resize(n);
  for (int64_t i = 0; i < n; i++) {
    s.heat[i] = step.all->temperature[rows[i]], s.top_p[i] = step.all->top_p[rows[i]];
    s.seeds[i] = step.all->seeds[rows[i]], s.next[i] = at[i] + 1;
  }
  jevons_draw(logits, step.head.rows, call.bf16, n, step.head.rows, s.heat.data(), s.top_p.data(), s.seeds.data(), s.next.data(), tokens,
              logprobs);
}

// The MTP module over the hidden states of a step's tokens and the `tokens` after them, then over its own states and what it drew.
Outcome run_drafts(const Step& step, const Draft& draft, const int64_t* tokens) {
  Scratch& s = Scratch::own();
  Call call = *draft.call;
  call.tokens = tokens;
  const int64_t width = call.dim * (call.bf16 ? 2 : 4);
  void* hidden = draft.hidden;
  const int64_t* counts = step.counts;
  s.live.clear(), s.from.clear();
  s.rows_of.assign(step.rows, step.rows + step.sequences), s.contexts.assign(step.contexts, step.contexts + step.sequences);
  for (int64_t i = 0; i < step.sequences; i++) {
    s.live.push_back(i);
    for (int64_t k = counts[i]; k > 0; k--) s.from.push_back(draft.last[i] - k + 1);
  }
  for (int64_t depth = 0; !s.live.empty(); depth++) {
    const paged::Batch batch = lay(step, s.live.size(), s.rows_of.data(), s.contexts.data(), counts);
    call.batch = &batch, call.positions = s.positions.data(), call.n = s.positions.size();
    call.x = room(s.x, call.n * width), call.out = room(s.out, call.n * width);
    const Pass pass{call, s, call.bf16 ? 2 : 4};
    if (!pass.within()) return OUTSIDE;
    pass.merge(*draft.way, hidden, s.from.data(), call.x);
    if (const Outcome outcome = pass.run(draft.block, 1)) return outcome;
    size_t going = 0;
    hidden = room(s.picked, s.live.size() * width);
    for (size_t i = 0; i < s.live.size(); i++) {
      if (draft.wanted[s.live[i]] <= depth) continue;
      memcpy((uint8_t*)hidden + going * width, (uint8_t*)call.out + (s.starts[i + 1] - 1) * width, width);
      s.live[going] = s.live[i], s.rows_of[going] = s.rows_of[i], s.contexts[going++] = s.positions[s.starts[i + 1] - 1] + 1;
    }
    s.live.resize(going), s.tokens.resize(going), s.logprobs.resize(going), s.ones.assign(going, 1), s.from.resize(going);
    if (!going) break;
    void* logits = room(s.logits, going * step.head.rows * (width / call.dim));
    head(step, call, hidden, going, logits);
    draw(step, call, logits, going, s.rows_of.data(), s.contexts.data(), s.tokens.data(), s.logprobs.data());
    counts = s.ones.data(), going = 0;
    for (size_t i = 0; i < s.live.size(); i++) {  // the last draft's state is nobody's
      draft.drafts[s.live[i] * draft.most + depth] = s.tokens[i];
      if (draft.wanted[s.live[i]] <= depth + 1) continue;
      s.from[going] = i, s.tokens[going] = s.tokens[i];
      s.live[going] = s.live[i], s.rows_of[going] = s.rows_of[i], s.contexts[going++] = s.contexts[i];
    }
    s.live.resize(going), call.tokens = s.tokens.data();
  }
  return DONE;
}
}  // namespace

// Tokens and positions may lie outside their tables, and pages outside the cache: then it says so.
extern "C" int32_t jevons_pass(const Block* blocks, int64_t count, const Call* call) { return run_tokens(*call, blocks, count); }

// The same for a step's tokens, with logits and a token drawn for each. Given a `draft`, each sequence's tokens but the first
// are drafts: those are accepted that are what was drawn, and new ones are made, wanted[s] less those accepted.
extern "C" int32_t jevons_step(const Block* blocks, int64_t count, const Call* given, const Step* step, const Draft* draft) {
  Scratch& s = Scratch::own();
  Call call = *given;
  const paged::Batch batch = lay(*step, step->sequences, step->rows, step->contexts, step->counts);
  call.batch = &batch, call.positions = s.positions.data();
  if (const Outcome outcome = run_tokens(call, blocks, count)) return outcome;
  void* hidden = call.out;
  int64_t n = call.n;
  s.from.clear();
  for (int64_t i = 0; i < step->sequences; i++) s.from.insert(s.from.end(), step->counts[i], step->rows[i]);
  if (step->picked) {
    const int64_t width = call.dim * (call.bf16 ? 2 : 4);
    n = step->picks, hidden = room(s.picked, n * width);
    for (int64_t i = 0; i < n; i++) {  // picked is in order: what is overwritten was read
      const int64_t at = step->picked[i];
      memcpy((uint8_t*)hidden + i * width, (uint8_t*)call.out + at * width, width);
      s.from[i] = s.from[at], s.positions[i] = s.positions[at];
    }
  }
  if (n) head(*step, call, hidden, n, step->logits);
  if (n) draw(*step, call, step->logits, n, s.from.data(), s.positions.data(), step->drawn, step->logprobs);
  if (!draft) return DONE;
  s.counts.clear(), s.last.clear(), s.wanted.clear(), s.follow.clear();
  for (int64_t i = 0, at = 0; i < step->sequences; at += step->counts[i++]) {
    int64_t right = 0;
    while (right + 1 < step->counts[i] && call.tokens[at + right + 1] == step->drawn[at + right]) right++;
    s.counts.push_back(right + 1), s.last.push_back(at + right);
    s.wanted.push_back(std::clamp<int64_t>(draft->wanted[i] - right, 0, draft->most));
    s.follow.insert(s.follow.end(), step->drawn + at, step->drawn + at + right + 1);
  }
  Step accepted = *step;
  Draft next = *draft;
  accepted.counts = s.counts.data();
  next.hidden = call.out, next.last = s.last.data(), next.wanted = s.wanted.data();
  return run_drafts(accepted, next, s.follow.data());
}

// Drafts after a step's tokens, given the tokens that follow them.
extern "C" int32_t jevons_draft(const Step* step, const Draft* draft) {
  return run_drafts(*step, *draft, draft->call->tokens);
}

