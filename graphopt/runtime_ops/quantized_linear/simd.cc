#include "kernels.h"
#include "products.h"
#include "simd.h"

namespace graphopt::quantized_linear::GRAPHOPT_ISA {
namespace {

float root(float x) { return __builtin_sqrtf(x); }

void rms_norm(const float* x, const float* weight, float epsilon, int64_t length, float* y) {
  F squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= length; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const F v = load(x + i + j * kLanes);
      squares[j] = fma(v, v, squares[j]);
    }
  }
  float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < length; ++i) total += x[i] * x[i];
  const float factor = 1.0f / root(total / float(length) + epsilon);
  for (i = 0; i + kLanes <= length; i += kLanes) store(y + i, load(x + i) * all(factor) * load(weight + i));
  for (; i < length; ++i) y[i] = x[i] * factor * weight[i];
}

// The largest magnitude, and in `poison` zero, or no number where there is one that isn't finite.
float magnitude(const float* x, int64_t count, float* poison) {
  F found = {}, zeros = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F v = load(x + i);
    found = larger(v < 0 ? -v : v, found);
    zeros = fma(v, F{}, zeros);
  }
  float most = largest(found);
  *poison = sum(zeros);
  for (; i < count; ++i) {
    most = __builtin_fabsf(x[i]) > most ? __builtin_fabsf(x[i]) : most;
    *poison += x[i] * 0.0f;
  }
  return most;
}

// To the nearest whole number, halves to the even one; for numbers below 2^22.
int32_t nearest(float x) {
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23: the unit of its last place is 1
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4b400000;
}

#if defined(__AVX512VNNI__)

// Rounds as many of `count` numbers as come in steps of 32 (4 bits) or 16 (8 bits), and puts their bytes in place.
int64_t rounded(const Layout& layout, const float* x, int64_t count, int64_t begin_in, float inverse, int8_t* high,
                int8_t* low, int32_t* high_sum, int32_t* low_sum) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 factor = _mm512_set1_ps(inverse);
  const int parts = 8 / layout.bits, step = 16 * parts;
  const bool poisoned = inverse == 0.0f;
  __m512i high_total = _mm512_setzero_si512(), low_total = high_total;
  int64_t i = 0;
  for (; i + step <= count; i += step) {
    __m512 group[2] = {_mm512_loadu_ps(x + i), _mm512_setzero_ps()};
    if (parts == 2) {
      const __m512 second = _mm512_loadu_ps(x + i + 16);
      group[1] = _mm512_permutex2var_ps(group[0], odd, second);
      group[0] = _mm512_permutex2var_ps(group[0], even, second);
    }
    for (int p = 0; p < parts; ++p) {
      const __m512i q = poisoned ? _mm512_setzero_si512() : _mm512_cvtps_epi32(_mm512_mul_ps(group[p], factor));
      const int64_t place = p * kChunk + (begin_in + i) / parts;
      if (layout.terms == 2) {
        const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
        const __m512i lower = _mm512_sub_epi32(q, _mm512_slli_epi32(upper, 8));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(high + place), _mm512_cvtepi32_epi8(upper));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(low + place), _mm512_cvtepi32_epi8(lower));
        high_total = _mm512_add_epi32(high_total, upper);
        low_total = _mm512_add_epi32(low_total, lower);
      } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(high + place), _mm512_cvtepi32_epi8(q));
        high_total = _mm512_add_epi32(high_total, q);
      }
    }
  }
  *high_sum = _mm512_reduce_add_epi32(high_total);
  *low_sum = _mm512_reduce_add_epi32(low_total);
  return i;
}

#endif

