// Exported functions of packed weights and the products with them.
#include <sys/mman.h>

#include <cstdlib>

#include "run.h"

using namespace mg;

// Return 0, or 1 where there is no memory for the inputs in the kernels' form.
MG_API int32_t mg_linear(const PackedWeight* weight, int32_t input_dtype, int32_t output_dtype,
                         const void* input, void* output, int64_t rows, int32_t digits) {
  LinearArgs args{weight, static_cast<DType>(input_dtype), static_cast<DType>(output_dtype),
                  input, output, nullptr, rows, digits};
  alignas(64) char few[64 << 10];  // a decode step's inputs fit
  int64_t bytes = (args.scratch_bytes() + 63) / 64 * 64;
  bool many = bytes > static_cast<int64_t>(sizeof(few));
  args.scratch = many ? std::aligned_alloc(64, bytes) : few;
  if (!args.scratch) return 1;
  run(table().linear_prepare, table().linear_multiply, args,
      weight->panels() * weight->panel_bytes() * rows);
  if (many) std::free(args.scratch);
  return 0;
}

MG_API void mg_pack(const uint32_t* weight, uint32_t* packed, int64_t columns, int64_t units) {
  PackArgs args{weight, packed, columns, units};
  run(table().pack_units, args, columns * units * 4);
}

// Ask for huge pages in the whole pages of a range not yet written: fewer misses when it is read.
MG_API void mg_advise_huge(void* begin, int64_t bytes) {
  constexpr uintptr_t page = 4096;
  uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / page * page;
#ifdef MADV_HUGEPAGE
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}
