#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // which GCC 12 finds in its own header of instructions
#endif
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

void widen(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) {
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + i))));
  }
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < count; ++i) to[i] = half_to_float(from[i]);
}

GRAPHOPT_INLINE uint16_t half_of(float value) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(value, 0));
#else
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
#endif
}

void narrow(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) _mm256_storeu_si256((__m256i*)(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8) _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < count; ++i) to[i] = half_of(from[i]);
}

void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  int64_t i = 0;
#if defined(__x86_64__)
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      const float* at = from + i * columns + j;
      __m128 a = _mm_loadu_ps(at), b = _mm_loadu_ps(at + columns);
      __m128 c = _mm_loadu_ps(at + 2 * columns), d = _mm_loadu_ps(at + 3 * columns);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(to + j * rows + i, a);
      _mm_storeu_ps(to + (j + 1) * rows + i, b);
      _mm_storeu_ps(to + (j + 2) * rows + i, c);
      _mm_storeu_ps(to + (j + 3) * rows + i, d);
    }
    for (; j < columns; ++j) {
      for (int64_t k = i; k < i + 4; ++k) to[j * rows + k] = from[k * columns + j];
    }
  }
#endif
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
  }
}

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

void integers(const float* values, const float* factor, const float* least, int64_t count, float middle, uint8_t* words,
              float* step, float* offset) {
  F most = all(0), total = all(0);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F value = load(values + i);
    const F scaled = factor == nullptr ? value : value * load(factor + i);
    most = larger(scaled < 0 ? -scaled : scaled, most);
    if (least != nullptr) total = fma(value, load(least + i), total);
  }
  float highest = largest(most), rest = sum(total);
  for (int64_t j = i; j < count; ++j) {
    const float scaled = factor == nullptr ? values[j] : values[j] * factor[j];
    const float magnitude = scaled < 0 ? -scaled : scaled;
    highest = magnitude > highest ? magnitude : highest;
    if (least != nullptr) rest += values[j] * least[j];
  }
  // The upper byte is at most 127, and no sum overflows 32 bits.
  const float limit = count <= 256 ? 32512.0f : float(2147483647 / 255 / count);
  const float unit = highest / limit, inverse = highest > 0 ? limit / highest : 0;
  F left = all(0);
  for (i = 0; i + kLanes <= count; i += kLanes) {
    const F value = load(values + i);
    const F scaled = factor == nullptr ? value : value * load(factor + i);
    const F rounded = fma(scaled, all(inverse), all(kRounding));
    store_words(words, count, i, (I)rounded - kRoundingBits);
    left += scaled - (rounded - kRounding) * unit;
  }
  float remains = sum(left);
  for (; i < count; i += 4) {
    int32_t four[4];
    for (int j = 0; j < 4; ++j) {
      const float scaled = factor == nullptr ? values[i + j] : values[i + j] * factor[i + j];
      const float rounded = scaled * inverse + kRounding;
      std::memcpy(&four[j], &rounded, sizeof rounded);
      four[j] = int32_t(uint32_t(four[j]) - uint32_t(kRoundingBits));
      remains += scaled - (rounded - kRounding) * unit;
    }
    store_four(words, count, i, four);
  }
  *step = unit;
  *offset = rest + remains * middle;
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

// ---- codes to floats

void read_keys(const uint8_t* codes, int64_t depth, int64_t width, int64_t group, const float* scale, const float* least,
               float* keys) {
  for (int64_t channel = 0; channel < depth; ++channel) {
    const uint8_t* row = codes + channel / 4 * 4 * width;
    const int shift = int(8 * (channel % 4));
    const float* s = group == 0 ? scale + channel : scale + channel / group * width;
    const float* m = group == 0 ? least + channel : least + channel / group * width;
    float* to = keys + channel * width;
    int64_t t = 0;
    for (; t + kLanes <= width; t += kLanes) {
      I four;
      std::memcpy(&four, row + 4 * t, sizeof four);
      const F code = to_float((four >> shift) & 0xff);
      store(to + t, group == 0 ? fma(code, all(*s), all(*m)) : fma(code, load(s + t), load(m + t)));
    }
    for (; t < width; ++t) {
      const float code = row[4 * t + channel % 4];
      to[t] = group == 0 ? code * *s + *m : code * s[t] + m[t];
    }
  }
}

