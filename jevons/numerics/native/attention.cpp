// Attention straight from a paged cache, whatever order the pages lie in: `paged_store` writes a call's new cells,
// `paged_attention` lets its queries see all cells up to their own position. jevons/numerics/paged.py calls both.
//
// Online softmax over tiles of cells: a block of up to 64 rows (queries x the heads that share a key) goes over the cells
// once, so a cell is loaded once for all its heads and no score matrix is ever held. A sequence's context is cut into spans
// that depend on its own length alone; whether spans run one after the other or on several threads, their parts are
// merged in the same order. So a decoded token's numbers do not depend on what else is in the batch, nor on threads.
//
// Cells are float32 or bf16. bf16 queries over bf16 cells are multiplied in pairs where the processor can (AVX512_BF16);
// everything else is float32. Sums are float32 always.

#include <utility>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "tiles.h"

namespace paged {

// Whether every page that the call reads or writes is one of the cache's.
inline bool pages_exist(const Batch& b, int64_t pages) {
    for (int64_t s = 0; s < b.sequences; s++) {
        const int64_t count = (b.contexts[s] + b.starts[s + 1] - b.starts[s] + b.page_size - 1) / b.page_size;
        if (b.contexts[s] < 0 || count > b.table_width) return false;
        for (int64_t i = 0; i < count; i++) {
            const int64_t page = b.table[s * b.table_stride + i];
            if (page < 0 || page >= pages) return false;
        }
    }
    return true;
}

// A [token, head, width] view whose last dimension is dense.
struct View {
    void* data;
    int64_t token, head;  // strides in elements
};

constexpr int BLOCK = 64;  // rows of one pass
constexpr int SPAN = 512;  // cells of a span; longer contexts have longer ones, MAX_SPANS at most
constexpr int MAX_SPANS = 16;
constexpr int64_t ALONE = 1 << 20;  // products up to which waking another thread costs more than it gives
constexpr float LOG2_E = 1.44269504f;

// f(height) with ROWS, or what is left of the rows, as a number that the compiler knows.
template <class F>
inline void in_registers(int left, F f) {
    if (left >= ROWS) return f(std::integral_constant<int, ROWS>());
    if (ROWS > 3 && left == 3) return f(std::integral_constant<int, 3>());
    if (ROWS > 2 && left == 2) return f(std::integral_constant<int, 2>());
    f(std::integral_constant<int, 1>());
}

// -- a block of rows over a range of cells -------------------------------------------------------------------------------

struct Rows {  // the running softmax of a block's rows
    int count = 0;
    int64_t limit[BLOCK];           // cells a row may see: those of positions under this
    float top[BLOCK], sum[BLOCK];   // highest score so far, times log2 e; sum of 2^(score - top)
    float* out = nullptr;           // [count, stride], not yet divided by sum

    void clear(int64_t stride) {
        std::fill(top, top + count, -INFINITY);
        std::fill(sum, sum + count, 0.0f);
        std::fill(out, out + count * stride, 0.0f);
    }
};

// Scores s[0 .. cells] of one row become weights, 0 up to a whole vector; what the row holds is scaled to the new maximum.
inline void weigh(float* s, int cells, float scale, float& top, float& sum, float* out, int64_t stride) {
    const int padded = round_up(cells, LANES);
    std::fill(s + cells, s + padded, -INFINITY);
    Vec high = load(s), total = {};
    for (int c = LANES; c < padded; c += LANES) {
        Vec x = load(s + c);
        high = x > high ? x : high;
    }
    const float best = std::max(highest_lane(high) * scale, top);
    for (int c = 0; c < padded; c += LANES) {
        Vec x = exp2(load(s + c) * scale - best);
        put(s + c, x);
        total += x;
    }
    if (best != top && top != -INFINITY) {
        const float shrink = std::exp2(top - best);
        sum *= shrink;
        for (int64_t v = 0; v < stride; v += LANES) put(out + v, load(out + v) * shrink);
    }
    top = best;
    sum += sum_lanes(total);
}

template <class Cell>
struct Cells {  // a sequence's cells in one layer
    const Cell* layer;
    const int64_t* pages;
    int64_t page_size, width;

