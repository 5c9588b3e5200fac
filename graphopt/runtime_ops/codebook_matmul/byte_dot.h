// Narrow weights with x rounded to 8 bits, four products of bytes at a time.
// Part of simd.cc: compiled for each set of instructions.
#pragma once

#include "kernels.h"
#include "lookup.h"

namespace graphopt::codebook_matmul::GRAPHOPT_ISA {

#if defined(__AVX512VNNI__)

struct Pairs {
  __m512i even, odd;
};

// The indices of a block as bytes: byte i of `even` is that of column 2i, byte i of `odd` that of column 2i + 1. Of 2
// bits both hold both indices, for tables of pairs. The highest bit of each byte is 0.
template <int bits>
GRAPHOPT_INLINE Pairs pairs(const uint8_t* from) {
  if constexpr (bits == 4) {
    const __m512i packed = _mm512_loadu_si512(from), low = _mm512_set1_epi8(15);
    return {_mm512_and_si512(packed, low), _mm512_and_si512(_mm512_srli_epi16(packed, 4), low)};
  } else if constexpr (bits == 3) {
    // Three words into each quarter; then twelve bits, the indices of four columns, into each half of a lane.
    const __m512i words = _mm512_maskz_loadu_epi32(0x0fff, from);
    const __m512i quarters =
        _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11), words);
    const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11));
    const __m512i fours = _mm512_srlv_epi16(_mm512_shuffle_epi8(quarters, places), _mm512_set1_epi32(0x00040000));
    // Two of them into each byte: the upper byte takes bits 6 to 13.
    constexpr int select = 0xca;  // the first where the mask is set, else the second
    const __m512i twos =
        _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x00ff), fours, _mm512_slli_epi16(fours, 2), select);
    const __m512i low = _mm512_set1_epi8(7);
    return {_mm512_and_si512(twos, low), _mm512_and_si512(_mm512_srli_epi16(twos, 3), low)};
  } else {
    const __m512i fours = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
    const __m512i twos = _mm512_and_si512(_mm512_or_si512(fours, _mm512_slli_epi16(fours, 4)), _mm512_set1_epi8(15));
    return {twos, twos};
  }
}

template <int bits>
struct ByteTables {
  __m512i even_high, odd_high, even_low, odd_low;
  F step, base;

  GRAPHOPT_INLINE __m512i four(const uint8_t* table) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
  }
  GRAPHOPT_INLINE ByteTables of(const ByteTable& table) {
    const __m512i high = four(table.high[0]), low = four(table.low[0]);
    // Only of 2 bits the two differ; the same register serves both otherwise.
    return {high,
            bits == 2 ? four(table.high[1]) : high,
            low,
            bits == 2 ? four(table.low[1]) : low,
            all(table.step),
            all(table.base)};
  }
};

template <int bits, int rows, typename S, bool several, bool one_byte>
GRAPHOPT_INLINE void byte_dot_rows(const Narrow& weights, int64_t first, const ByteRow& x, float* y) {
  const uint8_t* from[rows];
  const S* scales_of[rows];
  F totals[rows] = {};
  for (int r = 0; r < rows; ++r) {
    from[r] = weights.indices + (first + r) * weights.row_bytes;
    scales_of[r] = static_cast<const S*>(weights.scales) + (first + r) * weights.groups;
  }
  auto tables = ByteTables<bits>::of(weights.byte_tables[0]);
  for (int64_t block = 0; block < weights.blocks; ++block) {
    const __m512i even = _mm512_loadu_si512(x.numbers + block * 2 * 64);
    const __m512i odd = _mm512_loadu_si512(x.numbers + block * 2 * 64 + 64);
    const F steps = load(x.steps + block * kLanes), sums = load(x.sums + block * kLanes);
    const int64_t group = weights.first_group[block];
    for (int r = 0; r < rows; ++r) {
      fetch(from[r] + kAhead);
      fetch(scales_of[r] + group + kScalesAhead / int64_t(sizeof(S)));
      const Pairs index = pairs<bits>(from[r]);
      from[r] += kLanes * bits;
      if (several) tables = ByteTables<bits>::of(weights.byte_tables[book(weights, first + r, group)]);
      __m512i found =
          _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_shuffle_epi8(tables.even_high, index.even), even);
      found = _mm512_dpbusd_epi32(found, _mm512_shuffle_epi8(tables.odd_high, index.odd), odd);
      if (!one_byte) {
        found = _mm512_slli_epi32(found, 8);
        found = _mm512_dpbusd_epi32(found, _mm512_shuffle_epi8(tables.even_low, index.even), even);
        found = _mm512_dpbusd_epi32(found, _mm512_shuffle_epi8(tables.odd_low, index.odd), odd);
      }
      const F part = fma((F)_mm512_cvtepi32_ps(found), tables.step, sums * tables.base);
      totals[r] = fma(part, scales(scales_of[r] + group, weights.lane_group + block * kLanes) * steps, totals[r]);
    }
  }
  for (int r = 0; r < rows; ++r) y[r] = sum(totals[r]);
}

template <int bits, typename S, bool several, bool one_byte>
void byte_dot_of(const Narrow& weights, int64_t first, int64_t count, const ByteRow& x, float* y) {
  int64_t row = 0;
  for (; row + 4 <= count; row += 4) byte_dot_rows<bits, 4, S, several, one_byte>(weights, first + row, x, y + row);
  for (; row < count; ++row) byte_dot_rows<bits, 1, S, several, one_byte>(weights, first + row, x, y + row);
}

template <int bits, typename S>
void byte_dot_of_bits(const Narrow& weights, int64_t first, int64_t count, const ByteRow& x, float* y) {
  if (weights.selectors != nullptr || weights.table_of_row) {
    (weights.one_byte ? byte_dot_of<bits, S, true, true> : byte_dot_of<bits, S, true, false>)(weights, first, count, x,
                                                                                              y);
  } else {
    (weights.one_byte ? byte_dot_of<bits, S, false, true> : byte_dot_of<bits, S, false, false>)(weights, first, count,
                                                                                                x, y);
  }
}

template <typename S>
void byte_dot_of_scales(const Narrow& weights, int bits, int64_t first, int64_t count, const ByteRow& x, float* y) {
  (bits == 4   ? byte_dot_of_bits<4, S>
   : bits == 3 ? byte_dot_of_bits<3, S>
               : byte_dot_of_bits<2, S>)(weights, first, count, x, y);
}

void byte_dot(const Narrow& weights, int bits, int64_t first, int64_t count, const ByteRow& x, float* y) {
  (weights.half_scales ? byte_dot_of_scales<uint16_t> : byte_dot_of_scales<float>)(weights, bits, first, count, x, y);
}

#else
constexpr decltype(Kernels::byte_dot) byte_dot = nullptr;
#endif

}  // namespace graphopt::codebook_matmul::GRAPHOPT_ISA
