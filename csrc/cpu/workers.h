// Independent tasks of unequal cost on PyTorch's own thread pool.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace specs {

// Memory aligned to a cache line; not initialised.
template <class F>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(F) + 63) / 64 * 64;
    data_.reset(static_cast<F*>(std::aligned_alloc(64, bytes ? bytes : 64)));
    if (!data_) throw std::bad_alloc();
  }
  F* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(F* p) const { std::free(p); }
  };
  std::unique_ptr<F[], Free> data_;
};

// make_worker() runs once on each thread that takes part and returns run(task); tasks 0 .. count - 1 are handed out in order to
// whichever thread is free, so the longest should come first. What a task computes must not depend on its thread.
template <class MakeWorker>
void run_tasks(int64_t count, const MakeWorker& make_worker) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    try {
      auto run = make_worker();
      for (int64_t task = next++; task < count; task = next++) run(task);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;  // an exception must not leave a thread of the pool
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace specs