void read_values(const uint8_t* codes, int64_t depth, int64_t width, int64_t group, const float* scale,
                 const float* least, float* values) {
  for (int64_t token = 0; token < width; ++token) {
    const uint8_t* row = codes + token / 4 * 4 * depth;
    const int shift = int(8 * (token % 4));
    for (int64_t begin = 0; begin < depth; begin += group) {
      const float s = scale[begin / group * width + token], m = least[begin / group * width + token];
      float* to = values + token * depth;
      int64_t d = begin;
      for (; d + kLanes <= begin + group; d += kLanes) {
        I four;
        std::memcpy(&four, row + 4 * d, sizeof four);
        store(to + d, fma(to_float((four >> shift) & 0xff), all(s), all(m)));
      }
      for (; d < begin + group; ++d) to[d] = float(row[4 * d + token % 4]) * s + m;
    }
  }
}

void rotate(float* keys, int64_t width, int64_t pairs, int64_t first_step, int64_t second_at, const float* cos,
            const float* sin) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    float* first = keys + pair * first_step * width;
    float* second = first + second_at * width;
    const float* c = cos + pair * width;
    const float* s = sin + pair * width;
    int64_t t = 0;
    for (; t + kLanes <= width; t += kLanes) {
      const F a = load(first + t), b = load(second + t), co = load(c + t), si = load(s + t);
      store(first + t, a * co - b * si);
      store(second + t, b * co + a * si);
    }
    for (; t < width; ++t) {
      const float a = first[t], b = second[t];
      first[t] = a * c[t] - b * s[t];
      second[t] = b * c[t] + a * s[t];
    }
  }
}

// Byte `index` of each four as a float of 1 to 2: the code is what comes after the one, in 256ths.
GRAPHOPT_INLINE F one_and(I four, int index) {
  const I moved = index == 0 ? four << 15 : index == 1 ? four << 7 : index == 2 ? four >> 1 : four >> 9;
  return (F)((moved & 0x7f8000) | 0x3f800000);
}

// Scales and minimums for what `one_and` gives.
struct Shifted {
  const float* scale;
  const float* least;
  int64_t group, width;

  GRAPHOPT_INLINE F key(const Shifted& s, F code, int64_t channel, int64_t token) {
    if (s.group == 0) return fma(code, all(s.scale[channel]), all(s.least[channel]));
    const int64_t at = channel / s.group * s.width + token;
    return fma(code, load(s.scale + at), load(s.least + at));
  }
};

