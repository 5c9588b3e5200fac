// Codes unpacked, integers of 16 bits and their products with codes. Only for simd.cc.
#pragma once

#include "four_vectors.h"
#include "kernels.h"
#include "simd.h"

namespace graphopt::quantized_kv_attention::GRAPHOPT_ISA {
namespace {

using namespace graphopt::GRAPHOPT_ISA;

using Bytes = uint8_t __attribute__((vector_size(GRAPHOPT_VECTOR_BYTES)));
constexpr int64_t kBytes = GRAPHOPT_VECTOR_BYTES;
constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: added to a number, it leaves the nearest integer in the low bits
constexpr int32_t kRoundingBits = 0x4b400000;

GRAPHOPT_INLINE Bytes load_bytes(const uint8_t* from) {
  Bytes made;
  std::memcpy(&made, from, sizeof made);
  return made;
}
GRAPHOPT_INLINE void store_bytes(uint8_t* to, Bytes value) { std::memcpy(to, &value, sizeof value); }

// ---- codes

// Codes of kBits, or the lower kBits of longer ones, added to what is there if they are the upper ones.
template <int kBits, int kShift>
GRAPHOPT_INLINE void unpack_plane(const uint8_t* packed, int64_t count, uint8_t* codes) {
  constexpr int kParts = 8 / kBits;
  constexpr uint8_t kMask = uint8_t((1 << kBits) - 1);
  const int64_t part = count / kParts;
  int64_t i = 0;
  for (; i + kBytes <= part; i += kBytes) {
    const Bytes bytes = load_bytes(packed + i);
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) {
      Bytes code = (bytes >> (kBits * p)) & kMask;
      if (kShift > 0) code = code << kShift | load_bytes(codes + p * part + i);
      store_bytes(codes + p * part + i, code);
    }
  }
  for (; i < part; ++i) {
    for (int p = 0; p < kParts; ++p) {
      const uint8_t code = uint8_t((packed[i] >> (kBits * p) & kMask) << kShift);
      uint8_t& to = codes[p * part + i];
      to = kShift > 0 ? uint8_t(to | code) : code;
    }
  }
}

void unpack(const uint8_t* packed, int64_t count, int64_t bits, uint8_t* codes) {
  if (bits == 8) {
    for (int64_t i = 0; i < count; ++i) codes[i] = packed[i];
  } else if (bits == 4) {
    unpack_plane<4, 0>(packed, count, codes);
  } else {
    unpack_plane<2, 0>(packed, count, codes);
    if (bits == 3) unpack_plane<1, 2>(packed + count / 4, count, codes);
  }
}

// ---- integers and their products with codes

#if defined(__AVX512VNNI__)
// Words: the upper bytes of all integers, then the lower ones, both signed.
GRAPHOPT_INLINE void store_words(uint8_t* words, int64_t count, int64_t i, I x) {
  const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32((__m512i)x, _mm512_set1_epi32(128)), 8);
  _mm_storeu_si128((__m128i*)(words + i), _mm512_cvtepi32_epi8(upper));
  _mm_storeu_si128((__m128i*)(words + count + i), _mm512_cvtepi32_epi8((__m512i)x));
}
GRAPHOPT_INLINE void store_four(uint8_t* words, int64_t count, int64_t i, const int32_t* x) {
  for (int j = 0; j < 4; ++j) {
    words[i + j] = uint8_t((x[j] + 128) >> 8);
    words[count + i + j] = uint8_t(x[j]);
  }
}
#else
// Words: of each four integers the first and the third as a pair of 16 bits each, then the second and the fourth.
GRAPHOPT_INLINE void store_four(uint8_t* words, int64_t, int64_t i, const int32_t* x) {
  const int16_t pairs[4] = {int16_t(x[0]), int16_t(x[2]), int16_t(x[1]), int16_t(x[3])};
  std::memcpy(words + 2 * i, pairs, sizeof pairs);
}
GRAPHOPT_INLINE void store_words(uint8_t* words, int64_t count, int64_t i, I x) {
#if defined(__AVX2__)
  const __m256i turned = _mm256_shuffle_epi32((__m256i)x, 0x4e);
  const __m256i pairs = _mm256_blend_epi16((__m256i)x, _mm256_slli_epi32(turned, 16), 0xaa);
  _mm_storel_epi64((__m128i*)(words + 2 * i), _mm256_castsi256_si128(pairs));
  _mm_storel_epi64((__m128i*)(words + 2 * i + 8), _mm256_extracti128_si256(pairs, 1));
  (void)count;
#else
  int32_t four[kLanes];
  std::memcpy(four, &x, sizeof x);
  store_four(words, count, i, four);
#endif
}
#endif

