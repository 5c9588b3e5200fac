// `multiply` of kernels.h for one set of instructions; only for simd.cc.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace graphopt::quantized_linear::GRAPHOPT_ISA {
namespace {

using namespace graphopt::GRAPHOPT_ISA;

constexpr int64_t kAhead = 4096;  // bytes by which prefetching runs ahead of the weights

GRAPHOPT_INLINE float scalar(const void* numbers, bool half, int64_t index) {
  return half ? half_to_float(static_cast<const uint16_t*>(numbers)[index]) : static_cast<const float*>(numbers)[index];
}

#if defined(__AVX512VNNI__)

// Where the scales of a chunk's words lie: the first one's index, how many there are, and which one each word takes.
struct Scales {
  Scales(const Matrix& matrix) : in_chunk(int64_t(kChunk) * 8 / matrix.bits), block(matrix.block) {
    alignas(64) int32_t places[kWords];
    for (int i = 0; i < kWords; ++i) places[i] = block >= in_chunk ? 0 : int32_t(i * (32 / matrix.bits) / block);
    spread = _mm512_load_si512(places);
    count = block >= in_chunk ? 1 : in_chunk / block;
    mask = __mmask16((1u << count) - 1);
  }
  int64_t in_chunk, block, count;
  __mmask16 mask;
  __m512i spread;
};

template <bool half>
GRAPHOPT_INLINE __m512 scales_at(const void* scales, int64_t index, __mmask16 mask, __m512i spread) {
  __m512 found;
  if (half) {
    found = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(scales) + index));
  } else {
    found = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(scales) + index);
  }
  return _mm512_permutexvar_ps(spread, found);
}

// What minimums or zero points add to the product of weight row n, sixteen blocks at a time.
template <int bits, bool half>
GRAPHOPT_INLINE __m512 added(const Matrix& matrix, const float* sums, int64_t n, __m512 total) {
  const int64_t blocks = matrix.blocks();
  const __m512i in_order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t b = 0; b < blocks; b += 16) {
    const __mmask16 lanes = blocks - b >= 16 ? __mmask16(0xffff) : __mmask16((1u << (blocks - b)) - 1);
    const __m512 sum = _mm512_maskz_loadu_ps(lanes, sums + b);
    if (matrix.minimums != nullptr) {
      total = _mm512_fmadd_ps(scales_at<half>(matrix.minimums, n * blocks + b, lanes, in_order), sum, total);
    }
    if (matrix.zero_points != nullptr) {
      const int64_t row = (blocks * bits + 7) / 8, bytes = row - b * bits / 8 < 2 * bits ? row - b * bits / 8 : 2 * bits;
      const __m128i packed =
          _mm_maskz_loadu_epi8(__mmask16((1u << bytes) - 1), matrix.zero_points + n * row + b * bits / 8);
      const __m512i places = _mm512_mullo_epi32(in_order, _mm512_set1_epi32(bits));
      const __m128i from = _mm512_cvtepi32_epi8(_mm512_srli_epi32(places, 3));
      const __m512i shifts = _mm512_and_si512(places, _mm512_set1_epi32(7));
      __m512i zeros = _mm512_cvtepu8_epi32(_mm_shuffle_epi8(packed, from));
      zeros = _mm512_and_si512(_mm512_srlv_epi32(zeros, shifts), _mm512_set1_epi32((1 << bits) - 1));
      const __m512 off = _mm512_cvtepi32_ps(_mm512_sub_epi32(zeros, _mm512_set1_epi32(matrix.middle())));
      const __m512 scale = scales_at<half>(matrix.scales, n * blocks + b, lanes, in_order);
      total = _mm512_fnmadd_ps(_mm512_mul_ps(scale, off), sum, total);
    }
  }
  return total;
}

