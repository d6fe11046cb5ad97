// A barrier for the many short bodies of a step.
#pragma once

#include <sched.h>

#include <atomic>

namespace mg {

// Threads spin for the last one: bodies take microseconds, less than waking a thread. After a
// while they yield, for where the machine is shared the last may be waiting for their core.
class Barrier {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    constexpr int kSpins = 2000;
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins >= kSpins) sched_yield();
#if __x86_64__
      else __builtin_ia32_pause();
#endif
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

}  // namespace mg