template <int kQ>
GRAPHOPT_INLINE void integers_of(const float* values, int64_t stride, const float* factor, const float* least,
                                 int64_t count, float middle, uint8_t* words, float* step, float* offset) {
  F most[4], total[4];
  for (int q = 0; q < 4; ++q) most[q] = total[q] = all(0);
  int64_t whole = 0;
  for (; whole + kLanes <= count; whole += kLanes) {
    const F f = factor == nullptr ? all(1) : load(factor + whole), m = least == nullptr ? all(0) : load(least + whole);
    for (int q = 0; q < kQ; ++q) {
      const F value = load(values + q * stride + whole), scaled = value * f;
      most[q] = larger(scaled < 0 ? -scaled : scaled, most[q]);
      total[q] = fma(value, m, total[q]);
    }
  }
  float highest[4], rest[4], inverse[4], unit[4];
  four_largest(most[0], most[1], most[2], most[3], highest);
  four_sums(total[0], total[1], total[2], total[3], rest);
  // The upper byte is at most 127, and no sum overflows 32 bits.
  const float limit = count <= 256 ? 32512.0f : float(2147483647 / 255 / count);
  for (int q = 0; q < kQ; ++q) {
    for (int64_t i = whole; i < count; ++i) {
      const float value = values[q * stride + i], scaled = factor == nullptr ? value : value * factor[i];
      const float magnitude = scaled < 0 ? -scaled : scaled;
      highest[q] = magnitude > highest[q] ? magnitude : highest[q];
      if (least != nullptr) rest[q] += value * least[i];
    }
    unit[q] = highest[q] / limit;
    inverse[q] = highest[q] > 0 ? limit / highest[q] : 0;
  }
  F left[4];
  for (int q = 0; q < 4; ++q) left[q] = all(0);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const F f = factor == nullptr ? all(1) : load(factor + i);
    for (int q = 0; q < kQ; ++q) {
      const F scaled = load(values + q * stride + i) * f;
      const F rounded = fma(scaled, all(inverse[q]), all(kRounding));
      store_words(words + q * 2 * count, count, i, (I)rounded - kRoundingBits);
      left[q] += scaled - (rounded - kRounding) * unit[q];
    }
  }
  float remains[4];
  four_sums(left[0], left[1], left[2], left[3], remains);
  for (int q = 0; q < kQ; ++q) {
    for (int64_t i = whole; i < count; i += 4) {
      int32_t four[4];
      for (int64_t j = i; j < i + 4; ++j) {
        const float scaled = values[q * stride + j] * (factor == nullptr ? 1.0f : factor[j]);
        const float rounded = scaled * inverse[q] + kRounding;
        std::memcpy(&four[j - i], &rounded, sizeof rounded);
        four[j - i] = int32_t(uint32_t(four[j - i]) - uint32_t(kRoundingBits));
        remains[q] += scaled - (rounded - kRounding) * unit[q];
      }
      store_four(words + q * 2 * count, count, i, four);
    }
    step[q] = unit[q];
    offset[q] = rest[q] + remains[q] * middle;
  }
}

void integers(const float* values, int64_t stride, int64_t queries, const float* factor, const float* least,
              int64_t count, float middle, uint8_t* words, float* step, float* offset) {
  switch (queries) {
    case 1: return integers_of<1>(values, stride, factor, least, count, middle, words, step, offset);
    case 2: return integers_of<2>(values, stride, factor, least, count, middle, words, step, offset);
    case 3: return integers_of<3>(values, stride, factor, least, count, middle, words, step, offset);
    default: return integers_of<4>(values, stride, factor, least, count, middle, words, step, offset);
  }
}