template <int kQ, int kV>
GRAPHOPT_INLINE void turned_tile(const uint8_t* codes, int64_t depth, int64_t half, const Shifted& shifted,
                                 const float* cos, const float* sin, const float* queries, float* out, int64_t token) {
  F sums[kQ][kV];
  for (int q = 0; q < kQ; ++q) {
    for (int v = 0; v < kV; ++v) sums[q][v] = all(0);
  }
  const int64_t width = shifted.width;
  for (int64_t first = 0; first < half; first += 4) {
    const float* lower = queries + kQueries * first;
    const float* upper = lower + kQueries * half;
    I low[kV], high[kV];
    for (int v = 0; v < kV; ++v) {
      std::memcpy(&low[v], codes + first * width + 4 * (token + v * kLanes), sizeof low[v]);
      std::memcpy(&high[v], codes + (first + half) * width + 4 * (token + v * kLanes), sizeof high[v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      F a[kV], b[kV];
      for (int v = 0; v < kV; ++v) {
        const int64_t t = token + v * kLanes;
        const F x = Shifted::key(shifted, one_and(low[v], i), first + i, t);
        const F y = Shifted::key(shifted, one_and(high[v], i), first + half + i, t);
        const F c = load(cos + (first + i) * width + t), s = load(sin + (first + i) * width + t);
        a[v] = fma(x, c, -(y * s));
        b[v] = fma(y, c, x * s);
      }
      for (int q = 0; q < kQ; ++q) {
        const F p = all(lower[kQueries * i + q]), r = all(upper[kQueries * i + q]);
        for (int v = 0; v < kV; ++v) sums[q][v] = fma(r, b[v], fma(p, a[v], sums[q][v]));
      }
    }
  }
  for (int64_t first = 2 * half; first < depth; first += 4) {
    for (int v = 0; v < kV; ++v) {
      I four;
      std::memcpy(&four, codes + first * width + 4 * (token + v * kLanes), sizeof four);
      for (int i = 0; i < 4; ++i) {
        const F x = Shifted::key(shifted, one_and(four, i), first + i, token + v * kLanes);
        for (int q = 0; q < kQ; ++q) sums[q][v] = fma(all(queries[kQueries * (first + i) + q]), x, sums[q][v]);
      }
    }
  }
  for (int q = 0; q < kQ; ++q) {
    for (int v = 0; v < kV; ++v) store(out + q * width + token + v * kLanes, sums[q][v]);
  }
}

template <int kQ>
void turned_queries(const uint8_t* codes, int64_t depth, int64_t half, const Shifted& shifted, const float* cos,
                    const float* sin, const float* queries, float* out) {
  constexpr int kV = kLanes >= 16 ? 2 : 1;
  int64_t token = 0;
  for (; token + kV * kLanes <= shifted.width; token += kV * kLanes) {
    turned_tile<kQ, kV>(codes, depth, half, shifted, cos, sin, queries, out, token);
  }
  for (; token < shifted.width; token += kLanes) {
    turned_tile<kQ, 1>(codes, depth, half, shifted, cos, sin, queries, out, token);
  }
}

bool turned_scores(const uint8_t* codes, int64_t depth, int64_t width, int64_t group, const float* scale,
                   const float* least, int64_t half, const float* cos, const float* sin, int64_t queries,
                   const float* of_queries, float* out) {
  constexpr int64_t kMost = 1024;
  const int64_t count = group == 0 ? depth : depth / group * width;
  if (half % 4 != 0 || width % kLanes != 0 || count > kMost) return false;
  float scales[kMost], minimums[kMost];
  for (int64_t i = 0; i < count; ++i) {
    scales[i] = scale[i] * 256.0f;
    minimums[i] = least[i] - scales[i];
  }
  const Shifted shifted{scales, minimums, group, width};
  switch (queries) {
    case 1: turned_queries<1>(codes, depth, half, shifted, cos, sin, of_queries, out); break;
    case 2: turned_queries<2>(codes, depth, half, shifted, cos, sin, of_queries, out); break;
    case 3: turned_queries<3>(codes, depth, half, shifted, cos, sin, of_queries, out); break;
    default: turned_queries<4>(codes, depth, half, shifted, cos, sin, of_queries, out);
  }
  return true;
}

// ---- floats

template <int kM, int kV>
GRAPHOPT_INLINE void multiply_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                                   int64_t ldc, bool add) {
  F sums[kM][kV];
  for (int i = 0; i < kM; ++i) {
    for (int v = 0; v < kV; ++v) sums[i][v] = add ? load(c + i * ldc + v * kLanes) : all(0);
  }
  for (int64_t p = 0; p < k; ++p) {
    F row[kV];
    for (int v = 0; v < kV; ++v) row[v] = load(b + p * ldb + v * kLanes);
    for (int i = 0; i < kM; ++i) {
      const F factor = all(a[i * lda + p]);
      for (int v = 0; v < kV; ++v) sums[i][v] = fma(factor, row[v], sums[i][v]);
    }
  }
  for (int i = 0; i < kM; ++i) {
    for (int v = 0; v < kV; ++v) store(c + i * ldc + v * kLanes, sums[i][v]);
  }
}

template <int kM>
GRAPHOPT_INLINE void multiply_rows(int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                                   float* c, int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) multiply_tile<kM, 2>(k, a, lda, b + j, ldb, c + j, ldc, add);
  for (; j + kLanes <= n; j += kLanes) multiply_tile<kM, 1>(k, a, lda, b + j, ldb, c + j, ldc, add);
  for (; j < n; ++j) {
    for (int i = 0; i < kM; ++i) {
      float total = add ? c[i * ldc + j] : 0;
      for (int64_t p = 0; p < k; ++p) total += a[i * lda + p] * b[p * ldb + j];
      c[i * ldc + j] = total;
    }
  }
}