    void find(int64_t from, int count, const Cell** to) const {
        int64_t page = from / page_size, offset = from % page_size;
        for (int c = 0; c < count; c++) {
            to[c] = layer + (pages[page] * page_size + offset) * width;
            if (++offset == page_size) offset = 0, page++;
        }
    }
};

template <class Cell>
inline void prefetch(const Cell* p, int64_t count) {  // into the second-level cache
    for (int64_t i = 0; i < count; i += 64 / sizeof(Cell)) __builtin_prefetch(p + i, 0, 2);
}

// `after(cells)` names the first cells that the thread will want next, and their number: they are fetched meanwhile. The
// hardware does not foresee them, for a page may lie anywhere.
template <class Q, class Cell, class After>
void attend_span(const Heads& h, const Q* q, int64_t q_stride, const Cells<Cell>& cells, int64_t key_at, int64_t value_at,
                 int64_t begin, int64_t end, Rows& rows, int64_t stride, After after) {
    alignas(64) float s[BLOCK * TILE];
    alignas(64) Q narrowed[std::is_same<Q, bf16>::value ? BLOCK * TILE : 1];
    const Cell *keys[TILE], *values[TILE], *ahead[TILE];
    const int width = h.plain + h.rotary;
    rows.clear(stride);
    for (int64_t from = begin; from < end; from += TILE) {
        const int count = std::min<int64_t>(TILE, end - from), padded = round_up(count, CELLS);
        cells.find(from, count, keys);
        for (int c = count; c < padded; c++) keys[c] = keys[c - 1];  // stands in for what is not there; its weight is 0
        for (int c = 0; c < padded; c++) values[c] = keys[c] + value_at, keys[c] += key_at;
        int coming = std::min<int64_t>(TILE, end - from - count), fetched = 0;
        if (coming) cells.find(from + count, coming, ahead);
        else coming = after(ahead);
        for (int r = 0; r < rows.count; r += ROWS)
            in_registers(rows.count - r, [&](auto height) {
                for (int c = 0; c < padded; c += CELLS) {
                    for (const int until = std::min(coming, fetched + 2 * CELLS); fetched < until; fetched++) {
                        prefetch(ahead[fetched] + key_at, width);
                        if (value_at >= key_at + width) prefetch(ahead[fetched] + value_at, h.value);
                    }
                    score<height.value>(q + r * q_stride, q_stride, keys + c, width, s + r * TILE + c);
                }
            });
        for (int r = 0; r < rows.count; r++) {
            const int seen = std::min<int64_t>(count, rows.limit[r] - from);
            if (seen > 0) weigh(s + r * TILE, seen, h.scale * LOG2_E, rows.top[r], rows.sum[r], rows.out + r * stride, stride);
            for (int c = std::max(seen, 0); c < padded; c++) s[r * TILE + c] = 0;
            if constexpr (std::is_same<Q, bf16>::value) narrow_tile(s + r * TILE, narrowed + r * TILE);
        }
        const Q* p = narrowed;
        if constexpr (std::is_same<Q, float>::value) p = s;
        for (int r = 0; r < rows.count; r += ROWS)
            in_registers(rows.count - r, [&](auto height) {
                mix_width<height.value>(p + r * TILE, values, count, h.value, rows.out + r * stride, stride);
            });
    }
}

// total += part: two softmaxes over different cells of the same rows.
inline void merge(const Rows& part, Rows& total, int64_t stride) {
    for (int r = 0; r < part.count; r++) {
        if (part.sum[r] == 0) continue;  // it saw nothing there
        const float top = std::max(total.top[r], part.top[r]);
        const float a = std::exp2(total.top[r] - top), b = std::exp2(part.top[r] - top);
        float *to = total.out + r * stride, *from = part.out + r * stride;
        for (int64_t v = 0; v < stride; v += LANES) put(to + v, load(to + v) * a + load(from + v) * b);
        total.sum[r] = total.sum[r] * a + part.sum[r] * b;
        total.top[r] = top;
    }
}

// [rotary] at `from`, turned by cos and sin [2, rotary / 2], first halves then second halves.
template <class From, class To>
inline void rotate(const Heads& h, const From* from, const float* rope, To* to) {
    const int64_t half = h.rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        const float x = widen(from[h.adjacent ? 2 * i : i]), y = widen(from[h.adjacent ? 2 * i + 1 : half + i]);
        const float c = rope[i], s = rope[half + i];
        narrow(x * c - y * s, to[i]);
        narrow(y * c + x * s, to[half + i]);
    }
}