GRAPHOPT_INLINE void put(const Dot& d, int64_t query, int64_t lane, F product) {
  F made = product * d.step[query] + d.offset[query];
  if (d.scale != nullptr) made = fma(made, load(d.scale + lane), load(d.least + lane) * d.total[query]);
  float* to = d.out + query * d.out_stride + lane;
  store(to, load(to) + made);
}

#if defined(__SSE2__) && !defined(__AVX512VNNI__)
// Sums of two products of 16 bits each.
#if defined(__AVX2__)
using Pairs = __m256i;
GRAPHOPT_INLINE Pairs add_products(Pairs a, Pairs b) { return _mm256_madd_epi16(a, b); }
GRAPHOPT_INLINE Pairs upper_bytes(Pairs a) { return _mm256_srli_epi16(a, 8); }
GRAPHOPT_INLINE Pairs lower_bytes(Pairs a) { return _mm256_and_si256(a, _mm256_set1_epi16(0xff)); }
GRAPHOPT_INLINE Pairs every(int32_t pair) { return _mm256_set1_epi32(pair); }
GRAPHOPT_INLINE Pairs sum_of(Pairs a, Pairs b) { return _mm256_add_epi32(a, b); }
#else
using Pairs = __m128i;
GRAPHOPT_INLINE Pairs add_products(Pairs a, Pairs b) { return _mm_madd_epi16(a, b); }
GRAPHOPT_INLINE Pairs upper_bytes(Pairs a) { return _mm_srli_epi16(a, 8); }
GRAPHOPT_INLINE Pairs lower_bytes(Pairs a) { return _mm_and_si128(a, _mm_set1_epi16(0xff)); }
GRAPHOPT_INLINE Pairs every(int32_t pair) { return _mm_set1_epi32(pair); }
GRAPHOPT_INLINE Pairs sum_of(Pairs a, Pairs b) { return _mm_add_epi32(a, b); }
#endif
#endif

