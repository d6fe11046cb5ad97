// What the small steps between the matrix products take.
#pragma once

#include "types.h"

namespace mg {

// y = x / rms(x) * weight over rows of `width`. With a residual, x is added to it first, the sum
// is rounded to its dtype and kept in it, and the norm is taken of that.
struct RmsNormArgs {
  DType dtype;           // of input, residual, weight and output
  const void* input;     // (rows, width)
  void* residual;        // (rows, width), read and written, or null
  const void* weight;    // (width)
  void* output;          // (rows, width)
  int64_t rows, width;
  float epsilon;
};

}  // namespace mg
