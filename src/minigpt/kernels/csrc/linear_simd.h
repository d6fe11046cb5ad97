// What the matrix products need of an instruction set beyond `Vec`: halves of bf16 pairs widened,
// vectors of int32, and dot products of four bytes.
#pragma once

#include "simd.h"

namespace mg::MG_LEVEL {

// Rows of the tiles that there are. Up to kWideRows of them (rows times digits) stand beside
// kTileVectors vectors of columns, up to kTallRows beside half as many: so many sums fit the
// registers.
#if MG_AVX512 || MG_AMX
constexpr int kRegisters = 32, kTileVectors = 4, kWideRows = 6, kTallRows = 12;
#define MG_TILE_ROWS 1, 2, 3, 4, 6, 8, 12
#define MG_TILE_ROWS_OF_TWO_DIGITS 1, 2, 3, 4, 6
#elif MG_AVX2
constexpr int kRegisters = 16, kTileVectors = 2, kWideRows = 4, kTallRows = 4;
#define MG_TILE_ROWS 1, 2, 3, 4
#define MG_TILE_ROWS_OF_TWO_DIGITS 1, 2
#elif MG_NEON
constexpr int kRegisters = 32, kTileVectors = 4, kWideRows = 4, kTallRows = 4;
#define MG_TILE_ROWS 1, 2, 3, 4
#define MG_TILE_ROWS_OF_TWO_DIGITS 1, 2
#else
constexpr int kRegisters = 16, kTileVectors = 2, kWideRows = 2, kTallRows = 2;
#define MG_TILE_ROWS 1, 2
#define MG_TILE_ROWS_OF_TWO_DIGITS 1
#endif

// How far ahead of their use weights are fetched, in bytes: from memory to the second cache, and
// from there to the first. Measured: 90 % of the read bandwidth at one row with the first alone,
// 95 % with both; 80 and 87 % at four rows.
constexpr int kFetchDistance = 8192;
constexpr int kFetchNear = 1024;
constexpr int kFetchLocality = 2;

#if MG_AVX512 || MG_AMX

// The first or second bf16 of each of 16 pairs.
inline Vec first_halves(const uint32_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
inline Vec second_halves(const uint32_t* p) {
  __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), high))};
}

struct Ints {
  __m512i v;
};
using Bytes = __m512i;
constexpr int kInt8Zero = 128;  // what dot() leaves in of the weights' offset
inline Ints splat_int(int x) { return {_mm512_set1_epi32(x)}; }
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_halves(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
inline Bytes high_halves(Bytes b) { return low_halves(_mm512_srli_epi16(b, 4)); }
// Add to each lane the product of its four unsigned weights and the four signed inputs at p.
inline Ints dot(Ints sum, Bytes weights, const uint32_t* p) {
  __m512i inputs = _mm512_set1_epi32(static_cast<int>(*p));
  // As _mm512_dpbusd_epi32, for which GCC 12 copies the sum around and runs out of registers.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(weights), "v"(inputs));
  return sum;
}
inline Ints dot_nibbles(Ints sum, Bytes weights, const uint32_t* p) { return dot(sum, weights, p); }
inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline Ints two_digits(Ints high, Ints low) {
  return {_mm512_add_epi32(_mm512_slli_epi32(high.v, 8), low.v)};
}
inline Ints load_ints(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))};
}
inline Vec to_vec(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }

#elif MG_AVX2

inline Vec first_halves(const uint32_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16))};
}
inline Vec second_halves(const uint32_t* p) {
  __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), high))};
}

