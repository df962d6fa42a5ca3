// The routed experts of a mixture, and a shared one, for few tokens: only the weights that these tokens chose are read.
#include "kernels.h"
#include "pool.h"
#include "inputs.h"

namespace {
struct Job {
  Expert expert;
  int64_t first, count;  // its rows among those sorted by expert
  int64_t inner, outer;  // units of work before it
};

struct Scratch {
  Room x, hidden;
  std::vector<Job> jobs;
  std::vector<int64_t> cell, token, row, ends, identity;
  std::vector<float> inner, outer;
};
}  // namespace

// y [n, dim], in x's precision = sum over a token's experts of weight * expert(x), plus shared(x) where there is one. Gate and up of all experts are of
// one kind, and all downs.
extern "C" void jevons_experts(const Routed* routed, const Expert* shared, void* from, int64_t stride, int32_t bf16, int64_t n,
                               void* to) {
  static thread_local Scratch own;
  Scratch& s = own;  // a thread_local seen by the threads below would be each one's own
  const int64_t k = routed ? routed->k : 0, pairs = n * k, total = pairs + (shared ? n : 0);
  s.jobs.clear(), s.cell.resize(pairs), s.token.resize(total), s.identity.resize(total);
  for (int64_t i = 0; i < total; i++) s.identity[i] = i;
  if (routed) {  // rows sorted by expert
    s.ends.assign(routed->count, 0);
    for (int64_t i = 0; i < pairs; i++) s.ends[routed->chosen[i]]++;
    int64_t at = 0;
    for (int64_t e = 0; e < routed->count; e++) {
      const int64_t rows = s.ends[e];
      s.ends[e] = at;
      if (rows) s.jobs.push_back({routed->at(e), at, rows, 0, 0});
      at += rows;
    }
    for (int64_t i = 0; i < pairs; i++) {
      s.cell[i] = s.ends[routed->chosen[i]]++;
      s.token[s.cell[i]] = i / k;
    }
  }
  if (shared) {
    s.jobs.push_back({*shared, pairs, n, 0, 0});
    for (int64_t m = 0; m < n; m++) s.token[pairs + m] = m;
  }
  int64_t inner_units = 0, outer_units = 0, bytes = 0, width = 0;
  for (Job& job : s.jobs) {
    const Weight &up = job.expert.up, &down = job.expert.down;
    job.inner = inner_units, job.outer = outer_units;
    inner_units += ceil_div(up.rows, PANEL), outer_units += ceil_div(down.rows, PANEL);
    bytes += 2 * up.rows * panel_bytes(up) / PANEL + down.rows * panel_bytes(down) / PANEL;
    width = std::max(width, up.rows);
  }
  const int64_t dim = s.jobs[0].expert.down.rows;
  const Matrix x = {(uint8_t*)from, stride, bf16}, y = {(uint8_t*)to, dim, bf16};
  s.inner.resize(total * width), s.outer.resize(total * dim);
  // of many tokens an expert's rows lie one below the other, as tiles want them: copies behind the tokens' own
  const bool copied = HAS_TILES && n >= 8;
  const Inputs in = make_inputs(s.jobs[0].expert.up, x.bf16, copied ? n + total : n, s.x);
  s.row.resize(total);
  for (int64_t i = 0; i < total; i++) s.row[i] = copied ? n + i : s.token[i];
  auto job_of = [&](int64_t unit, int64_t Job::*before) -> const Job& {
    return *(std::upper_bound(s.jobs.begin(), s.jobs.end(), unit, [&](int64_t u, const Job& j) { return u < j.*before; }) - 1);
  };
  // each expert's inner width is its own: one Inputs for the routed ones, one for the shared
  Weight widest = s.jobs[0].expert.down;
  widest.columns = width;
  const Inputs wide = make_inputs(widest, false, total, s.hidden);
  auto hidden_of = [&](const Job& job) {
    Inputs narrow = wide;
    narrow.columns = job.expert.down.columns;
    return narrow;
  };

  const int64_t LIMIT = 64;
  auto inner = [&](int64_t unit) {
    const Job& job = job_of(unit, &Job::inner);
    const int64_t panel = unit - job.inner, row = panel * PANEL, valid = std::min<int64_t>(PANEL, job.expert.up.rows - row);
    float gate[LIMIT * PANEL], up[LIMIT * PANEL];
    for (int64_t first = 0; first < job.count; first += LIMIT) {
      const int64_t count = std::min(LIMIT, job.count - first), cell = job.first + first;
      multiply_panel(job.expert.gate, panel, in, &s.row[cell], count, gate);
      multiply_panel(job.expert.up, panel, in, &s.row[cell], count, up);
      for (int64_t i = 0; i < count; i++) {
        const f32x16 g = load<f32x16>(gate + i * PANEL), product = g / (1.0f + exponential(-g)) * load<f32x16>(up + i * PANEL);
        memcpy(&s.inner[(cell + i) * width + row], &product, valid * 4);
      }
    }
  };
  auto outer = [&](int64_t unit) {
    const Job& job = job_of(unit, &Job::outer);
    const int64_t panel = unit - job.outer, row = panel * PANEL, valid = std::min<int64_t>(PANEL, dim - row);
    const Inputs hidden = hidden_of(job);
    float out[LIMIT * PANEL];
    for (int64_t first = 0; first < job.count; first += LIMIT) {
      const int64_t count = std::min(LIMIT, job.count - first), cell = job.first + first;
      multiply_panel(job.expert.down, panel, hidden, &s.identity[cell], count, out);
      for (int64_t i = 0; i < count; i++) memcpy(&s.outer[(cell + i) * dim + row], out + i * PANEL, valid * 4);
    }
  };
  auto refill = [&](const Job& job) {
    const Inputs hidden = hidden_of(job);
    for (int64_t cell = job.first; cell < job.first + job.count; cell++)
      fill_row(hidden, cell, (const uint8_t*)&s.inner[cell * width], false, job.expert.down);
  };
  auto mix = [&](int64_t m) {
    for (int64_t c = 0; c < dim; c += 16) {
      const int64_t valid = std::min<int64_t>(16, dim - c);
      f32x16 v = {};
      for (int64_t i = m * k; i < (m + 1) * k; i++)
        v += load_numbers((const uint8_t*)&s.outer[s.cell[i] * dim + c], false, valid) * routed->weights[i];
      if (shared) v += load_numbers((const uint8_t*)&s.outer[(pairs + m) * dim + c], false, valid);
      store_numbers(y.at(m, c), y.bf16, v, valid);
    }
  };

  Pool& pool = Pool::get();
  const int threads = threads_for(bytes, 1);
  pool.run(n, 4, n < 16 ? 1 : threads, [&](int64_t m) { fill_row(in, m, x.at(m), x.bf16, s.jobs[0].expert.up); });
  if (copied) pool.run(total, 16, threads, [&](int64_t i) { copy_row(in, s.token[i], n + i); });
  const bool few = n <= READING;
  auto chunk = [&](int64_t units) { return std::max<int64_t>(2, units / ((few ? 16 : 4) * threads)); };
  pool.run(inner_units, chunk(inner_units), threads, inner, few);
  pool.run(s.jobs.size(), 1, threads, [&](int64_t j) { refill(s.jobs[j]); });
  pool.run(outer_units, chunk(outer_units), threads, outer, few);
  pool.run(n, 1, n < 8 ? 1 : threads, mix);
}
