// Run a kernel's body in a parallel region of its own.
#pragma once

#include <omp.h>

#include "table.h"

#define MG_API extern "C" __attribute__((visibility("default")))

namespace mg {

// Below this many bytes touched the fork costs more than it saves.
constexpr int64_t kWorthForking = 64 << 10;

template <class Args>
void run(Part<Args> part, const Args& args, int64_t bytes) {
  int threads = bytes < kWorthForking ? 1 : omp_get_max_threads();
  if (threads == 1) return part(args, 0, 1);
#pragma omp parallel num_threads(threads)
  part(args, omp_get_thread_num(), omp_get_num_threads());
}

// Two bodies, the second after all threads have done the first.
template <class Args>
void run(Part<Args> first, Part<Args> second, const Args& args, int64_t bytes) {
  int threads = bytes < kWorthForking ? 1 : omp_get_max_threads();
  if (threads == 1) {
    first(args, 0, 1);
    return second(args, 0, 1);
  }
#pragma omp parallel num_threads(threads)
  {
    first(args, omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
    second(args, omp_get_thread_num(), omp_get_num_threads());
  }
}

}  // namespace mg
