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
  int64_t i = 0;
#if defined(__AVX2__)
  if (bits == 12 && first % 2 == 0) {
    // Eight indices of twelve bytes: a word for each, the even ones with the next one's bits above.
    const __m128i places = _mm_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11);
    const __m128i up = _mm_set1_epi32(0x00010010);
    const uint8_t* from = row + first / 2 * 3;
    for (; i + 8 <= count && from + 16 <= row + row_bytes; i += 8, from += 12) {
      const __m128i words = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)from), places);
      _mm_storeu_si128((__m128i*)(to + i), _mm_srli_epi16(_mm_mullo_epi16(words, up), 4));
    }
  }
#endif
  const uint32_t mask = (1u << bits) - 1;
  int64_t bit = (first + i) * bits;
  for (; i < count; ++i, bit += bits) {
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
GRAPHOPT_INLINE int64_t spread_vectors(const uint16_t* index, int64_t count, const float* book, int64_t entry,
                                       float scale, float* to) {
  for (int64_t i = 0; i < count; ++i, to += sizeof(V) / sizeof(float)) {
    V numbers;
    std::memcpy(&numbers, book + index[i] * entry, sizeof numbers);
    numbers *= scale;
    std::memcpy(to, &numbers, sizeof numbers);
  }
  return count;
}

#if defined(__AVX2__)
// Single numbers and pairs of them, as many as fill vectors; returns how many indices that took.
template <int width>
GRAPHOPT_INLINE int64_t gather(const uint16_t* index, int64_t count, const float* book, int64_t entry, float scale,
                               float* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512 factor = _mm512_set1_ps(scale);
  if constexpr (width == 1) {
    const __m512i step = _mm512_set1_epi32(int32_t(entry));
    for (; i + 16 <= count; i += 16) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(index + i)));
      const __m512i at = entry == 1 ? wide : _mm512_mullo_epi32(wide, step);
      _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_i32gather_ps(at, book, 4), factor));
    }
  } else if (entry == width) {
    for (; i + 8 <= count; i += 8) {
      const __m256i at = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(index + i)));
      const __m512 pairs = _mm512_castpd_ps(_mm512_i32gather_pd(at, book, 8));
      _mm512_storeu_ps(to + 2 * i, _mm512_mul_ps(pairs, factor));
    }
  }
#else
  if constexpr (width == 1) {
    const __m256i step = _mm256_set1_epi32(int32_t(entry));
    for (; i + 8 <= count; i += 8) {
      const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(index + i)));
      const __m256 found = _mm256_i32gather_ps(book, _mm256_mullo_epi32(wide, step), 4);
      _mm256_storeu_ps(to + i, _mm256_mul_ps(found, _mm256_set1_ps(scale)));
    }
  }
#endif
  return i;
}
#endif

GRAPHOPT_INLINE float scale_of(const Tiles& tiles, int64_t row, int64_t group) {
  const int64_t at = row * tiles.groups + group;
  return tiles.half_scales ? half_to_float(static_cast<const uint16_t*>(tiles.scales)[at])
                           : static_cast<const float*>(tiles.scales)[at];
}

GRAPHOPT_INLINE const float* book_of(const Tiles& tiles, int64_t group) {
  return tiles.numbers + (tiles.books != nullptr ? tiles.books[group] * tiles.book_size : 0);
}

// `width` as it is known when this is compiled; 0: any.
template <int width>
GRAPHOPT_INLINE void spread_groups(const Tiles& tiles, const uint16_t* index, int64_t first, int64_t count, float* to) {
  int64_t group = first / tiles.group, left = (group + 1) * tiles.group - first;
  for (int64_t at = 0; at < count; ++group) {
    const int64_t here = left < count - at ? left : count - at;
    const float* book = book_of(tiles, group);
    const float scale = scale_of(tiles, 0, group);
    const uint16_t* const from = index + at;
    float* const into = to + at * tiles.width;
    int64_t i = 0;
#if defined(__AVX2__)
    if constexpr (width == 1 || width == 2) i = gather<width>(from, here, book, tiles.entry_size, scale, into);
#endif
    if constexpr (width == 4) i = spread_vectors<Four>(from, here, book, tiles.entry_size, scale, into);
    if constexpr (width == 8) i = spread_vectors<Eight>(from, here, book, tiles.entry_size, scale, into);
    for (; i < here; ++i) {
      const float* numbers = book + from[i] * tiles.entry_size;
      for (int64_t j = 0; j < tiles.width; ++j) into[i * tiles.width + j] = numbers[j] * scale;
    }
    at += here;
    left = tiles.group;
  }
}

