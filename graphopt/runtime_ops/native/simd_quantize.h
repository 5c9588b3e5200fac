// Numbers of one token to bytes with one scale.
#pragma once

#include "simd.h"

namespace graphopt::GRAPHOPT_ISA {

using B = uint8_t __attribute__((vector_size(GRAPHOPT_VECTOR_BYTES / 4)));

GRAPHOPT_INLINE I bits_of(F value) {
  I made;
  std::memcpy(&made, &value, sizeof made);
  return made;
}

// bytes[i] = 128 + round(values[i] / scale), at most `largest` away from 128, halves to even; returns the scale, the
// largest magnitude · clip / largest. Where a value is no finite number the scale is NaN and all bytes are 128; where the
// scale would be below 2^-126 it is 1.
GRAPHOPT_INLINE float quantize_symmetric(const float* values, int64_t size, float clip, float largest, uint8_t* bytes) {
  // As integers, magnitudes order as the numbers do, and infinities and NaN above all of them.
  I found{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const I magnitude = bits_of(load(values + i)) & 0x7fffffff;
    found = magnitude > found ? magnitude : found;
  }
  int32_t most = 0;
  for (int lane = 0; lane < kLanes; ++lane) most = found[lane] > most ? found[lane] : most;
  for (int64_t j = i; j < size; ++j) {
    int32_t bits;
    std::memcpy(&bits, values + j, sizeof bits);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  if (most >= 0x7f800000) {
    std::memset(bytes, 128, size_t(size));
    return __builtin_nanf("");
  }
  float scale;
  std::memcpy(&scale, &most, sizeof scale);
  scale = scale * clip / largest;
  if (scale < 0x1p-126f) scale = 1;
  const float inverse = 1 / scale;
  // Numbers between 2^23 and 2^24 have no fraction, so that adding 1.5 · 2^23 rounds, and leaves 128 + the result in the
  // last bits.
  const F shift = all(0x1.8p23f + 128), low = all(-largest), high = all(largest);
  for (i = 0; i + kLanes <= size; i += kLanes) {
    F value = load(values + i) * inverse;
    value = value < low ? low : value;
    value = value > high ? high : value;
    const B made = __builtin_convertvector(bits_of(value + shift) & 255, B);
    std::memcpy(bytes + i, &made, sizeof made);
  }
  for (; i < size; ++i) {
    float value = values[i] * inverse;
    value = value < -largest ? -largest : value;
    value = value > largest ? largest : value;
    value += 0x1.8p23f + 128;
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bytes[i] = uint8_t(bits);
  }
  return scale;
}

}  // namespace graphopt::GRAPHOPT_ISA