void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
  constexpr int kRows = kLanes >= 16 ? 8 : 4;
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) multiply_rows<kRows>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
  for (; i + 3 <= m; i += 3) multiply_rows<3>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
  for (; i < m; ++i) multiply_rows<1>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
}

void dot_rows(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* out, int64_t out_stride) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      F total = all(0);
      int64_t p = 0;
      for (; p + kLanes <= k; p += kLanes) total = fma(load(a + i * k + p), load(b + j * k + p), total);
      float made = sum(total);
      for (; p < k; ++p) made += a[i * k + p] * b[j * k + p];
      out[i * out_stride + j] = made;
    }
  }
}

float largest_of(const float* values, int64_t count) {
  if (count < kLanes) {
    float found = values[0];
    for (int64_t i = 1; i < count; ++i) found = values[i] > found ? values[i] : found;
    return found;
  }
  F found = load(values);
  for (int64_t i = kLanes; i + kLanes <= count; i += kLanes) found = larger(load(values + i), found);
  return largest(larger(load(values + count - kLanes), found));
}

// exp(x) for x <= 0 to 2 units of the last place; 0 below -87.
GRAPHOPT_INLINE F exponential(F x) {
  const F low = x < -87.3f ? all(-87.3f) : x;
  const F shifted = fma(low, all(1.44269504f), all(kRounding));
  const F n = shifted - kRounding;
  F r = fma(n, all(-0.693359375f), low);
  r = fma(n, all(2.12194440e-4f), r);
  F p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p * r, r, r + 1.0f);
  const I power = ((I)shifted - kRoundingBits + 127) << 23;
  return x < -87.3f ? all(0) : p * (F)power;
}

float exponentials(float* values, int64_t count, float largest) {
  F total = all(0);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F made = exponential(load(values + i) - largest);
    store(values + i, made);
    total += made;
  }
  float made = sum(total);
  if (i < count) {
    float last[kLanes] = {};
    for (int64_t j = i; j < count; ++j) last[j - i] = values[j] - largest;
    const F turned = exponential(load(last));
    store(last, turned);
    for (int64_t j = i; j < count; ++j) made += values[j] = last[j - i];
  }
  return made;
}

GRAPHOPT_INLINE F capped(F value, float cap) {
  const F x = value / cap;
  const F power = exponential((x < 0 ? x : -x) * 2.0f);
  const F made = (1.0f - power) / (1.0f + power) * cap;
  return x < 0 ? -made : made;
}

void cap(float* values, int64_t count, float cap) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(values + i, capped(load(values + i), cap));
  if (i == count) return;
  float last[kLanes] = {};
  for (int64_t j = i; j < count; ++j) last[j - i] = values[j];
  store(last, capped(load(last), cap));
  for (int64_t j = i; j < count; ++j) values[j] = last[j - i];
}

void scale(float* values, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

}  // namespace

const Kernels variant = {widen, narrow, transpose, unpack,   integers, dot,        read_keys,    read_values, rotate, turned_scores,
                         multiply, dot_rows, largest_of, exponentials, cap,        scale};

}  // namespace graphopt::quantized_kv_attention::GRAPHOPT_ISA