// The sums of four vectors, one behind the other.
GRAPHOPT_INLINE __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
  const __m512 all_four = _mm512_add_ps(low, high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all_four), _mm512_extractf32x8_ps(all_four, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// `kR` rows of weights from `first` on times `kM` rows of activations.
template <int bits, int terms, bool half, bool plain, int kR, int kM>
GRAPHOPT_INLINE void tile(const Matrix& matrix, const Layout& layout, const Scales& at, const uint8_t* rows,
                          int64_t first, int64_t m, float* y, int64_t stride, int64_t column) {
  constexpr int parts = 8 / bits;
  const __m512i low = _mm512_set1_epi8(char((1 << bits) - 1));
  const int64_t bytes = matrix.row_bytes(), blocks = matrix.blocks();
  const uint8_t* packed = matrix.packed + first * bytes;
  const int64_t scale_bytes = half ? 2 : 4;
  for (int64_t ahead = 0; ahead < kR * blocks * scale_bytes; ahead += kChunk) {
    prefetch(static_cast<const uint8_t*>(matrix.scales) + first * blocks * scale_bytes + kAhead / 4 + ahead);
  }
  __m512 total[kR][kM];
  for (int i = 0; i < kM; ++i) {
    const float* sums =
        reinterpret_cast<const float*>(rows + (m + i) * layout.row + layout.chunks * layout.chunk_bytes);
    for (int r = 0; r < kR; ++r) {
      total[r][i] = _mm512_setzero_ps();
      if (!plain) total[r][i] = added<bits, half>(matrix, sums, first + r, total[r][i]);
    }
  }

  for (int64_t c = 0; c < layout.chunks; ++c) {
    const bool whole = (c + 1) * kChunk <= bytes;
    const __mmask64 lanes = whole ? ~__mmask64(0) : (__mmask64(1) << (bytes - c * kChunk)) - 1;
    const int64_t scale_index = c * at.in_chunk / at.block;
    const __mmask16 scale_lanes = whole ? at.mask : __mmask16((1u << (blocks - scale_index)) - 1);
    const uint8_t* x[kM];
    for (int i = 0; i < kM; ++i) x[i] = rows + (m + i) * layout.row + c * layout.chunk_bytes;
    for (int r = 0; r < kR; ++r) {
      const uint8_t* from = packed + r * bytes + c * kChunk;
      prefetch(from + kAhead);
      const __m512i w = _mm512_maskz_loadu_epi8(lanes, from);
      __m512i part[parts];
      part[0] = parts == 1 ? w : _mm512_and_si512(w, low);
      for (int p = 1; p < parts; ++p) part[p] = _mm512_and_si512(_mm512_srli_epi16(w, p * bits), low);
      const __m512 scale = scales_at<half>(matrix.scales, (first + r) * blocks + scale_index, scale_lanes, at.spread);
      for (int i = 0; i < kM; ++i) {
        const uint8_t* offsets = x[i] + terms * parts * kChunk;
        __m512i sum = _mm512_load_si512(offsets);
        for (int p = 0; p < parts; ++p) sum = _mm512_dpbusd_epi32(sum, part[p], _mm512_load_si512(x[i] + p * kChunk));
        if (terms == 2) {
          __m512i rest = _mm512_load_si512(offsets + kChunk);
          for (int p = 0; p < parts; ++p) {
            rest = _mm512_dpbusd_epi32(rest, part[p], _mm512_load_si512(x[i] + (parts + p) * kChunk));
          }
          sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), rest);
        }
        const __m512 scales = _mm512_mul_ps(scale, _mm512_load_ps(offsets + terms * kChunk));
        total[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scales, total[r][i]);
      }
    }
  }
  for (int i = 0; i < kM; ++i) {
    float* to = y + (m + i) * stride + column;
    if (kR == 4) {
      _mm_storeu_ps(to, sums_of(total[0][i], total[kR > 1][i], total[kR > 2 ? 2 : 0][i], total[kR > 3 ? 3 : 0][i]));
    } else {
      for (int r = 0; r < kR; ++r) to[r] = _mm512_reduce_add_ps(total[r][i]);
    }
  }
}