template <class From, class To>
inline void copy(const From* from, To* to, int64_t count) {
    if constexpr (std::is_same<From, To>::value)
        memcpy(to, from, count * sizeof(To));
    else
        for (int64_t i = 0; i < count; i++) narrow(widen(from[i]), to[i]);
}

// Grown, never shrunk, one a thread: memory of this size would come fresh from the system at every call.
template <class T>
T* scratch(std::vector<T>& kept, size_t count) {
    if (kept.size() < count) kept.resize(count);
    return kept.data();
}

struct Item {  // rows first .. first + count of a sequence's queries x the heads of a group
    int64_t sequence, group, first, count, spans, span, first_part;
};

template <class From, class Q, class Cell>
void attend(const Heads& h, const Batch& b, View plain, View rotary, const float* rope, const Cell* layer, View to) {
    const int64_t share = h.heads / h.groups, stride = round_up(h.value, 32), q_stride = round_up(h.plain + h.rotary, 32);
    std::vector<Item> items;
    int64_t parts = 0, products = 0;
    for (int64_t s = 0; s < b.sequences; s++) {
        const int64_t queries = b.starts[s + 1] - b.starts[s], rows = queries * share, total = b.contexts[s] + queries;
        products += rows * h.groups * total * (h.plain + h.rotary + h.value);
        const int64_t span = std::max<int64_t>(SPAN, round_up((total + MAX_SPANS - 1) / MAX_SPANS, TILE));
        for (int64_t g = 0; g < h.groups; g++)
            for (int64_t first = 0; first < rows; first += BLOCK) {
                const int64_t count = std::min<int64_t>(BLOCK, rows - first);
                const int64_t limit = b.contexts[s] + (first + count - 1) / share + 1, spans = (limit + span - 1) / span;
                items.push_back({s, g, first, count, spans, span, parts});
                parts += spans;
            }
    }
    // few blocks over long contexts: the spans themselves are shared out, and merged afterwards
    const int64_t threads = omp_get_max_threads(), blocks = items.size();
    const bool apart = threads > 1 && blocks < 4 * threads && parts > blocks;
    std::vector<Rows> spread(apart ? parts : 0);
    std::vector<float> spread_out(apart ? parts * BLOCK * stride : 0);
    std::vector<std::pair<int64_t, int64_t>> units;  // (item, span), or (item, -1): all its spans
    for (int64_t i = blocks - 1; i >= 0; i--)        // a prompt's last block is its longest: first
        for (int64_t span = 0; span < (apart ? items[i].spans : 1); span++) units.push_back({i, apart ? span : -1});

    auto cells_of = [&](const Item& item) {
        return Cells<Cell>{layer, b.table + item.sequence * b.table_stride, b.page_size, h.cell};
    };
    auto finish = [&](const Item& item, const Rows& rows) {
        for (int64_t r = 0; r < item.count; r++) {
            const int64_t token = b.starts[item.sequence] + (item.first + r) / share;
            const int64_t head = item.group * share + (item.first + r) % share;
            From* out = static_cast<From*>(to.data) + token * to.token + head * to.head;
            const float factor = 1 / rows.sum[r];
            for (int64_t v = 0; v < h.value; v++) narrow(rows.out[r * stride + v] * factor, out[v]);
        }
    };

    auto run = [&](int64_t unit) {
        static thread_local std::vector<Q> own_q;
        static thread_local std::vector<float> own_part, own_total;
        const auto [index, span] = units[unit];
        const Item& item = items[index];
        Q* q = scratch(own_q, BLOCK * q_stride);
        Rows part;
        part.count = item.count;
        for (int64_t r = 0; r < item.count; r++) {
            const int64_t token = b.starts[item.sequence] + (item.first + r) / share;
            const int64_t head = item.group * share + (item.first + r) % share;
            part.limit[r] = b.contexts[item.sequence] + (item.first + r) / share + 1;
            Q* row = q + r * q_stride;
            std::fill(row + h.plain + h.rotary, row + q_stride, Q{});
            copy(static_cast<const From*>(plain.data) + token * plain.token + head * plain.head, row, h.plain);
            rotate(h, static_cast<const From*>(rotary.data) + token * rotary.token + head * rotary.head, rope + token * h.rotary,
                   row + h.plain);
        }
        const Cells<Cell> cells = cells_of(item);
        const int64_t key_at = h.key_at + item.group * h.key_step, value_at = h.value_at + item.group * h.value_step;
        const int64_t end = part.limit[item.count - 1];
        auto after = [&](const Cell** to) -> int {
            if (unit + 1 == int64_t(units.size())) return 0;
            const auto [next, next_span] = units[unit + 1];
            const int64_t begin = std::max<int64_t>(next_span, 0) * items[next].span;
            const int64_t limit = b.contexts[items[next].sequence] + (items[next].first + items[next].count - 1) / share + 1;
            const int count = std::min<int64_t>(TILE, limit - begin);
            cells_of(items[next]).find(begin, count, to);
            for (int c = 0; c < count; c++) to[c] += (items[next].group - item.group) * h.key_step;
            return count;
        };
        auto one = [&](int64_t index, Rows& rows) {
            attend_span(h, q, q_stride, cells, key_at, value_at, index * item.span, std::min(end, (index + 1) * item.span), rows,
                        stride, after);
        };
        if (span >= 0) {
            part.out = spread_out.data() + (item.first_part + span) * BLOCK * stride;
            one(span, part);
            spread[item.first_part + span] = part;
            return;
        }
        part.out = scratch(own_part, BLOCK * stride);
        if (item.spans == 1) {
            one(0, part);
            return finish(item, part);
        }
        Rows total = part;
        total.out = scratch(own_total, BLOCK * stride);
        one(0, total);
        for (int64_t i = 1; i < item.spans; i++) {
            one(i, part);
            merge(part, total, stride);
        }
        finish(item, total);
    };

    const int64_t count = units.size();
    Pool& pool = Pool::get();
    pool.run(count, 1, products > ALONE ? threads : 1, run);
    if (!apart) return;
    pool.run(blocks, 1, threads, [&](int64_t i) {
        Rows& total = spread[items[i].first_part];
        for (int64_t span = 1; span < items[i].spans; span++) merge(spread[items[i].first_part + span], total, stride);
        finish(items[i], total);
    });
}

