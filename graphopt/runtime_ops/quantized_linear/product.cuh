// A product of rounded activations with a block-quantized weight in device memory: what kernels are given, and how its
// parts are read and written.
#pragma once

#include "activations.cuh"

namespace graphopt::quantized_linear {

// A weight as in kernels.h. Numbers of 8 bits are taken for signed ones, 128 less than they are, and so are their zero
// points; smaller numbers are as they are.
struct Weight {
  const uint32_t* packed;      // [rows, words]
  const void* scales;          // [rows, blocks]
  const uint8_t* zero_points;  // [rows, zero_bytes]; null: `zero`
  const void* minimums;        // [rows, blocks]; null: none
  int64_t rows;
  int64_t blocks;
  int64_t words;               // of a row
  int64_t zero_bytes;          // of a row
  int zero;                    // the zero point where none is given
  int words_of_block_log2;
  bool half;                   // scales and minimums are half-precision numbers
  bool aligned;                // rows begin at multiples of 16 bytes
};

// What becomes of the product.
struct Output {
  void* y;               // [tokens, columns]
  const float* bias;     // [columns]; null: none
  const void* residual;  // [tokens, columns], of y's type; null: none. May be y
  int64_t columns;
  bool half;             // y and the residual are half-precision numbers
};

// The bytes of part `part` of a word's numbers.
template <int kBits>
__device__ inline uint32_t part_of(uint32_t word, int part) {
  if (kBits == 8) return word ^ 0x80808080u;
  return word >> (part * kBits) & (kBits == 4 ? 0x0f0f0f0fu : 0x03030303u);
}

template <int kBits>
__device__ inline int zero_point(const Weight& weight, int64_t n, int64_t block) {
  if (weight.zero_points == nullptr) return weight.zero;
  const int64_t at = block * kBits;
  return (weight.zero_points[n * weight.zero_bytes + at / 8] >> (at % 8) & ((1 << kBits) - 1)) - (kBits == 8 ? 128 : 0);
}

// The products of a block's numbers less their zero point, exactly. Sums of bytes come as those of the high bytes and
// of the low ones; what overflows on the way is back in range at the end.
template <int kTerms>
__device__ inline float whole(const int (&sums)[kTerms], int zero, int sum_of_block) {
  unsigned total = unsigned(sums[0]);
  if (kTerms == 2) total = total * 256u + unsigned(sums[kTerms - 1]);
  return float(int(total - unsigned(zero) * unsigned(sum_of_block)));
}

__device__ inline void put(const Output& out, int64_t token, int64_t column, float value) {
  const int64_t at = token * out.columns + column;
  if (out.bias != nullptr) value += out.bias[column];
  if (out.residual != nullptr) value += scalar(out.residual, out.half, at);
  if (out.half) {
    static_cast<__half*>(out.y)[at] = rounded<__half>(value);
  } else {
    static_cast<float*>(out.y)[at] = value;
  }
}

}  // namespace graphopt::quantized_linear
