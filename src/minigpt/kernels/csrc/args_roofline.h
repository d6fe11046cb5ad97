// What the measurements of the machine's limits take.
#pragma once

#include "types.h"

namespace mg {

// Read `bytes` (a multiple of 256), each thread its own stretch.
struct ReadArgs {
  const char* begin;
  int64_t bytes;
};

// Multiply and add in registers alone.
enum Arithmetic : int32_t { kFusedFloat32 = 0, kDotBFloat16 = 1, kDotInt8 = 2 };
constexpr int kPeakChains = 12;  // independent sums, enough to hide an instruction's latency

struct PeakArgs {
  Arithmetic arithmetic;
  int64_t steps;
  int64_t* operations;  // written by thread 0: of one thread in all steps; a product counts two
};

}  // namespace mg
