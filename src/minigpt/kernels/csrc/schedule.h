// How a step's attention is divided into units; the same for all layers of the step.
#pragma once

#include <vector>

#include "args_attention.h"

namespace mg {

// Consecutive rows of one sequence in a step.
struct AttentionChunk {
  int32_t row, rows;
  int32_t position;  // of the first row
  int32_t table;     // where the sequence's block table begins
};

struct Schedule {
  std::vector<AttentionUnit> units;
  std::vector<AttentionMerge> merges;
  int64_t cost = 0;
  int64_t partials = 0;  // queries with a partial result
};

Schedule make_schedule(const AttentionChunk* chunks, int64_t count, int heads, int kv_heads,
                       int window, int threads);

}  // namespace mg
