// Which levels this library has, which of them this machine runs, and which is in use.
#include "run.h"

#if __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif __aarch64__ && __linux__
#include <sys/auxv.h>
#endif

namespace mg {

#define MG_DECLARE(level) \
  namespace level {       \
  extern const Table level_table; \
  }

namespace {

bool always() { return true; }

#if __x86_64__

bool avx2_runs() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool avx512_runs() {
  return avx2_runs() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

// The processor must have tiles, and Linux must let this process use their registers.
bool amx_runs() {
  unsigned a, b, c, d;
  if (!avx512_runs() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bf16_bit = 1u << 22, tile_bit = 1u << 24, int8_bit = 1u << 25;
  constexpr unsigned all = bf16_bit | tile_bit | int8_bit;
  if ((d & all) != all) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

#elif __aarch64__ && __linux__

bool neon_runs() {
  constexpr unsigned long dotprod = 1ul << 20, bfloat16 = 1ul << 14;
  return (getauxval(AT_HWCAP) & dotprod) && (getauxval(AT_HWCAP2) & bfloat16);
}

#endif

}  // namespace

MG_DECLARE(scalar)
#if MG_HAS_AVX2
MG_DECLARE(avx2)
#endif
#if MG_HAS_AVX512
MG_DECLARE(avx512)
#endif
#if MG_HAS_AMX
MG_DECLARE(amx)
#endif
#if MG_HAS_NEON
MG_DECLARE(neon)
#endif

namespace {

// Slowest first: the last that runs is taken.
const Level kLevels[] = {
    {"scalar", &scalar::level_table, always},
#if MG_HAS_AVX2
    {"avx2", &avx2::level_table, avx2_runs},
#endif
#if MG_HAS_AVX512
    {"avx512", &avx512::level_table, avx512_runs},
#endif
#if MG_HAS_AMX
    {"amx", &amx::level_table, amx_runs},
#endif
#if MG_HAS_NEON
    {"neon", &neon::level_table, neon_runs},
#endif
};
constexpr int kCount = sizeof(kLevels) / sizeof(kLevels[0]);
const Level* in_use = &kLevels[0];

}  // namespace

const Table& table() { return *in_use->table; }

}  // namespace mg

using namespace mg;

// Changes with the signature of any exported function; `library.py` refuses another number.
MG_API int32_t mg_interface() { return 2; }

MG_API int32_t mg_levels() { return kCount; }
MG_API const char* mg_level_name(int32_t level) { return kLevels[level].name; }
MG_API int32_t mg_level_runs(int32_t level) { return kLevels[level].runs(); }
MG_API int32_t mg_level_in_use() { return static_cast<int32_t>(in_use - kLevels); }
MG_API void mg_use_level(int32_t level) { in_use = &kLevels[level]; }
MG_API int32_t mg_threads() { return omp_get_max_threads(); }
