#include "schedule.h"

#include <algorithm>

namespace mg {

namespace {

// Reading a group of tokens costs as much as this many queries' arithmetic on it.
constexpr int64_t kReadCost = 6;

int64_t groups_seen(const AttentionUnit& unit, int window) {
  int64_t stop = unit.position + unit.rows;
  int64_t oldest = window ? std::max<int64_t>(0, unit.position + 1 - window) : 0;
  if (unit.split >= 0) {
    oldest = std::max<int64_t>(oldest, int64_t(unit.split) * kSplit);
    stop = std::min<int64_t>(stop, int64_t(unit.split + 1) * kSplit);
  }
  return std::max<int64_t>(0, (stop + kGroup - 1) / kGroup - oldest / kGroup);
}

}  // namespace

Schedule make_schedule(const AttentionChunk* chunks, int64_t count, int heads, int kv_heads,
                       int window, int threads) {
  Schedule made;
  int shared = heads / kv_heads, most_rows = std::max(1, kMaxQueries / shared);
  auto cost = [&](const AttentionUnit& unit) {
    return groups_seen(unit, window) * (kReadCost + unit.rows * shared);
  };
  auto for_each = [&](auto f) {  // head outside rows: neighbouring units read the same tokens
    for (const AttentionChunk* chunk = chunks; chunk != chunks + count; ++chunk)
      for (int head = 0; head < kv_heads; ++head)
        for (int done = 0; done < chunk->rows; done += most_rows)
          f(AttentionUnit{chunk->row + done, std::min(most_rows, chunk->rows - done),
                          chunk->position + done, chunk->table, head, -1, 0, 0});
  };
  int64_t total = 0;
  for_each([&](const AttentionUnit& unit) { total += cost(unit); });
  auto add = [&](AttentionUnit unit) {
    unit.cost = made.cost;
    made.cost += cost(unit);
    made.units.push_back(unit);
  };
  for_each([&](AttentionUnit unit) {
    int splits = (unit.position + unit.rows - 1) / kSplit + 1;
    // Whole unless so large a share that the threads' work would be uneven.
    if (threads == 1 || splits == 1 || cost(unit) * 4 * threads <= total) return add(unit);
    made.merges.push_back({unit.row, unit.rows, unit.head, splits, made.partials});
    for (unit.split = 0; unit.split < splits; ++unit.split) {
      unit.partial = made.partials;
      made.partials += unit.rows * shared;
      add(unit);
    }
  });
  return made;
}

}  // namespace mg