// Lanes `lane` to `lane + kV * kLanes`.
template <int kQ, int kV>
GRAPHOPT_INLINE void dot_tile(const Dot& d, int64_t lane) {
#if defined(__AVX512VNNI__)
  __m512i upper[kQ][kV], lower[kQ][kV];
  for (int q = 0; q < kQ; ++q) {
    for (int v = 0; v < kV; ++v) upper[q][v] = lower[q][v] = _mm512_setzero_si512();
  }
  const uint8_t* codes = d.codes + 4 * lane;
  const uint8_t* ahead = d.ahead == nullptr ? nullptr : d.ahead + 4 * lane;
  for (int64_t row = 0; row < d.rows; ++row, codes += d.row_bytes) {
    __m512i code[kV];
    for (int v = 0; v < kV; ++v) code[v] = _mm512_loadu_si512(codes + 64 * v);
    if (ahead != nullptr) {
      for (int v = 0; v < kV; ++v) prefetch(ahead + row * d.row_bytes + 64 * v);
    }
    for (int q = 0; q < kQ; ++q) {
      int32_t high, low;
      std::memcpy(&high, d.words + q * d.words_stride + 4 * row, 4);
      std::memcpy(&low, d.words + q * d.words_stride + 4 * (d.rows + row), 4);
      const __m512i h = _mm512_set1_epi32(high), l = _mm512_set1_epi32(low);
      for (int v = 0; v < kV; ++v) {
        upper[q][v] = _mm512_dpbusd_epi32(upper[q][v], code[v], h);
        lower[q][v] = _mm512_dpbusd_epi32(lower[q][v], code[v], l);
      }
    }
  }
  for (int q = 0; q < kQ; ++q) {
    for (int v = 0; v < kV; ++v) {
      put(d, q, lane + v * kLanes, fma(to_float((I)upper[q][v]), all(256), to_float((I)lower[q][v])));
    }
  }
#elif defined(__SSE2__)
  Pairs sums[kQ][kV];
  for (int q = 0; q < kQ; ++q) {
    for (int v = 0; v < kV; ++v) sums[q][v] = Pairs{};
  }
  const uint8_t* codes = d.codes + 4 * lane;
  for (int64_t row = 0; row < d.rows; ++row, codes += d.row_bytes) {
    Pairs even[kV], odd[kV];
    for (int v = 0; v < kV; ++v) {
      Pairs code;
      std::memcpy(&code, codes + kBytes * v, sizeof code);
      even[v] = lower_bytes(code);
      odd[v] = upper_bytes(code);
    }
    if (d.ahead != nullptr) prefetch(d.ahead + row * d.row_bytes + 4 * lane);
    for (int q = 0; q < kQ; ++q) {
      int32_t pair[2];
      std::memcpy(pair, d.words + q * d.words_stride + 8 * row, 8);
      const Pairs first = every(pair[0]), second = every(pair[1]);
      for (int v = 0; v < kV; ++v) {
        sums[q][v] = sum_of(sums[q][v], sum_of(add_products(even[v], first), add_products(odd[v], second)));
      }
    }
  }
  for (int q = 0; q < kQ; ++q) {
    for (int v = 0; v < kV; ++v) put(d, q, lane + v * kLanes, to_float((I)sums[q][v]));
  }
#else
  for (int v = 0; v < kV; ++v) {
    for (int q = 0; q < kQ; ++q) {
      I made = {};
      const uint8_t* codes = d.codes + 4 * (lane + v * kLanes);
      for (int64_t row = 0; row < d.rows; ++row, codes += d.row_bytes) {
        int16_t x[4];
        std::memcpy(x, d.words + q * d.words_stride + 8 * row, sizeof x);
        I code;
        std::memcpy(&code, codes, sizeof code);
        made += (code & 0xff) * x[0] + ((code >> 8) & 0xff) * x[2] + ((code >> 16) & 0xff) * x[1] +
                ((code >> 24) & 0xff) * x[3];
      }
      put(d, q, lane + v * kLanes, to_float(made));
    }
  }
#endif
}

// One lane, where there are fewer than a vector holds.
void dot_lane(const Dot& d, int64_t q, int64_t lane) {
  uint32_t made = 0;
  for (int64_t row = 0; row < d.rows; ++row) {
    const uint8_t* code = d.codes + row * d.row_bytes + 4 * lane;
    const uint8_t* words = d.words + q * d.words_stride;
#if defined(__AVX512VNNI__)
    for (int i = 0; i < 4; ++i) {
      const int32_t x = int8_t(words[4 * row + i]) * 256 + int8_t(words[4 * (d.rows + row) + i]);
      made += uint32_t(code[i] * x);
    }
#else
    int16_t x[4];
    std::memcpy(x, words + 8 * row, sizeof x);
    made += uint32_t(code[0] * x[0] + code[1] * x[2] + code[2] * x[1] + code[3] * x[3]);
#endif
  }
  float result = float(int32_t(made)) * d.step[q] + d.offset[q];
  if (d.scale != nullptr) result = result * d.scale[lane] + d.least[lane] * d.total[q];
  d.out[q * d.out_stride + lane] += result;
}

template <int kQ>
void dot_queries(const Dot& d) {
  int64_t lane = 0;
  for (; lane + 2 * kLanes <= d.lanes; lane += 2 * kLanes) dot_tile<kQ, 2>(d, lane);
  for (; lane + kLanes <= d.lanes; lane += kLanes) dot_tile<kQ, 1>(d, lane);
  for (; lane < d.lanes; ++lane) {
    for (int q = 0; q < kQ; ++q) dot_lane(d, q, lane);
  }
}

void dot(const Dot& d) {
  switch (d.queries) {
    case 1: return dot_queries<1>(d);
    case 2: return dot_queries<2>(d);
    case 3: return dot_queries<3>(d);
    default: return dot_queries<4>(d);
  }
}

}  // namespace
}  // namespace graphopt::quantized_kv_attention::GRAPHOPT_ISA