struct Ints {
  __m256i v;
};
using Bytes = __m256i;
constexpr int kInt8Zero = 0;
inline Ints splat_int(int x) { return {_mm256_set1_epi32(x)}; }
inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Bytes low_halves(Bytes b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
inline Bytes high_halves(Bytes b) { return low_halves(_mm256_srli_epi16(b, 4)); }
inline Ints add_products(Ints sum, __m256i unsigned_bytes, __m256i signed_bytes) {
  __m256i pairs = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
// Sums of two products must fit 16 bits: 2 * 255 * 128 does not, 2 * 127 * 128 does. So the
// weights' offset is taken off, and the inputs' sign moved to the weights: these are never -128.
inline Ints dot(Ints sum, Bytes weights, const uint32_t* p) {
  __m256i w = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
  __m256i x = _mm256_set1_epi32(static_cast<int>(*p));
  return add_products(sum, _mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
}
inline Ints dot_nibbles(Ints sum, Bytes weights, const uint32_t* p) {
  return add_products(sum, weights, _mm256_set1_epi32(static_cast<int>(*p)));
}
inline Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline Ints operator*(Ints a, Ints b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline Ints two_digits(Ints high, Ints low) {
  return {_mm256_add_epi32(_mm256_slli_epi32(high.v, 8), low.v)};
}
inline Ints load_ints(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))};
}
inline Vec to_vec(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }

#elif MG_NEON

inline Vec first_halves(const uint32_t* p) {
  return {vreinterpretq_f32_u32(vshlq_n_u32(vld1q_u32(p), 16))};
}
inline Vec second_halves(const uint32_t* p) {
  return {vreinterpretq_f32_u32(vandq_u32(vld1q_u32(p), vdupq_n_u32(0xffff0000)))};
}

struct Ints {
  int32x4_t v;
};
using Bytes = uint8x16_t;
constexpr int kInt8Zero = 0;
inline Ints splat_int(int x) { return {vdupq_n_s32(x)}; }
inline Bytes load_bytes(const uint8_t* p) { return vld1q_u8(p); }
inline Bytes low_halves(Bytes b) { return vandq_u8(b, vdupq_n_u8(15)); }
inline Bytes high_halves(Bytes b) { return vshrq_n_u8(b, 4); }
inline Ints dot_nibbles(Ints sum, Bytes weights, const uint32_t* p) {
  int8x16_t inputs = vreinterpretq_s8_u32(vdupq_n_u32(*p));
  return {vdotq_s32(sum.v, vreinterpretq_s8_u8(weights), inputs)};
}
inline Ints dot(Ints sum, Bytes weights, const uint32_t* p) {
  return dot_nibbles(sum, veorq_u8(weights, vdupq_n_u8(128)), p);
}
inline Ints operator-(Ints a, Ints b) { return {vsubq_s32(a.v, b.v)}; }
inline Ints operator*(Ints a, Ints b) { return {vmulq_s32(a.v, b.v)}; }
inline Ints two_digits(Ints high, Ints low) {
  return {vaddq_s32(vshlq_n_s32(high.v, 8), low.v)};
}
inline Ints load_ints(const uint8_t* p) {
  int32_t wide[4] = {p[0], p[1], p[2], p[3]};
  return {vld1q_s32(wide)};
}
inline Vec to_vec(Ints a) { return {vcvtq_f32_s32(a.v)}; }

#else

inline Vec first_halves(const uint32_t* p) {
  return each([&](int i) { return to_float(bf16{static_cast<uint16_t>(p[i])}); });
}
inline Vec second_halves(const uint32_t* p) {
  return each([&](int i) { return to_float(bf16{static_cast<uint16_t>(p[i] >> 16)}); });
}

struct Ints {
  int32_t v[4];
};
struct Bytes {
  uint8_t v[16];
};
template <class F>
inline Ints each_int(F f) {
  Ints made;
  for (int i = 0; i < 4; ++i) made.v[i] = f(i);
  return made;
}
template <class F>
inline Bytes each_byte(F f) {
  Bytes made;
  for (int i = 0; i < 16; ++i) made.v[i] = static_cast<uint8_t>(f(i));
  return made;
}
constexpr int kInt8Zero = 128;
inline Ints splat_int(int x) { return each_int([&](int) { return x; }); }
inline Bytes load_bytes(const uint8_t* p) { return each_byte([&](int i) { return p[i]; }); }
inline Bytes low_halves(Bytes b) { return each_byte([&](int i) { return b.v[i] & 15; }); }
inline Bytes high_halves(Bytes b) { return each_byte([&](int i) { return b.v[i] >> 4; }); }
inline Ints dot(Ints sum, Bytes w, const uint32_t* p) {
  const int8_t* x = reinterpret_cast<const int8_t*>(p);
  return each_int([&](int i) {
    const uint8_t* four = w.v + 4 * i;
    return sum.v[i] + four[0] * x[0] + four[1] * x[1] + four[2] * x[2] + four[3] * x[3];
  });
}
inline Ints dot_nibbles(Ints sum, Bytes weights, const uint32_t* p) { return dot(sum, weights, p); }
inline Ints operator-(Ints a, Ints b) { return each_int([&](int i) { return a.v[i] - b.v[i]; }); }
inline Ints operator*(Ints a, Ints b) { return each_int([&](int i) { return a.v[i] * b.v[i]; }); }
inline Ints two_digits(Ints high, Ints low) {
  return each_int([&](int i) { return high.v[i] * 256 + low.v[i]; });
}
inline Ints load_ints(const uint8_t* p) { return each_int([&](int i) { return p[i]; }); }
inline Vec to_vec(Ints a) { return each([&](int i) { return static_cast<float>(a.v[i]); }); }

#endif

}  // namespace mg::MG_LEVEL
