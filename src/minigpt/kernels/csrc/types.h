// Types that every level shares. Nothing here may emit code: see level.cpp.
#pragma once

#include <cstdint>

namespace mg {

struct bf16 {
  uint16_t bits;
};

// How activations lie in memory; the numbers are `library.py`'s.
enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

}  // namespace mg
