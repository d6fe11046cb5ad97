// What attention over the paged cache takes, and how a layer's cache lies in memory.
//
// A block of the cache holds one cell for each key and value head, one after the other. A cell
// holds the keys of its tokens, then their values, and in int8 the scales of either. Both lie in
// groups of kGroup tokens, arranged as the dot products read them (`depth` is 2 in bfloat16):
//   keys   (head_dim / depth, kGroup, depth)   a vector is one pair of numbers of many tokens
//   values (kGroup / depth, head_dim, depth)   a vector is many numbers of one pair of tokens
#pragma once

#include "types.h"

namespace mg {

// The numbers are `kv_layout.py`'s.
enum CacheFormat : int32_t { kCacheFloat32 = 0, kCacheBFloat16 = 1, kCacheInt8 = 2 };

constexpr int kGroup = 16;
// The softmax is taken over pieces of this many tokens, which are then joined in order: the
// result has the same bits whether one thread does all pieces of a row or each a few.
constexpr int kSplit = 256;
constexpr int kMaxQueries = 32;  // rows times heads that read a cell's keys together
constexpr int kMaxHeadDim = 256;

struct KvLayout {
  CacheFormat format;
  int32_t block_size, kv_heads, head_dim;  // block_size a multiple of kGroup
};

// Consecutive rows of one sequence, with one of the cache's heads: all pieces of its context, or
// one of them.
struct AttentionUnit {
  int32_t row, rows;
  int32_t position;  // of the first row in its sequence: it sees the tokens up to itself
  int32_t table;     // where the sequence's block table begins in `tables`
  int32_t head;
  int32_t split;     // -1: all, and the result is final
  int64_t partial;   // index of the first query's partial result
  int64_t cost;      // of all units before this one
};

// Rows whose pieces were computed apart.
struct AttentionMerge {
  int32_t row, rows, head, splits;
  int64_t partial;  // that of the first piece; the others follow
};

struct AttentionArgs {
  DType dtype;  // of query and output
  KvLayout layout;
  const void* query;  // (rows, heads, head_dim), rows `query_stride` numbers apart
  int64_t query_stride;
  void* output;  // (rows, heads, head_dim)
  const void* cache;
  const int32_t* tables;
  int32_t heads;
  int32_t window;  // latest tokens seen, the row's own included; 0: all
  float scale;
  const AttentionUnit* units;
  int64_t num_units, cost;  // cost of all units
  const AttentionMerge* merges;
  int64_t num_merges;
  float* partials;  // of a query: largest score, sum of weights, head_dim numbers
};

// Query and key heads of a fused projection: normed, turned by their position, keys and values
// written to the cache.
struct QkvArgs {
  DType dtype;  // of qkv and the norms' weights
  KvLayout layout;
  void* qkv;  // (rows, heads + 2 * kv_heads, head_dim); the queries are replaced
  void* cache;
  const int32_t* slots;      // (rows): block * block_size + place in the block
  const void* query_norm;    // (head_dim) or null
  const void* key_norm;
  const float *cos, *sin;    // (rows, head_dim / 2) or null: pairs (i, i + head_dim / 2)
  int64_t rows;
  int32_t heads;
  float epsilon;
};

}  // namespace mg