template <int bits, int terms, bool half, bool plain>
void tiles(const Matrix& matrix, const Layout& layout, const uint8_t* rows, int64_t count, int64_t first, int64_t last,
           float* y, int64_t stride) {
  const Scales at(matrix);
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) {
    int64_t n = first;
    for (; n + 4 <= last; n += 4) tile<bits, terms, half, plain, 4, 4>(matrix, layout, at, rows, n, m, y, stride, n - first);
    for (; n < last; ++n) tile<bits, terms, half, plain, 1, 4>(matrix, layout, at, rows, n, m, y, stride, n - first);
  }
  for (; m < count; ++m) {
    int64_t n = first;
    for (; n + 4 <= last; n += 4) tile<bits, terms, half, plain, 4, 1>(matrix, layout, at, rows, n, m, y, stride, n - first);
    for (; n < last; ++n) tile<bits, terms, half, plain, 1, 1>(matrix, layout, at, rows, n, m, y, stride, n - first);
  }
}

template <int bits, int terms, bool half>
void product(const Matrix& matrix, const Layout& layout, const uint8_t* rows, int64_t count, int64_t first, int64_t last,
             float* y, int64_t stride) {
  if (matrix.minimums == nullptr && matrix.zero_points == nullptr) {
    tiles<bits, terms, half, true>(matrix, layout, rows, count, first, last, y, stride);
  } else {
    tiles<bits, terms, half, false>(matrix, layout, rows, count, first, last, y, stride);
  }
}

#else

// What minimums or zero points add to the product of weight row n: block by block, so that it costs little.
float added(const Matrix& matrix, const float* sums, int64_t n) {
  const int64_t blocks = matrix.blocks();
  float total = 0;
  if (matrix.minimums != nullptr) {
    if (matrix.half) {
      const uint16_t* minimums = static_cast<const uint16_t*>(matrix.minimums) + n * blocks;
      for (int64_t b = 0; b < blocks; ++b) total += half_to_float(minimums[b]) * sums[b];
    } else {
      const float* minimums = static_cast<const float*>(matrix.minimums) + n * blocks;
      for (int64_t b = 0; b < blocks; ++b) total += minimums[b] * sums[b];
    }
  }
  if (matrix.zero_points != nullptr) {
    const int in_byte = 8 / matrix.bits, mask = (1 << matrix.bits) - 1, middle = matrix.middle();
    const uint8_t* zeros = matrix.zero_points + n * ((blocks * matrix.bits + 7) / 8);
    for (int64_t b = 0; b < blocks; ++b) {
      const int zero = zeros[b / in_byte] >> (b % in_byte * matrix.bits) & mask;
      total -= scalar(matrix.scales, matrix.half, n * blocks + b) * float(zero - middle) * sums[b];
    }
  }
  return total;
}

// The sums of products of each word of a chunk, in `words`.
template <int bits>
GRAPHOPT_INLINE void words_of(const uint8_t* packed, int64_t bytes, const int8_t* values, const int32_t* offsets,
                              int32_t* words) {
  constexpr int parts = 8 / bits;
  uint8_t chunk[kChunk] = {};
  std::memcpy(chunk, packed, size_t(bytes));
#if defined(__AVX2__)
  for (int half = 0; half < 2; ++half) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(chunk + 32 * half));
    __m256i total = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(offsets + 8 * half));
    for (int p = 0; p < parts; ++p) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + p * kChunk + 32 * half));
      if (bits == 8) {
        // Products of whole bytes don't fit 16 bits: widened to 16 bits, the even bytes and the odd ones.
        const __m256i mask = _mm256_set1_epi16(0xff);
        const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, mask), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
        const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
        total = _mm256_add_epi32(total, _mm256_add_epi32(even, odd));
      } else {
        const __m256i part = _mm256_and_si256(_mm256_srli_epi16(w, p * bits), _mm256_set1_epi8(char((1 << bits) - 1)));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(part, x), _mm256_set1_epi16(1)));
      }
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 8 * half), total);
  }
