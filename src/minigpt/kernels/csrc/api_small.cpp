// Exported functions of the small steps between the matrix products.
#include "run.h"

using namespace mg;

MG_API void mg_rms_norm(int32_t dtype, const void* input, void* residual, const void* weight,
                        void* output, int64_t rows, int64_t width, float epsilon) {
  RmsNormArgs args{static_cast<DType>(dtype), input, residual, weight, output, rows, width, epsilon};
  run(table().rms_norm, args, rows * width * 4);
}
