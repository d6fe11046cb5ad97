// What the products with packed weights take. The layout of packed weights is one at all levels.
#pragma once

#include "types.h"

namespace mg {

// Output columns that a panel of a packed weight holds: the unit of work of a thread.
constexpr int kPanel = 64;

// Inputs that may share a scale, at most: two digits of so many fit sums of 32 bits.
constexpr int kLargestGroup = 128;

// Rows that the tiles of a product may hold beyond those that there are.
constexpr int kSpareRows = 3;

// Kinds of packed weights; the numbers are `linear.py`'s. Columns are padded to whole panels and
// inputs to whole groups. The unit is 4 bytes, those of one column lying `kPanel` units apart:
//   bf16   (panel, in / 2, column, 2)
//   int8   (panel, in / 4, column, 4): w + 128, unsigned
//   int4   (panel, in / 8, column, 4): inputs 0-3 of eight in the low halves, 4-7 in the high
enum WeightKind : int32_t { kWeightBFloat16 = 0, kWeightInt8 = 1, kWeightInt4 = 2 };

// `linear.py` has the same structure.
struct PackedWeight {
  WeightKind kind;
  int32_t group;  // inputs that share a scale, or are padded together: a multiple of 8
  int64_t in_features, out_features;
  const void* data;
  const void* scale;    // int8: (panels * kPanel) fp32; int4: (panel, group, column) bf16
  const uint8_t* zero;  // int4: (panel, group, column), or null: 8 everywhere
  const float* bias;    // (panels * kPanel), or null

  int64_t groups() const { return (in_features + group - 1) / group; }
  int64_t padded_inputs() const { return groups() * group; }
  int64_t panels() const { return (out_features + kPanel - 1) / kPanel; }
  int64_t panel_bytes() const {
    int64_t bits = kind == kWeightBFloat16 ? 16 : kind == kWeightInt8 ? 8 : 4;
    return padded_inputs() * kPanel * bits / 8;
  }
};

// output = input weight^T + bias.
//
// With integer weights the inputs are rounded to integers too, by the largest of each group of
// a row: 8 bits ("one digit") or 16 (two digits, each a product of its own). Sums within a group
// are exact; groups are added in fp32, in order.
struct LinearArgs {
  const PackedWeight* weight;
  DType input_dtype, output_dtype;
  const void* input;  // (rows, in)
  void* output;       // (rows, out)
  void* scratch;      // scratch_bytes(), aligned to 64: prepare fills it, multiply reads it
  int64_t rows;
  int32_t digits;  // of an integer input: 1 or 2; with bf16 weights 1

  int64_t scratch_bytes() const {
    int64_t groups = weight->groups(), padded = weight->padded_inputs();
    if (weight->kind == kWeightBFloat16) return (rows + kSpareRows) * padded * 4;
    return (rows + kSpareRows) * (groups * 8 + padded * digits);
  }
};

struct PackArgs {
  const uint32_t* weight;  // (columns, units)
  uint32_t* packed;        // (panels, units, kPanel)
  int64_t columns, units;
};

}  // namespace mg
