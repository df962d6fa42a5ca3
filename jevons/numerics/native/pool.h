// Threads that share one product's rows. OpenMP's end of a region waits for every thread, also for one that was asleep and finds
// nothing left: 30 to 60 microseconds, longer than most products of a decode step. Here whoever comes late is not waited for.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include <omp.h>

class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool;  // never destroyed: its threads may be asleep when the process ends
    return *pool;
  }

  // work(i) for every i in [0, count), `chunk` at a time, on up to `threads` threads, the caller's among them. `long_first`: a
  // thread takes much of what is left, at least a chunk: memory is read fastest in few long streams, and the short ones at the
  // end let nobody wait. For work of even size.
  template <class F>
  void run(int64_t count, int64_t chunk, int threads, const F& work, bool long_first = false) {
    if (threads <= 1 || count <= chunk || !busy.try_lock()) {
      for (int64_t i = 0; i < count; i++) work(i);
      return;
    }
    while (started < threads - 1) std::thread(&Pool::serve, this, started++).detach();
    next = 0, total = count, step = chunk, helpers = threads - 1, falling = long_first, context = &work;
    call = [](const void* f, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) (*(const F*)f)(i);
    };
    state.fetch_or(OPEN);
    if (asleep > 0) {
      { std::lock_guard<std::mutex> lock(mutex); }
      wake.notify_all();
    }
    take();
    state.fetch_and(~OPEN);
    for (int turn = 0; state.load() != 0; turn++) pause(turn);
    busy.unlock();
  }

 private:
  static const uint64_t OPEN = 1ull << 32;
  std::mutex busy, mutex;  // `busy`: one product at a time; a second caller works alone
  std::condition_variable wake;
  std::atomic<uint64_t> state{0};  // OPEN, plus the helpers within
  std::atomic<int64_t> next{0};
  std::atomic<int> asleep{0};
  int64_t total = 0, step = 1;
  int started = 0, helpers = 0;
  bool falling = false;
  const void* context = nullptr;
  void (*call)(const void*, int64_t, int64_t) = nullptr;

  // Waits a moment; now and then it offers its core, for who is waited for may have none.
  static void pause(int turn) {
    if (turn % 1024 == 1023) std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void take() {
    for (int64_t i = next.load(); i < total;) {
      const int64_t share = falling ? 3 * (total - i) / (4 * (helpers + 1)) : 0, size = std::max(step, share);
      if (!next.compare_exchange_weak(i, i + size)) continue;
      call(context, i, std::min(i + size, total));
      i = next.load();
    }
  }

  bool enter(int index) {
    uint64_t s = state.load();
    while (s & OPEN) {
      if (!state.compare_exchange_weak(s, s + 1)) continue;
      if (index < helpers) return true;
      state.fetch_sub(1);
      return false;
    }
    return false;
  }

  void serve(int index) {
    const auto patience = std::chrono::milliseconds(1);  // within a pass, and over the Python between two, a product comes sooner
    auto since = std::chrono::steady_clock::now();
    for (int turn = 0;; turn++) {
      if (enter(index)) {
        take();
        state.fetch_sub(1);
        since = std::chrono::steady_clock::now();
        for (int wait = 0; state.load() & OPEN; wait++) pause(wait);
      } else if (turn % 64 == 0 && std::chrono::steady_clock::now() - since > patience) {
        std::unique_lock<std::mutex> lock(mutex);
        asleep++;
        wake.wait(lock, [&] { return (state.load() & OPEN) != 0; });
        asleep--;
        since = std::chrono::steady_clock::now();
      } else {
        pause(turn);
      }
    }
  }
};

static const int64_t READING = 4;  // rows of inputs up to which reading the weights is what takes time: long streams first

// Threads for work that reads so many bytes of weights for so many rows; below a limit another thread is not worth waking.
static inline int threads_for(int64_t bytes, int64_t rows) { return bytes * rows >= (1 << 19) ? omp_get_max_threads() : 1; }
