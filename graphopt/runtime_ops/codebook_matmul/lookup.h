// Indices of 2, 3 and 4 bits out of their bytes, and the numbers that they stand for, a vector at a time.
// Part of simd.cc: compiled for each set of instructions.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace graphopt::codebook_matmul::GRAPHOPT_ISA {

using namespace graphopt::GRAPHOPT_ISA;

// Bytes that weights are fetched into the second cache before they are read. Rows lie behind one another, so that what
// is beyond the end of a row is wanted soon too.
constexpr int64_t kAhead = 16384, kScalesAhead = 4096;

GRAPHOPT_INLINE void fetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// The codebook of a group.
GRAPHOPT_INLINE int64_t book(const Narrow& weights, int64_t row, int64_t group) {
  if (weights.selectors != nullptr) return weights.selectors[row * weights.groups + group];
  return weights.table_of_row ? row : 0;
}

// The indices of 8 columns in each lane, the first in the lowest bits. Reads kLanes · bits bytes, no more.
template <int bits>
GRAPHOPT_INLINE I indices(const uint8_t* from) {
  if constexpr (bits == 4) {
    I made;
    std::memcpy(&made, from, sizeof made);
    return made;
  }
#if defined(__AVX512F__)
  if constexpr (bits == 3) {
    // Three words into each quarter, then three bytes into each lane.
    const __m512i words = _mm512_maskz_loadu_epi32(0x0fff, from);
    const __m512i quarters =
        _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11), words);
    const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    return (I)_mm512_shuffle_epi8(quarters, places);
  } else if constexpr (bits == 2) {
    return (I)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  }
#elif defined(__AVX2__)
  if constexpr (bits == 3) {
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)from)),
                                                 _mm_loadu_si128((const __m128i*)(from + 8)), 1);
    const __m256i places = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                            4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
    return (I)_mm256_shuffle_epi8(both, places);
  } else if constexpr (bits == 2) {
    return (I)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  }
#endif
  I made = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int byte = 0; byte < bits; ++byte) made[lane] |= int32_t(uint32_t(from[lane * bits + byte]) << 8 * byte);
  }
  return made;
}

// A codebook in registers.
struct Table {
#if defined(__AVX512F__)
  F numbers;
#elif defined(__AVX2__)
  F low, high;
#else
  const float* numbers;
#endif
};

GRAPHOPT_INLINE Table table(const float* from) {
#if defined(__AVX512F__)
  return {load(from)};
#elif defined(__AVX2__)
  return {load(from), load(from + 8)};
#else
  return {from};
#endif
}

// The number for the lowest bits of each lane; of an index of fewer bits than 4 those above it don't matter, since the
// table is repeated.
template <int bits>
GRAPHOPT_INLINE F numbers(const Table& table, I index) {
#if defined(__AVX512F__)
  return (F)_mm512_permutexvar_ps((__m512i)index, (__m512)table.numbers);
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps((__m256)table.low, (__m256i)index);
  if constexpr (bits < 4) return (F)low;
  const __m256 high = _mm256_permutevar8x32_ps((__m256)table.high, (__m256i)index);
  return (F)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)index, 28)));
#else
  F made = {};
  for (int lane = 0; lane < kLanes; ++lane) made[lane] = table.numbers[index[lane] & ((1 << bits) - 1)];
  return made;
#endif
}

// Scales of the lanes: from[lane_group[j]]. Reads kLanes of them from `from` on.
GRAPHOPT_INLINE F scales(const float* from, const int32_t* lane_group) {
#if defined(__AVX512F__)
  return (F)_mm512_permutexvar_ps(_mm512_loadu_si512(lane_group), (__m512)load(from));
#elif defined(__AVX2__)
  return (F)_mm256_permutevar8x32_ps((__m256)load(from), _mm256_loadu_si256((const __m256i*)lane_group));
#else
  F made = {};
  for (int lane = 0; lane < kLanes; ++lane) made[lane] = from[lane_group[lane]];
  return made;
#endif
}

GRAPHOPT_INLINE F scales(const uint16_t* from, const int32_t* lane_group) {
#if defined(__AVX512F__)
  const __m512 loaded = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
  return (F)_mm512_permutexvar_ps(_mm512_loadu_si512(lane_group), loaded);
#elif defined(__AVX2__)
  const __m256 loaded = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
  return (F)_mm256_permutevar8x32_ps(loaded, _mm256_loadu_si256((const __m256i*)lane_group));
#else
  F made = {};
  for (int lane = 0; lane < kLanes; ++lane) made[lane] = half_to_float(from[lane_group[lane]]);
  return made;
#endif
}

}  // namespace graphopt::codebook_matmul::GRAPHOPT_ISA
