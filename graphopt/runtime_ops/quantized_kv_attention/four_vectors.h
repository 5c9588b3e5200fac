// Four vectors become four numbers: together that takes fewer steps than one after the other. Only for simd.cc.
#pragma once

#include "simd.h"

namespace graphopt::quantized_kv_attention::GRAPHOPT_ISA {
namespace {

using namespace graphopt::GRAPHOPT_ISA;

// The sums of four vectors.
GRAPHOPT_INLINE void four_sums(F a, F b, F c, F d, float* to) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
  const __m512 all = _mm512_add_ps((__m512)low, (__m512)high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  to[0] = sum(a);
  to[1] = sum(b);
  to[2] = sum(c);
  to[3] = sum(d);
#endif
}

// The largest numbers of four vectors.
GRAPHOPT_INLINE void four_largest(F a, F b, F c, F d, float* to) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
  const __m512 all = _mm512_max_ps((__m512)low, (__m512)high);
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  to[0] = largest(a);
  to[1] = largest(b);
  to[2] = largest(c);
  to[3] = largest(d);
#endif
}

}  // namespace
}  // namespace graphopt::quantized_kv_attention::GRAPHOPT_ISA
