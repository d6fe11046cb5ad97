// A step of a whole decoder: all layers for some rows of several sequences.
#pragma once

#include "args_attention.h"
#include "args_linear.h"
#include "schedule.h"

namespace mg {

// The structures that `step.py` has too.

struct StepNorm {
  const void* weight;  // (width)
  const void* bias;    // (width) or null
};

struct StepLayer {
  StepNorm input_norm, inner_norm;  // before attention, before the MLP
  const void *query_norm, *key_norm;  // (head_dim) or null
  const PackedWeight *qkv, *output;   // projections around attention
  const PackedWeight *up, *down;      // of the MLP; gates before `up` where it is gated
  void* cache;
};

struct StepPlan {
  DType dtype;  // of the residual stream, activations, norms and embeddings
  KvLayout layout;
  int32_t num_layers, heads, window;
  int32_t digits;      // of integer inputs, see LinearArgs
  int32_t layer_norm;  // rather than RMS norm
  int32_t gated;       // SiLU(gate) * up rather than GELU
  float epsilon, scale;
  int64_t width, inner, vocabulary;
  const StepLayer* layers;
  const void* embedding;          // (vocabulary, width)
  const float* embedding_scales;  // of an int8 embedding, or null
  const void* position_table;     // (context, width), or null: rotary positions
  const float* frequencies;       // (head_dim / 2), of rotary positions
  StepNorm final_norm;
  const PackedWeight* head;
};

struct StepBatch {
  int64_t rows;
  const int32_t* tokens;  // (rows)
  const AttentionChunk* chunks;
  int64_t num_chunks;
  const int32_t* tables;
  // Rows that are wanted, each once, those whose logits are wanted first.
  const int32_t* outputs;
  int64_t num_outputs, num_logits;
  float* logits;  // (num_logits, vocabulary)
  void* hidden;   // (num_outputs, width) of the plan's dtype after the final norm, or null
};

}  // namespace mg
