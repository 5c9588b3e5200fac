// Vectors of whatever width the instructions at hand have, for the simd.cc files (see isa.h).
//
// `F` holds kLanes floats and `I` as many 32-bit integers; they add and multiply as numbers do.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define GRAPHOPT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define GRAPHOPT_VECTOR_BYTES 32
#else
#define GRAPHOPT_VECTOR_BYTES 16
#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <immintrin.h>
#endif
#endif

#define GRAPHOPT_INLINE static inline __attribute__((always_inline))

namespace graphopt::GRAPHOPT_ISA {

using F = float __attribute__((vector_size(GRAPHOPT_VECTOR_BYTES)));
using I = int32_t __attribute__((vector_size(GRAPHOPT_VECTOR_BYTES)));
constexpr int kLanes = GRAPHOPT_VECTOR_BYTES / 4;

GRAPHOPT_INLINE F load(const float* from) {
  F made;
  std::memcpy(&made, from, sizeof made);
  return made;
}
GRAPHOPT_INLINE void store(float* to, F value) { std::memcpy(to, &value, sizeof value); }
GRAPHOPT_INLINE F all(float value) { return value - F{}; }  // 0 + value would have to make 0 of -0
GRAPHOPT_INLINE F to_float(I value) { return __builtin_convertvector(value, F); }

GRAPHOPT_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

GRAPHOPT_INLINE F larger(F a, F b) { return a > b ? a : b; }

// e^x, to 2 units of the last place.
GRAPHOPT_INLINE F exponential(F x) {
  const F low = all(-87.3f), high = all(88.7f);
  const F bounded = x < low ? low : x > high ? high : x;  // what is no number stays none
  const F shifted = fma(bounded, all(1.44269504f), all(12582912.0f));
  const F whole = shifted - all(12582912.0f);
  F rest = fma(whole, all(-0.693359375f), bounded);
  rest = fma(whole, all(2.12194440e-4f), rest);
  F p = all(1.9875691500e-4f);
  p = fma(p, rest, all(1.3981999507e-3f));
  p = fma(p, rest, all(8.3334519073e-3f));
  p = fma(p, rest, all(4.1665795894e-2f));
  p = fma(p, rest, all(1.6666665459e-1f));
  p = fma(p, rest, all(5.0000001201e-1f));
  p = fma(p, rest * rest, rest + all(1.0f));
  const I power = (__builtin_convertvector(whole, I) + 127) << 23;
  F scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

GRAPHOPT_INLINE float sum(F value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += value[i];
  return total;
#endif
}

GRAPHOPT_INLINE float largest(F value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)value);
#else
  float found = value[0];
  for (int i = 1; i < kLanes; ++i) found = value[i] > found ? value[i] : found;
  return found;
#endif
}

GRAPHOPT_INLINE int32_t sum(I value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)value);
#else
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += value[i];
  return total;
#endif
}

// acc + the products of unsigned and signed bytes, four by four: lane i takes bytes 4i to 4i + 3 of both. Exact where
// each pair of products fits 16 bits (unsigned bytes of up to 127, or signed ones of up to 63 beside larger).
GRAPHOPT_INLINE I dot(I acc, const uint8_t* unsigned_bytes, const int8_t* signed_bytes) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpbusd_epi32((__m512i)acc, _mm512_loadu_si512(unsigned_bytes), _mm512_loadu_si512(signed_bytes));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i*)unsigned_bytes),
                                             _mm256_loadu_si256((const __m256i*)signed_bytes));
  return acc + (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  I made = acc;
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < 4; ++j) made[i] += int32_t(unsigned_bytes[4 * i + j]) * signed_bytes[4 * i + j];
  }
  return made;
#endif
}

GRAPHOPT_INLINE void prefetch(const void* at) { __builtin_prefetch(at); }

// A half-precision number as its 16 bits.
GRAPHOPT_INLINE float half_to_float(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  uint32_t bits;
  float made;
  if ((half & 0x7c00) == 0x7c00) {
    bits = sign | 0x7f800000 | magnitude;
  } else {
    // Numbers below 2^-14 have no leading one: scaled by an exact power of two, both kinds come out right.
    std::memcpy(&made, &magnitude, sizeof made);
    made *= 0x1p112f;
    std::memcpy(&bits, &made, sizeof bits);
    bits |= sign;
  }
  std::memcpy(&made, &bits, sizeof made);
  return made;
#endif
}

}  // namespace graphopt::GRAPHOPT_ISA
