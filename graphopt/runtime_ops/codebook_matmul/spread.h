// Indices of any width out of their bytes, and the entries of a codebook that they stand for.
// Part of simd.cc: compiled for each set of instructions.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace graphopt::codebook_matmul::GRAPHOPT_ISA {

void unpack(const uint8_t* row, int64_t row_bytes, int bits, int64_t first, int64_t count, uint16_t* to) {
  if (bits == 8) {
    for (int64_t i = 0; i < count; ++i) to[i] = row[first + i];
    return;
  }
  const uint32_t mask = (1u << bits) - 1;
  int64_t bit = first * bits;
  for (int64_t i = 0; i < count; ++i, bit += bits) {
    const int64_t byte = bit >> 3;
    uint32_t word = 0;
    if (byte + 4 <= row_bytes) {
      std::memcpy(&word, row + byte, 4);  // little-endian, as all machines that this is compiled for are
    } else {
      for (int64_t j = 0; byte + j < row_bytes; ++j) word |= uint32_t(row[byte + j]) << 8 * j;
    }
    to[i] = uint16_t(word >> (bit & 7) & mask);
  }
}

using Four = float __attribute__((vector_size(16)));
using Eight = float __attribute__((vector_size(32)));

// Entries as wide as a vector V.
template <typename V>
GRAPHOPT_INLINE int64_t spread_entries(const uint16_t* index, int64_t count, const float* book, int64_t entry, float scale,
                                       float* to) {
  for (int64_t i = 0; i < count; ++i, to += sizeof(V) / sizeof(float)) {
    V numbers;
    std::memcpy(&numbers, book + index[i] * entry, sizeof numbers);
    numbers *= scale;
    std::memcpy(to, &numbers, sizeof numbers);
  }
  return count;
}

// to[i · width + j] = scale · book[index[i] · entry + j].
GRAPHOPT_INLINE void spread_group(const uint16_t* index, int64_t count, const float* book, int64_t entry, int64_t width,
                                  float scale, float* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512 factor = _mm512_set1_ps(scale);
  if (width == 1) {
    const __m512i step = _mm512_set1_epi32(int32_t(entry));
    for (; i + 16 <= count; i += 16) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(index + i)));
      const __m512i at = entry == 1 ? wide : _mm512_mullo_epi32(wide, step);
      _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_i32gather_ps(at, book, 4), factor));
    }
  } else if (width == 2 && entry == 2) {
    for (; i + 8 <= count; i += 8) {
      const __m256i at = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(index + i)));
      const __m512 pairs = _mm512_castpd_ps(_mm512_i32gather_pd(at, book, 8));
      _mm512_storeu_ps(to + 2 * i, _mm512_mul_ps(pairs, factor));
    }
  }
#elif defined(__AVX2__)
  if (width == 1) {
    const __m256i step = _mm256_set1_epi32(int32_t(entry));
    for (; i + 8 <= count; i += 8) {
      const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(index + i)));
      const __m256 found = _mm256_i32gather_ps(book, _mm256_mullo_epi32(wide, step), 4);
      _mm256_storeu_ps(to + i, _mm256_mul_ps(found, _mm256_set1_ps(scale)));
    }
  }
#endif
  if (width == 4) i = spread_entries<Four>(index, count, book, entry, scale, to);
  if (width == 8) i = spread_entries<Eight>(index, count, book, entry, scale, to);
  for (; i < count; ++i) {
    for (int64_t j = 0; j < width; ++j) to[i * width + j] = book[index[i] * entry + j] * scale;
  }
}

void spread(const Tiles& tiles, const uint16_t* index, int64_t first, int64_t count, float* to) {
  for (int64_t at = 0; at < count;) {
    const int64_t group = (first + at) / tiles.group, left = (group + 1) * tiles.group - first - at;
    const int64_t here = left < count - at ? left : count - at;
    const float* numbers = tiles.numbers + (tiles.books != nullptr ? tiles.books[group] * tiles.book_size : 0);
    const float scale = tiles.half_scales ? half_to_float(static_cast<const uint16_t*>(tiles.scales)[group])
                                          : static_cast<const float*>(tiles.scales)[group];
    spread_group(index + at, here, numbers, tiles.entry_size, tiles.width, scale, to + at * tiles.width);
    at += here;
  }
}

}  // namespace graphopt::codebook_matmul::GRAPHOPT_ISA
