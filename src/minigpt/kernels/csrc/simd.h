// One vector of fp32 per instruction set, under one name: `Vec`, `Vec::width` lanes.
// Kernels are written over it; where an instruction set has something better (dot products of
// bf16 or int8), the kernel says so itself under its own #if.
#pragma once

#include <cstring>

#include "types.h"

#if MG_AVX2 || MG_AVX512 || MG_AMX
#include <immintrin.h>
#elif MG_NEON
#include <arm_neon.h>
#endif

namespace mg::MG_LEVEL {

inline float to_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline float to_float(float x) { return x; }

// Round to nearest even; a NaN stays one.
inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline void put(float* to, float x) { *to = x; }
inline void put(bf16* to, float x) { *to = to_bf16(x); }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The first of `count` things that part `part` of `parts` does; its last is the next one's first.
inline int64_t first_of(int64_t count, int part, int parts) { return count * part / parts; }

#if MG_AVX512 || MG_AMX

struct Vec {
  static constexpr int width = 16;
  __m512 v;
};
inline __mmask16 lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec widen(__m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
inline Vec load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p)); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, lanes(n), a.v); }
inline void store(bf16* p, Vec a) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v));
}
inline void store(bf16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, lanes(n), (__m256i)_mm512_cvtneps_pbh(a.v));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec largest(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

#elif MG_AVX2

struct Vec {
  static constexpr int width = 8;
  __m256 v;
};
inline __m256i lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec splat(float x) { return {_mm256_set1_ps(x)}; }
inline Vec widen(__m128i x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, lanes(n))}; }
inline Vec load(const bf16* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
inline Vec load(const bf16* p, int n) {
  bf16 copy[8] = {};
  std::memcpy(copy, p, n * sizeof(bf16));
  return load(copy);
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, lanes(n), a.v); }
inline void store(bf16* p, Vec a) {
  __m256i bits = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
inline void store(bf16* p, Vec a, int n) {
  bf16 copy[8];
  store(copy, a);
  std::memcpy(p, copy, n * sizeof(bf16));
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec largest(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest(Vec a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

#elif MG_NEON

struct Vec {
  static constexpr int width = 4;
  float32x4_t v;
};
inline Vec zero() { return {vdupq_n_f32(0)}; }
inline Vec splat(float x) { return {vdupq_n_f32(x)}; }
inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline Vec load(const bf16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16))};
}
template <class T>
inline Vec load(const T* p, int n) {
  T copy[4] = {};
  std::memcpy(copy, p, n * sizeof(T));
  return load(copy);
}
inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }
inline void store(bf16* p, Vec a) {
  float copy[4];
  vst1q_f32(copy, a.v);
  for (int i = 0; i < 4; ++i) p[i] = to_bf16(copy[i]);
}
template <class T>
inline void store(T* p, Vec a, int n) {
  T copy[4];
  store(copy, a);
  std::memcpy(p, copy, n * sizeof(T));
}
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec largest(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline float sum(Vec a) { return vaddvq_f32(a.v); }
inline float largest(Vec a) { return vmaxvq_f32(a.v); }

#else  // Portable: plain loops, which a compiler vectorizes with whatever its baseline has.

struct Vec {
  static constexpr int width = 4;
  float v[4];
};
template <class F>
inline Vec each(F f) {
  Vec made;
  for (int i = 0; i < 4; ++i) made.v[i] = f(i);
  return made;
}
inline Vec splat(float x) { return each([&](int) { return x; }); }
inline Vec zero() { return splat(0); }
template <class T>
inline Vec load(const T* p) {
  return each([&](int i) { return to_float(p[i]); });
}
template <class T>
inline Vec load(const T* p, int n) {
  return each([&](int i) { return i < n ? to_float(p[i]) : 0; });
}
template <class T>
inline void store(T* p, Vec a, int n = 4) {
  for (int i = 0; i < n; ++i) put(p + i, a.v[i]);
}
inline Vec operator+(Vec a, Vec b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Vec operator-(Vec a, Vec b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline Vec operator*(Vec a, Vec b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Vec operator/(Vec a, Vec b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Vec largest(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline float sum(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
inline float largest(Vec a) {
  float low = a.v[0] > a.v[1] ? a.v[0] : a.v[1], high = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return low > high ? low : high;
}

#endif

}  // namespace mg::MG_LEVEL
