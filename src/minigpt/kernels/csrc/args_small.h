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

// y = (x - mean(x)) / deviation(x) * weight + bias, with a residual as above.
struct LayerNormArgs {
  DType dtype;           // of all
  const void* input;     // (rows, width)
  void* residual;        // (rows, width), read and written, or null
  const void* weight;    // (width)
  const void* bias;      // (width) or null
  void* output;          // (rows, width)
  int64_t rows, width;
  float epsilon;
};

// SiLU(gate) * up, or GELU(x) in its tanh form.
struct ActivationArgs {
  DType dtype;        // of both
  const void* input;  // gated: (rows, 2 * width), gates first; else (rows, width)
  void* output;       // (rows, width)
  int64_t rows, width;
  int32_t gated;
};

// Rows of a table of token vectors; int8 ones times their scale. Learned positions are added.
struct EmbedArgs {
  DType dtype;                 // of output, position_table, and of the table unless it has scales
  const int32_t* tokens;       // (rows)
  const int32_t* positions;    // (rows)
  const void* table;           // (vocabulary, width)
  const float* scales;         // (vocabulary) of an int8 table, or null
  const void* position_table;  // (context, width) or null
  void* output;                // (rows, width)
  int64_t rows, width;
};

// Of each row of logits: the largest, and the logarithm of the sum of exponentials.
struct LargestArgs {
  const float* logits;  // (rows, width)
  int64_t* best;        // (rows): the first largest's place; -1 where a number is not finite
  float* log_sum;       // (rows) or null
  int64_t rows, width;
};

// The `count` largest of each row in falling order, of equals the first first.
struct TopArgs {
  const float* logits;  // (rows, width)
  float* values;        // (rows, count)
  int64_t* places;      // (rows, count)
  int64_t rows, width, count;
};

}  // namespace mg
