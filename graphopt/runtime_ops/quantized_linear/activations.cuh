// Activations rounded to bytes in blocks, in device memory.
#pragma once

#include <cstdint>

#include "numbers.cuh"

namespace graphopt::quantized_linear {

// A float or half-precision number of a tensor whose type is known only now.
__device__ inline float scalar(const void* numbers, bool half, int64_t index) {
  return half ? number(static_cast<const __half*>(numbers)[index]) : number(static_cast<const float*>(numbers)[index]);
}

// What a block's bytes stand for: the activations are scale · bytes.
struct alignas(8) Block {
  float scale;
  int sum;  // of the bytes; with 16 bits, of 256 · high + low
};

// Tokens of activations as products take them. A token's bytes come as the numbers of its weights do when words are
// shifted and masked: with 4 bits those that meet low halves of bytes, and behind them those that meet high ones; with
// 2 bits four such planes. Neighbouring lanes, which have neighbouring words, then read neighbouring bytes.
struct Activations {
  int8_t* bytes;       // [terms, tokens, planes, row / planes]: the high bytes and, with two terms, the low ones
  Block* blocks;       // [tokens, length / block]
  int64_t tokens;
  int64_t row;         // `length` rounded up to kRowMultiple
  int64_t length;
  int block_log2;      // of the numbers of a block
  int bits;            // of a weight's number
  int terms;           // 1: 8 bits, 2: 16 bits

  __host__ __device__ int block() const { return 1 << block_log2; }
  __host__ __device__ int64_t blocks_of_token() const { return length >> block_log2; }
  __host__ __device__ int64_t term_bytes() const { return tokens * row; }
};

constexpr int64_t kRowMultiple = 64;  // four planes of 16 bytes

// Where number k of a token lies in its row of `row` bytes.
__host__ __device__ inline int64_t place(int64_t k, int64_t row, int bits) {
  const int planes_log2 = bits == 2 ? 2 : bits == 4 ? 1 : 0;
  return (k & ((1 << planes_log2) - 1)) * (row >> planes_log2) + (k >> planes_log2);
}

// A warp rounds block `index` of token `token`, whose numbers get(i) gives, 0 <= i < x.block(). As in the portable body,
// but a block that isn't finite has the scale NaN and bytes of zero.
template <typename Get>
__device__ void round_block(const Activations& x, int64_t token, int64_t index, Get get) {
  constexpr int kMost = 256 / 32;  // numbers of a lane
  const int lane = int(threadIdx.x % 32);
  float values[kMost];
  int magnitude = 0;  // as integers, magnitudes order as the numbers do, and infinities and NaN above all of them
#pragma unroll
  for (int j = 0; j < kMost; ++j) {
    const int i = lane + 32 * j;
    values[j] = i < x.block() ? get(i) : 0.0f;
    magnitude = max(magnitude, __float_as_int(values[j]) & 0x7fffffff);
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    magnitude = max(magnitude, __shfl_xor_sync(0xffffffffu, magnitude, distance));
  }
  const bool finite = magnitude < 0x7f800000;
  const float peak = __int_as_float(magnitude), most = x.terms == 2 ? 32512.0f : 127.0f;
  // Bounded, since the inverse of the smallest numbers is infinite, and zeros stand beside them.
  const float inverse = finite && peak > 0.0f ? fminf(__fdiv_rn(most, peak), 0x1.fffffep127f) : 0.0f;
  int8_t* high = x.bytes + token * x.row;
  int8_t* low = high + x.term_bytes();
  int sum = 0;
#pragma unroll
  for (int j = 0; j < kMost; ++j) {
    const int i = lane + 32 * j;
    if (i >= x.block()) break;
    const int rounded = __float2int_rn(finite ? __fmul_rn(values[j], inverse) : 0.0f);
    const int64_t at = place(index * x.block() + i, x.row, x.bits);
    if (x.terms == 2) {
      const int upper = (rounded + 128) >> 8;
      high[at] = int8_t(upper);
      low[at] = int8_t(rounded - upper * 256);
    } else {
      high[at] = int8_t(rounded);
    }
    sum += rounded;
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (lane == 0) {
    x.blocks[token * x.blocks_of_token() + index] = {finite ? __fdiv_rn(peak, most) : __int_as_float(0x7fc00000), sum};
  }
}

}  // namespace graphopt::quantized_linear