#else
  for (int word = 0; word < kWords; ++word) {
    int32_t total = offsets[word];
    for (int byte = 4 * word; byte < 4 * word + 4; ++byte) {
      for (int p = 0; p < parts; ++p) {
        total += int32_t(chunk[byte] >> (p * bits) & ((1 << bits) - 1)) * values[p * kChunk + byte];
      }
    }
    words[word] = total;
  }
#endif
}

template <int bits, int terms, bool half>
void product(const Matrix& matrix, const Layout& layout, const uint8_t* rows, int64_t count, int64_t first, int64_t last,
             float* y, int64_t stride) {
  constexpr int parts = 8 / bits;
  const int64_t bytes = matrix.row_bytes(), blocks = matrix.blocks(), in_word = 4 * parts;
  for (int64_t n = first; n < last; ++n) {
    for (int64_t m = 0; m < count; ++m) {
      float total = 0;
      for (int64_t c = 0; c < layout.chunks; ++c) {
        const int64_t here = bytes - c * kChunk < kChunk ? bytes - c * kChunk : kChunk;
        const uint8_t* packed = matrix.packed + n * bytes + c * kChunk;
        prefetch(packed + kAhead);
        const uint8_t* x = rows + m * layout.row + c * layout.chunk_bytes;
        const int8_t* values = reinterpret_cast<const int8_t*>(x);
        const int32_t* offsets = reinterpret_cast<const int32_t*>(x + terms * parts * kChunk);
        const float* scales = reinterpret_cast<const float*>(offsets + terms * kWords);
        int32_t words[kWords], rest[kWords] = {};
        words_of<bits>(packed, here, values, offsets, words);
        if (terms == 2) words_of<bits>(packed, here, values + parts * kChunk, offsets + kWords, rest);
        const int64_t number = c * kChunk * parts;
        for (int64_t word = 0; word < here / 4; ++word) {
          const int32_t whole = terms == 2 ? words[word] * 256 + rest[word] : words[word];
          const int64_t block = (number + word * in_word) / matrix.block;
          total += float(whole) * (scalar(matrix.scales, half, n * blocks + block) * scales[word]);
        }
      }
      const float* sums = reinterpret_cast<const float*>(rows + m * layout.row + layout.chunks * layout.chunk_bytes);
      y[m * stride + n - first] = total + added(matrix, sums, n);
    }
  }
}

#endif

template <int bits, int terms>
void product_of(const Matrix& matrix, const Layout& layout, const uint8_t* rows, int64_t count, int64_t first,
                int64_t last, float* y, int64_t stride) {
  if (matrix.half) {
    product<bits, terms, true>(matrix, layout, rows, count, first, last, y, stride);
  } else {
    product<bits, terms, false>(matrix, layout, rows, count, first, last, y, stride);
  }
}

template <int bits>
void product_of(const Matrix& matrix, const Layout& layout, const uint8_t* rows, int64_t count, int64_t first,
                int64_t last, float* y, int64_t stride) {
  if (layout.terms == 2) {
    product_of<bits, 2>(matrix, layout, rows, count, first, last, y, stride);
  } else {
    product_of<bits, 1>(matrix, layout, rows, count, first, last, y, stride);
  }
}

void multiply(const Matrix& matrix, const Layout& layout, const uint8_t* rows, int64_t count, int64_t first, int64_t last,
              float* y, int64_t stride) {
  switch (matrix.bits) {
    case 2: product_of<2>(matrix, layout, rows, count, first, last, y, stride); break;
    case 4: product_of<4>(matrix, layout, rows, count, first, last, y, stride); break;
    default: product_of<8>(matrix, layout, rows, count, first, last, y, stride); break;
  }
}

}  // namespace
}  // namespace graphopt::quantized_linear::GRAPHOPT_ISA
