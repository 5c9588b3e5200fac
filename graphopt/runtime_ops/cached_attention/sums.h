// Sums across the lanes of vectors, vectors of halves, and columns of rows: for simd.cc alone, behind simd.h.
#pragma once

namespace graphopt::cached_attention::GRAPHOPT_ISA {

using namespace graphopt::GRAPHOPT_ISA;

GRAPHOPT_INLINE F read(const float* from) { return load(from); }
GRAPHOPT_INLINE F read(const uint16_t* from) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  F made;
  for (int i = 0; i < kLanes; ++i) made[i] = half_to_float(from[i]);
  return made;
#endif
}
GRAPHOPT_INLINE float number(float value) { return value; }
GRAPHOPT_INLINE float number(uint16_t value) { return half_to_float(value); }

// One number in all lanes, by a load: from a register it would take the place of a product.
GRAPHOPT_INLINE F spread(const float* from) {
#if defined(__AVX512F__)
  return (F)_mm512_set1_ps(*from);
#elif defined(__AVX2__)
  return (F)_mm256_broadcast_ss(from);
#else
  return all(*from);
#endif
}

// Lane i becomes the sum of the lanes of values[i].
GRAPHOPT_INLINE F sums(const F (&values)[kLanes]) {
#if defined(__AVX512F__)
  // Two vectors become one at every step, so that there are as many additions as vectors. What comes out is in the
  // order 0 8 4 12 of fours and 0 2 1 3 within each, so they go in in the order that undoes it.
  constexpr int kOrder[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
  __m512 v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = (__m512)values[kOrder[i]];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 4], 0x88), _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    v[i] = _mm512_add_ps(_mm512_shuffle_ps(v[i], v[i + 2], 0x44), _mm512_shuffle_ps(v[i], v[i + 2], 0xee));
  }
  return (F)_mm512_add_ps(_mm512_shuffle_ps(v[0], v[1], 0x88), _mm512_shuffle_ps(v[0], v[1], 0xdd));
#elif defined(__AVX2__)
  constexpr int kOrder[8] = {0, 2, 1, 3, 4, 6, 5, 7};
  __m256 v[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = (__m256)values[kOrder[i]];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_add_ps(_mm256_permute2f128_ps(v[i], v[i + 4], 0x20), _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    v[i] = _mm256_add_ps(_mm256_shuffle_ps(v[i], v[i + 2], 0x44), _mm256_shuffle_ps(v[i], v[i + 2], 0xee));
  }
  return (F)_mm256_add_ps(_mm256_shuffle_ps(v[0], v[1], 0x88), _mm256_shuffle_ps(v[0], v[1], 0xdd));
#else
  F made;
  for (int i = 0; i < kLanes; ++i) made[i] = sum(values[i]);
  return made;
#endif
}

// Lane j of values[i] becomes lane i of values[j].
GRAPHOPT_INLINE void transpose(F (&values)[kLanes]) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)values[i], (__m512)values[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)values[i], (__m512)values[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 low = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), high = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    const __m512 low2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    const __m512 high2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    values[i] = (F)_mm512_shuffle_f32x4(low, low2, 0x88);
    values[i + 4] = (F)_mm512_shuffle_f32x4(high, high2, 0x88);
    values[i + 8] = (F)_mm512_shuffle_f32x4(low, low2, 0xdd);
    values[i + 12] = (F)_mm512_shuffle_f32x4(high, high2, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)values[i], (__m256)values[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)values[i], (__m256)values[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    values[i] = (F)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    values[i + 4] = (F)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float kept = values[i][j];
      values[i][j] = values[j][i];
      values[j][i] = kept;
    }
  }
#endif
}

// Scores with a cap c become c tanh(score / c).
GRAPHOPT_INLINE F capped(F score, float cap) {
  const F power = exponential(score * all(2.0f / cap));
  return all(cap) - all(2.0f * cap) / (power + all(1.0f));
}

}  // namespace graphopt::cached_attention::GRAPHOPT_ISA
