// Vectors of floats from and to memory: half-precision numbers, and the first few lanes of a vector alone.
//
// Half-precision numbers are their 16 bits, `uint16_t`; they round to nearest even.
#pragma once

#include "simd.h"

namespace graphopt::GRAPHOPT_ISA {

GRAPHOPT_INLINE uint16_t half_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);   // not a number
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to more than the largest
  if (bits < 0x38800000) {                                 // below 2^-14: a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    magnitude += 0.5f;  // the unit of its last place is then 2^-24, so that the addition rounds
    std::memcpy(&bits, &magnitude, sizeof bits);
    return uint16_t(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return uint16_t(sign | ((bits - 0x38000000) >> 13));
}

GRAPHOPT_INLINE F load(const uint16_t* halves) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)halves));
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)halves));
#else
  F made;
  for (int i = 0; i < kLanes; ++i) made[i] = half_to_float(halves[i]);
  return made;
#endif
}

GRAPHOPT_INLINE void store(uint16_t* halves, F value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)halves, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)halves, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) halves[i] = half_from_float(value[i]);
#endif
}

// The first `count` numbers, fewer than kLanes; the other lanes are 0 and their memory isn't read.
GRAPHOPT_INLINE F load_first(const float* from, int64_t count) {
#if defined(__AVX512F__)
  return (F)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
#else
  F made{};
  std::memcpy(&made, from, size_t(count) * sizeof *from);
  return made;
#endif
}

GRAPHOPT_INLINE F load_first(const uint16_t* halves, int64_t count) {
  uint16_t all[kLanes] = {};
  std::memcpy(all, halves, size_t(count) * sizeof *halves);
  return load(all);
}

GRAPHOPT_INLINE void store_first(float* to, F value, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), (__m512)value);
#else
  std::memcpy(to, &value, size_t(count) * sizeof *to);
#endif
}

GRAPHOPT_INLINE void store_first(uint16_t* halves, F value, int64_t count) {
  uint16_t all[kLanes];
  store(all, value);
  std::memcpy(halves, all, size_t(count) * sizeof *halves);
}

}  // namespace graphopt::GRAPHOPT_ISA