// The norm's weight, float32 or bf16.
struct Norm {
    const void* weight;
    int type;
    float at(int64_t i) const {
        return type ? widen(static_cast<const bf16*>(weight)[i]) : static_cast<const float*>(weight)[i];
    }
};

constexpr int AHEAD = 8;  // sequences whose cells are fetched before they are written

template <class From, class Cell>
void store(const Heads& h, const Batch& b, View values, View rotary, Norm norm, const float* rope, Cell* layer) {
    const int64_t tokens = b.starts[b.sequences], width = h.groups * h.value;
    auto cell_of = [&](int64_t s, int64_t token) {
        const int64_t position = b.contexts[s] + token - b.starts[s];
        const int64_t page = b.table[s * b.table_stride + position / b.page_size];
        return layer + (page * b.page_size + position % b.page_size) * h.cell;
    };
    Pool::get().run(b.sequences, 4, tokens * h.cell > ALONE ? omp_get_max_threads() : 1, [&](int64_t s) {
        for (int64_t token = b.starts[s]; token < b.starts[s + 1]; token++) {
            Cell* cell = cell_of(s, token);
            if (s + AHEAD < b.sequences) prefetch(cell_of(s + AHEAD, b.starts[s + AHEAD]), h.cell);
            const From* from = static_cast<const From*>(values.data) + token * values.token;
            for (int64_t g = 0; g < h.groups; g++)
                rotate(h, static_cast<const From*>(rotary.data) + token * rotary.token + g * rotary.head, rope + token * h.rotary,
                       cell + h.key_at + g * h.key_step + h.plain);
            if (!norm.weight) {
                copy(from, cell + h.value_at, width);
                continue;
            }
            Vec squares = {};
            int64_t i = 0;
            for (; i + LANES <= width; i += LANES) squares += load(from + i) * load(from + i);
            if (i < width) squares += load_part(from + i, width - i) * load_part(from + i, width - i);
            const float factor = 1 / std::sqrt(sum_lanes(squares) / width + h.epsilon);
            for (i = 0; i < width; i++) narrow(widen(from[i]) * factor * norm.at(i), cell[h.value_at + i]);
        }
    });
}

}  // namespace paged