void quantize(const Layout& layout, const float* x, int64_t first, int64_t last, uint8_t* row) {
  const int parts = 8 / layout.bits, shift = parts == 4 ? 2 : parts == 2 ? 1 : 0;
  const int64_t in_chunk = int64_t(kChunk) * parts, in_word = 4 * parts;
  const int32_t middle = layout.middle;
  const float most = layout.terms == 2 ? 32512.0f : 127.0f;
  float* sums = reinterpret_cast<float*>(row + layout.chunks * layout.chunk_bytes);
  for (int64_t begin = first; begin < last; begin += layout.block) {
    float poison;
    const float peak = magnitude(x + begin, layout.block, &poison);
    // In a block that isn't finite the scale is no number, and whatever stands in it counts for nothing.
    // One of next to nothing becomes zeros: the inverse of its largest number wouldn't be finite.
    const float inverse = peak > 1e-30f && poison == 0 ? most / peak : 0.0f, scale = peak / most + poison;
    int64_t total = 0;
    for (int64_t at = begin; at < begin + layout.block;) {
      // A block may be longer than a chunk.
      uint8_t* chunk = row + at / in_chunk * layout.chunk_bytes;
      const int64_t begin_in = at % in_chunk;
      const int64_t count = begin + layout.block - at < in_chunk - begin_in ? begin + layout.block - at : in_chunk - begin_in;
      int8_t* high = reinterpret_cast<int8_t*>(chunk);
      int8_t* low = high + parts * kChunk;
      int32_t* offsets = reinterpret_cast<int32_t*>(chunk + layout.terms * parts * kChunk);
      float* scales = reinterpret_cast<float*>(offsets + layout.terms * kWords);
      int32_t high_sum = 0, low_sum = 0;
      int64_t i = 0;
#if defined(__AVX512VNNI__)
      if (layout.bits > 2) {
        i = rounded(layout, x + at, count, begin_in, poison == 0 ? inverse : 0.0f, high, low, &high_sum, &low_sum);
      }
#endif
      for (; i < count; ++i) {
        const int32_t q = nearest(poison == 0 ? x[at + i] * inverse : 0.0f);
        const int64_t place = ((begin_in + i) & (parts - 1)) * kChunk + ((begin_in + i) >> shift);
        if (layout.terms == 2) {
          const int32_t upper = (q + 128) >> 8;
          high[place] = int8_t(upper);
          low[place] = int8_t(q - upper * 256);
          high_sum += upper;
          low_sum += q - upper * 256;
        } else {
          high[place] = int8_t(q);
          high_sum += q;
        }
      }
      const int64_t word = begin_in / in_word, words = count / in_word > 0 ? count / in_word : 1;
      for (int64_t w = word; w < word + words; ++w) {
        scales[w] = scale;
        offsets[w] = 0;
        if (layout.terms == 2) offsets[kWords + w] = 0;
      }
      offsets[word] = -middle * high_sum;
      if (layout.terms == 2) offsets[kWords + word] = -middle * low_sum;
      total += layout.terms == 2 ? int64_t(high_sum) * 256 + low_sum : high_sum;
      at += count;
    }
    sums[begin / layout.block] = scale * float(total);
  }
  if (last == layout.length && layout.length % in_chunk != 0) {
    // The rest of the last chunk: weights read as zero there, and offsets must not count.
    const int64_t begin_in = layout.length % in_chunk;
    uint8_t* chunk = row + layout.length / in_chunk * layout.chunk_bytes;
    int8_t* values = reinterpret_cast<int8_t*>(chunk);
    for (int part = 0; part < layout.terms * parts; ++part) {
      for (int64_t place = begin_in >> shift; place < kChunk; ++place) values[part * kChunk + place] = 0;
    }
    int32_t* offsets = reinterpret_cast<int32_t*>(chunk + layout.terms * parts * kChunk);
    float* scales = reinterpret_cast<float*>(offsets + layout.terms * kWords);
    for (int64_t word = begin_in / in_word; word < kWords; ++word) {
      scales[word] = 0;
      offsets[word] = 0;
      if (layout.terms == 2) offsets[kWords + word] = 0;
    }
  }
}

F activated(int activation, F x) {
  switch (activation) {
    case 0:
      return x / (all(1.0f) + exponential(-x));
    case 1: {
      // erf by Abramowitz and Stegun 7.1.26, to 1.5e-7.
      const F z = x * all(0.70710678f), a = z < 0 ? -z : z;
      const F t = all(1.0f) / fma(all(0.3275911f), a, all(1.0f));
      F p = fma(all(1.061405429f), t, all(-1.453152027f));
      p = fma(p, t, all(1.421413741f));
      p = fma(p, t, all(-0.284496736f));
      p = fma(p, t, all(0.254829592f));
      const F e = all(1.0f) - p * t * exponential(-a * a);
      return all(0.5f) * x * (all(1.0f) + (z < 0 ? -e : e));
    }
    case 2: {
      // 0.5 x (1 + tanh u) = x / (1 + e^(-2u))
      const F u = all(0.79788456f) * fma(all(0.044715f) * x * x, x, x);
      return x / (all(1.0f) + exponential(all(-2.0f) * u));
    }
    default:
      return x < 0 ? F{} : x;
  }
}

void gate(int activation, float* gates, const float* up, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(gates + i, activated(activation, load(gates + i)) * load(up + i));
  if (i < count) {
    float a[kLanes] = {}, b[kLanes] = {};
    std::memcpy(a, gates + i, size_t(count - i) * sizeof(float));
    std::memcpy(b, up + i, size_t(count - i) * sizeof(float));
    store(a, activated(activation, load(a)) * load(b));
    std::memcpy(gates + i, a, size_t(count - i) * sizeof(float));
  }
}

}  // namespace

const Kernels variant = {rms_norm, quantize, multiply, gate};

}  // namespace graphopt::quantized_linear::GRAPHOPT_ISA
