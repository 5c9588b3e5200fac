// Half-precision numbers to float32 and back, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace graphopt {

struct Half {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(Half half) {
  const uint32_t sign = uint32_t(half.bits & 0x8000) << 16;
  const uint32_t magnitude = uint32_t(half.bits & 0x7fff) << 13;
  uint32_t bits = sign | 0x7f800000 | magnitude;
  float made;
  if ((half.bits & 0x7c00) != 0x7c00) {
    // Numbers below 2^-14 have no leading one: scaled by an exact power of two, both kinds come out right.
    std::memcpy(&made, &magnitude, sizeof made);
    made *= 0x1p112f;
    std::memcpy(&bits, &made, sizeof bits);
    bits |= sign;
  }
  std::memcpy(&made, &bits, sizeof made);
  return made;
}

template <typename V>
V from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline Half from_float<Half>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};   // not a number
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to more than the largest
  if (bits < 0x38800000) {                                   // below 2^-14: a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    magnitude += 0.5f;  // the unit of its last place is then 2^-24, so that the addition rounds
    std::memcpy(&bits, &magnitude, sizeof bits);
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  bits += 0xfff + (bits >> 13 & 1);
  return {uint16_t(sign | ((bits - 0x38000000) >> 13))};
}

}  // namespace graphopt
