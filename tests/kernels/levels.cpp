// Compare every level of a library built for another processor with its scalar level, where no
// Python runs: `levels LIBRARY` prints one line a level and exits with the number of differences.
#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "args_attention.h"
#include "args_linear.h"

using namespace mg;

namespace {

template <class F>
F* function(void* library, const char* name) {
  return reinterpret_cast<F*>(dlsym(library, name));
}

// A packed weight of random bits that are harmless numbers.
struct Random {
  std::mt19937 source{1};

  std::vector<uint16_t> bf16s(int64_t count, float spread) {
    std::normal_distribution<float> normal(0, spread);
    std::vector<uint16_t> made(count);
    for (auto& value : made) {
      float wide = normal(source);
      uint32_t bits;
      std::memcpy(&bits, &wide, 4);
      value = static_cast<uint16_t>(bits >> 16);
    }
    return made;
  }
  std::vector<uint8_t> bytes(int64_t count, int below) {
    std::vector<uint8_t> made(count);
    for (auto& value : made) value = static_cast<uint8_t>(1 + source() % below);
    return made;
  }
};

// Write tokens through `mg_qkv`, attend to them, and return the outputs.
std::vector<float> attend(void* library, CacheFormat format, Random random) {
  auto* qkv = function<void(int32_t, int32_t, int32_t, int32_t, int32_t, void*, void*,
                            const int32_t*, const void*, const void*, const float*, const float*,
                            int64_t, int32_t, float)>(library, "mg_qkv");
  auto* attention = function<void(int32_t, int32_t, int32_t, int32_t, int32_t, const void*, int64_t,
                                  void*, const void*, const int32_t*, int64_t, const int32_t*,
                                  int32_t, int32_t, float)>(library, "mg_paged_attention");
  constexpr int tokens = 300, heads = 4, kv_heads = 2, width = 32, block = 16, rows = 40;
  constexpr int stride = (heads + 2 * kv_heads) * width;
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> fused(tokens * stride), norm(width, 1.5f), angles(tokens * width / 2, 0.6f);
  for (float& x : fused) x = normal(random.source);
  std::vector<int32_t> slots(tokens), table(tokens / block + 1);
  for (int i = 0; i < tokens; ++i) slots[i] = i;
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  std::vector<uint8_t> cache(table.size() * block * kv_heads * (2 * width * 4 + 8));
  qkv(kFloat32, format, block, kv_heads, width, fused.data(), cache.data(), slots.data(),
      norm.data(), norm.data(), angles.data(), angles.data(), tokens, heads, 1e-5f);
  const int32_t chunk[] = {0, rows, tokens - rows, 0};
  std::vector<float> output(rows * heads * width);
  attention(kFloat32, format, block, kv_heads, width, fused.data() + (tokens - rows) * stride,
            stride, output.data(), cache.data(), chunk, 1, table.data(), heads, 0, 0.2f);
  return output;
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return std::puts(dlerror()), 1;
  auto* levels = function<int32_t()>(library, "mg_levels");
  auto* name = function<const char*(int32_t)>(library, "mg_level_name");
  auto* runs = function<int32_t(int32_t)>(library, "mg_level_runs");
  auto* use = function<void(int32_t)>(library, "mg_use_level");
  auto* linear = function<int32_t(const PackedWeight*, int32_t, int32_t, const void*, void*, int64_t,
                                  int32_t)>(library, "mg_linear");
  auto* norm = function<void(int32_t, const void*, void*, const void*, void*, int64_t, int64_t,
                             float)>(library, "mg_rms_norm");

  constexpr int64_t inputs = 256, outputs = 100, columns = 128;
  Random random;
  auto bf16 = random.bf16s(columns * inputs, 0.1f), scale4 = random.bf16s(columns * 8, 0.1f);
  auto int8 = random.bytes(columns * inputs, 255), int4 = random.bytes(columns * inputs / 2, 255);
  auto zero = random.bytes(columns * 8, 15);
  std::vector<float> scale8(columns, 0.01f), bias(columns, 0.5f);
  const PackedWeight weights[] = {
      {kWeightBFloat16, 32, inputs, outputs, bf16.data(), nullptr, nullptr, bias.data()},
      {kWeightInt8, 128, inputs, outputs, int8.data(), scale8.data(), nullptr, bias.data()},
      {kWeightInt4, 32, inputs, outputs, int4.data(), scale4.data(), nullptr, bias.data()},
      {kWeightInt4, 32, inputs, outputs, int4.data(), scale4.data(), zero.data(), nullptr},
  };
  int wrong = 0;
  for (int32_t level = 0; level < levels(); ++level) {
    if (!runs(level)) {
      std::printf("%s does not run here\n", name(level));
      continue;
    }
    double worst = 0, attended = 0;
    for (int64_t rows : {1, 2, 3, 4, 5, 7, 9})
      for (const PackedWeight& weight : weights)
        for (int32_t digits : {1, 2}) {
          if (weight.kind == kWeightBFloat16 && digits == 2) continue;
          auto x = random.bf16s(rows * inputs, 1);
          std::vector<float> expected(rows * outputs), found(rows * outputs);
          use(0);
          linear(&weight, kBFloat16, kFloat32, x.data(), expected.data(), rows, digits);
          use(level);
          linear(&weight, kBFloat16, kFloat32, x.data(), found.data(), rows, digits);
          for (size_t i = 0; i < found.size(); ++i)
            worst = std::fmax(worst, std::fabs(found[i] - expected[i]) / (1 + std::fabs(expected[i])));
        }
    auto x = random.bf16s(3 * 37, 1), weight = random.bf16s(37, 1);
    std::vector<uint16_t> expected(3 * 37), found(3 * 37);
    use(0);
    norm(kBFloat16, x.data(), nullptr, weight.data(), expected.data(), 3, 37, 1e-5f);
    use(level);
    norm(kBFloat16, x.data(), nullptr, weight.data(), found.data(), 3, 37, 1e-5f);
    int norms = 0;
    for (size_t i = 0; i < found.size(); ++i) norms += std::abs(found[i] - expected[i]) > 1;
    for (CacheFormat format : {kCacheFloat32, kCacheBFloat16, kCacheInt8}) {
      use(0);
      std::vector<float> first = attend(library, format, random);
      use(level);
      std::vector<float> second = attend(library, format, random);
      for (size_t i = 0; i < first.size(); ++i)
        attended = std::fmax(attended, std::fabs(first[i] - second[i]));
    }
    std::printf("%s differs by %.2g, %.2g in attention, %d norms\n", name(level), worst, attended, norms);
    // A key in bfloat16 or int8 may round the other way.
    wrong += !(worst < 1e-4) + !(attended < 2e-2) + norms;
  }
  return wrong;
}
