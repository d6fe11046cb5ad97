// Exported functions of the small steps between the matrix products.
#include "run.h"

using namespace mg;

MG_API void mg_rms_norm(int32_t dtype, const void* input, void* residual, const void* weight,
                        void* output, int64_t rows, int64_t width, float epsilon) {
  RmsNormArgs args{static_cast<DType>(dtype), input, residual, weight, output, rows, width, epsilon};
  run(table().rms_norm, args, rows * width * 4);
}

MG_API void mg_layer_norm(int32_t dtype, const void* input, void* residual, const void* weight,
                          const void* bias, void* output, int64_t rows, int64_t width,
                          float epsilon) {
  LayerNormArgs args{static_cast<DType>(dtype), input, residual, weight, bias,
                     output, rows, width, epsilon};
  run(table().layer_norm, args, rows * width * 4);
}

MG_API void mg_activation(int32_t dtype, const void* input, void* output, int64_t rows,
                          int64_t width, int32_t gated) {
  ActivationArgs args{static_cast<DType>(dtype), input, output, rows, width, gated};
  run(table().activation, args, rows * width * 8);
}

MG_API void mg_largest(const float* logits, int64_t* best, float* log_sum, int64_t rows,
                       int64_t width) {
  run(table().largest, LargestArgs{logits, best, log_sum, rows, width}, rows * width * 4);
}

MG_API void mg_top(const float* logits, float* values, int64_t* places, int64_t rows,
                   int64_t width, int64_t count) {
  run(table().top, TopArgs{logits, values, places, rows, width, count}, rows * width * 4);
}
