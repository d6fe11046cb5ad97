// Exported measurements of the machine's limits; the caller keeps the time.
#include "run.h"

using namespace mg;

MG_API void mg_read(const void* begin, int64_t bytes) {
  run(table().read_memory, ReadArgs{static_cast<const char*>(begin), bytes}, bytes);
}

// Return the operations that all threads did together.
MG_API int64_t mg_peak(int32_t arithmetic, int64_t steps) {
  int64_t operations = 0;
  run(table().peak, PeakArgs{static_cast<Arithmetic>(arithmetic), steps, &operations}, INT64_MAX);
  return operations * omp_get_max_threads();
}
