// Codes as floats, and keys turned by their place. Only for simd.cc.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace graphopt::quantized_kv_attention::GRAPHOPT_ISA {
namespace {

using namespace graphopt::GRAPHOPT_ISA;

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

void turn_row(float* features, int64_t half, const float* cos, const float* sin) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const F a = load(features + i), b = load(features + half + i), c = load(cos + i), s = load(sin + i);
    store(features + i, a * c - b * s);
    store(features + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = features[i], b = features[half + i];
    features[i] = a * cos[i] - b * sin[i];
    features[half + i] = b * cos[i] + a * sin[i];
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

};

GRAPHOPT_INLINE F key_of(const Shifted& s, F code, int64_t channel, int64_t token) {
  if (s.group == 0) return fma(code, all(s.scale[channel]), all(s.least[channel]));
  const int64_t at = channel / s.group * s.width + token;
  return fma(code, load(s.scale + at), load(s.least + at));
}

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
        const F x = key_of(shifted, one_and(low[v], i), first + i, t);
        const F y = key_of(shifted, one_and(high[v], i), first + half + i, t);
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
        const F x = key_of(shifted, one_and(four, i), first + i, token + v * kLanes);
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

}  // namespace
}  // namespace graphopt::quantized_kv_attention::GRAPHOPT_ISA