void spread(const Tiles& tiles, const uint16_t* index, int64_t first, int64_t count, float* to) {
  switch (tiles.width) {
    case 1:
      return spread_groups<1>(tiles, index, first, count, to);
    case 2:
      return spread_groups<2>(tiles, index, first, count, to);
    case 4:
      return spread_groups<4>(tiles, index, first, count, to);
    case 8:
      return spread_groups<8>(tiles, index, first, count, to);
    default:
      return spread_groups<0>(tiles, index, first, count, to);
  }
}

// The sums of entries times x: of entries as wide as V each number times its own, or (kDown) all times one number.
template <typename V, bool kDown>
GRAPHOPT_INLINE void vectors_dot(const Tiles& tiles, const uint16_t* index, int64_t count, const float* x, int64_t rows,
                                 float* y) {
  constexpr int kWidth = sizeof(V) / sizeof(float), kStep = kDown ? 1 : kWidth;
  V total = {};
  int64_t group = 0;
  for (int64_t at = 0; at < count; at += tiles.group, ++group) {
    const int64_t here = tiles.group < count - at ? tiles.group : count - at;
    const float* const book = book_of(tiles, group);
    const uint16_t* const from = index + at;
    const float* const with = x + at * kStep;
    V sums[4] = {};  // one alone would wait for each addition
    auto add = [&](V& sum, int64_t i) {
      V numbers, times;
      std::memcpy(&numbers, book + from[i] * tiles.entry_size, sizeof numbers);
      if constexpr (kDown) {
        times = V{} + with[i];
      } else {
        std::memcpy(&times, with + i * kWidth, sizeof times);
      }
      sum += numbers * times;
    };
    int64_t i = 0;
    for (; i + 4 <= here; i += 4) {
      add(sums[0], i);
      add(sums[1], i + 1);
      add(sums[2], i + 2);
      add(sums[3], i + 3);
    }
    for (; i < here; ++i) add(sums[0], i);
    V scales = V{} + scale_of(tiles, 0, group);
    for (int64_t row = 1; kDown && row < rows; ++row) scales[row] = scale_of(tiles, row, group);
    total += (sums[0] + sums[1] + (sums[2] + sums[3])) * scales;
  }
  if constexpr (kDown) {
    for (int64_t row = 0; row < rows; ++row) y[row] = total[row];
  } else {
    y[0] = 0;
    for (int i = 0; i < kWidth; ++i) y[0] += total[i];
  }
}

#if defined(__AVX512F__)
// The same of a single row whose entries are 1 or 2 numbers wide and nothing but these.
template <int width>
GRAPHOPT_INLINE float gathers_dot(const Tiles& tiles, const uint16_t* index, int64_t count, const float* x) {
  constexpr int64_t kTogether = 16 / width;
  __m512 total = _mm512_setzero_ps();
  float rest = 0;
  int64_t group = 0;
  for (int64_t at = 0; at < count; at += tiles.group, ++group) {
    const int64_t here = tiles.group < count - at ? tiles.group : count - at;
    const float* const book = book_of(tiles, group);
    const uint16_t* const from = index + at;
    const float* const with = x + at * width;
    __m512 sum = _mm512_setzero_ps();
    float single = 0;
    int64_t i = 0;
    for (; i + kTogether <= here; i += kTogether) {
      __m512 numbers;
      if constexpr (width == 1) {
        const __m512i places = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + i)));
        numbers = _mm512_i32gather_ps(places, book, 4);
      } else {
        const __m256i places = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + i)));
        numbers = _mm512_castpd_ps(_mm512_i32gather_pd(places, book, 8));
      }
      sum = _mm512_fmadd_ps(numbers, _mm512_loadu_ps(with + i * width), sum);
    }
    for (; i < here; ++i) {
      for (int j = 0; j < width; ++j) single += book[from[i] * width + j] * with[i * width + j];
    }
    const float scale = scale_of(tiles, 0, group);
    total = _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), total);
    rest += single * scale;
  }
  return _mm512_reduce_add_ps(total) + rest;
}
#endif

void tiles_dot(const Tiles& tiles, const uint16_t* index, int64_t count, const float* x, int64_t rows, float* y) {
#if defined(__AVX512F__)
  if (tiles.entry_size <= 2) {
    y[0] = (tiles.width == 1 ? gathers_dot<1> : gathers_dot<2>)(tiles, index, count, x);
    return;
  }
#endif
  if (tiles.width == 1) {
    (tiles.entry_size == 4 ? vectors_dot<Four, true> : vectors_dot<Eight, true>)(tiles, index, count, x, rows, y);
  } else {
    (tiles.width == 4 ? vectors_dot<Four, false> : vectors_dot<Eight, false>)(tiles, index, count, x, rows, y);
  }
}

}  // namespace graphopt::codebook_matmul::GRAPHOPT_ISA
