// Beyond arithmetic: exp, and vectors of the numbers that the cache holds.
#pragma once

#include "simd.h"

namespace mg::MG_LEVEL {

// Neighbours in memory taken apart: as many pairs as a Vec has lanes.
struct Pairs {
  Vec even, odd;
};

// `round` to the nearest whole number; `times_power_of_two(x, n)` for whole n that leaves x
// normal; `unless_below(x, at, low)`: x, or 0 where at < low.
#if MG_AVX512 || MG_AMX

inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline Vec times_power_of_two(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec unless_below(Vec x, Vec at, Vec low) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(at.v, low.v, _CMP_NLT_UQ), x.v)};
}
inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}

inline Pairs load_pairs(const bf16* p) {
  __m512i bits = _mm512_loadu_si512(p), high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(bits, high))}};
}

#elif MG_AVX2

inline Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec times_power_of_two(Vec a, Vec n) {
  __m256i shifted = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), shifted))};
}
inline Vec unless_below(Vec x, Vec at, Vec low) {
  return {_mm256_and_ps(x.v, _mm256_cmp_ps(at.v, low.v, _CMP_NLT_UQ))};
}
inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
inline Pairs load_pairs(const bf16* p) {
  __m256i bits = _mm256_loadu_si256((const __m256i*)p);
  __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(bits, high))}};
}

#elif MG_NEON

inline Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
inline Vec times_power_of_two(Vec a, Vec n) {
  int32x4_t shifted = vshlq_n_s32(vcvtq_s32_f32(n.v), 23);
  return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.v), shifted))};
}
inline Vec unless_below(Vec x, Vec at, Vec low) {
  uint32x4_t below = vcltq_f32(at.v, low.v);
  return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x.v), below))};
}
inline Vec load(const int8_t* p) {
  const float wide[4] = {float(p[0]), float(p[1]), float(p[2]), float(p[3])};
  return {vld1q_f32(wide)};
}
inline Pairs load_pairs(const bf16* p) {
  uint16x4x2_t pairs = vld2_u16(&p->bits);
  return {{vreinterpretq_f32_u32(vshll_n_u16(pairs.val[0], 16))},
          {vreinterpretq_f32_u32(vshll_n_u16(pairs.val[1], 16))}};
}

#else

inline Vec round(Vec a) {
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded
  return each([&](int i) { return (a.v[i] + kWhole) - kWhole; });
}
inline Vec times_power_of_two(Vec a, Vec n) {
  return each([&](int i) {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], 4);
    bits += static_cast<uint32_t>(static_cast<int32_t>(n.v[i])) << 23;
    float scaled;
    std::memcpy(&scaled, &bits, 4);
    return scaled;
  });
}
inline Vec unless_below(Vec x, Vec at, Vec low) {
  return each([&](int i) { return at.v[i] < low.v[i] ? 0 : x.v[i]; });
}
inline Vec load(const int8_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
// By words of 32 bits: of the plain loop over 16 bits gcc 12 makes wrong code at -O3.
inline Pairs load_pairs(const bf16* p) {
  uint32_t words[4], high[4];
  std::memcpy(words, p, sizeof words);
  for (int i = 0; i < 4; ++i) {
    high[i] = words[i] & 0xffff0000u;
    words[i] <<= 16;
  }
  Pairs made;
  std::memcpy(&made.even, words, sizeof words);
  std::memcpy(&made.odd, high, sizeof high);
  return made;
}

#endif

// e^x to within 2 units in the last place. Exactly 1 at 0; exactly 0 below -86.5, where the
// result would soon no longer be a normal number; 2^127 or so above 88. A NaN stays one.
inline Vec exp(Vec x) {
  const Vec low = splat(-86.5f);
  // Of a NaN and a number `largest` returns the second.
  Vec y = splat(0) - largest(splat(-88.0f), splat(0) - largest(low, x));
  Vec n = round(y * splat(1.44269504f));
  Vec r = fma(n, splat(-0.693359375f), y);  // ln 2 in two parts: n times the first is exact
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  return unless_below(times_power_of_two(p, n), x, low);
}

}  // namespace mg::MG_LEVEL
