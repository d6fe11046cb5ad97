// Exported functions of attention over the paged cache.
#include "run.h"
#include "schedule.h"

using namespace mg;

MG_API void mg_qkv(int32_t dtype, int32_t format, int32_t block_size, int32_t kv_heads,
                   int32_t head_dim, void* qkv, void* cache, const int32_t* slots,
                   const void* query_norm, const void* key_norm, const float* cos,
                   const float* sin, int64_t rows, int32_t heads, float epsilon) {
  QkvArgs args{static_cast<DType>(dtype),
               {static_cast<CacheFormat>(format), block_size, kv_heads, head_dim},
               qkv, cache, slots, query_norm, key_norm, cos, sin, rows, heads, epsilon};
  run(table().qkv, args, rows * (heads + 2 * kv_heads) * head_dim * 4);
}

MG_API void mg_paged_attention(int32_t dtype, int32_t format, int32_t block_size,
                               int32_t kv_heads, int32_t head_dim, const void* query,
                               int64_t query_stride, void* output, const void* cache,
                               const AttentionChunk* chunks, int64_t num_chunks,
                               const int32_t* tables, int32_t heads, int32_t window, float scale) {
  Schedule schedule =
      make_schedule(chunks, num_chunks, heads, kv_heads, window, omp_get_max_threads());
  std::vector<float> partials(schedule.partials * (head_dim + 2));
  AttentionArgs args{static_cast<DType>(dtype),
                     {static_cast<CacheFormat>(format), block_size, kv_heads, head_dim},
                     query, query_stride, output, cache, tables, heads, window, scale,
                     schedule.units.data(), static_cast<int64_t>(schedule.units.size()),
                     schedule.cost, schedule.merges.data(),
                     static_cast<int64_t>(schedule.merges.size()), partials.data()};
  run(table().attend, args, schedule.cost * kGroup * head_dim);
  if (args.num_merges) run(table().merge, args, args.num_merges * head_dim * 4);
}