// Both return 0, or 1 (and do nothing) where the table leads outside the cache. Types are 0 for float32, 1 for bf16. `values` are a cell's values, all groups' one after the other; with `norm` they are
// first divided by their root mean square and multiplied by it. `rope` is [tokens, 2, rotary / 2].
extern "C" int paged_store(const paged::Heads* h, const paged::Batch* b, int from_type, void* values, int64_t values_token,
                           void* rotary, int64_t rotary_token, int64_t rotary_head, int norm_type, const void* norm,
                           const float* rope, int cell_type, void* layer, int64_t pages) {
    using namespace paged;
    if (!pages_exist(*b, pages)) return 1;
    const View v{values, values_token, 0}, r{rotary, rotary_token, rotary_head};
    const Norm n{norm, norm_type};
    if (from_type == 0 && cell_type == 0) store<float, float>(*h, *b, v, r, n, rope, static_cast<float*>(layer));
    if (from_type == 0 && cell_type == 1) store<float, bf16>(*h, *b, v, r, n, rope, static_cast<bf16*>(layer));
    if (from_type == 1 && cell_type == 0) store<bf16, float>(*h, *b, v, r, n, rope, static_cast<float*>(layer));
    if (from_type == 1 && cell_type == 1) store<bf16, bf16>(*h, *b, v, r, n, rope, static_cast<bf16*>(layer));
    return 0;
}

// out [token, head, value] = softmax(scale * q . keys) values, q = [plain | rotated rotary]; out has the queries' type.
extern "C" int paged_attention(const paged::Heads* h, const paged::Batch* b, int from_type, void* plain, int64_t plain_token,
                               int64_t plain_head, void* rotary, int64_t rotary_token, int64_t rotary_head, const float* rope,
                               int cell_type, const void* layer, int64_t pages, void* out, int64_t out_token, int64_t out_head) {
    using namespace paged;
    if (!pages_exist(*b, pages)) return 1;
    const View p{plain, plain_token, plain_head}, r{rotary, rotary_token, rotary_head}, to{out, out_token, out_head};
    const float* wide = static_cast<const float*>(layer);
    const bf16* half = static_cast<const bf16*>(layer);
    using Multiplied = std::conditional<HAS_PAIRS, bf16, float>::type;
    if (from_type == 0 && cell_type == 0) attend<float, float, float>(*h, *b, p, r, rope, wide, to);
    if (from_type == 0 && cell_type == 1) attend<float, float, bf16>(*h, *b, p, r, rope, half, to);
    if (from_type == 1 && cell_type == 0) attend<bf16, float, float>(*h, *b, p, r, rope, wide, to);
    if (from_type == 1 && cell_type == 1) attend<bf16, Multiplied, bf16>(*h, *b, p, r, rope, half, to);
    return 0;
}
