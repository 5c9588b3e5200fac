// Numbers of one token to bytes with one scale, by the threads of one block; see simd_quantize.h for the arithmetic.
#pragma once

#include <cstdint>

namespace graphopt {

// The largest of all threads' values; every thread of the block calls it and gets it. `shared` has room for 32 numbers.
__device__ inline int block_max(int value, int* shared) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = max(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
  __syncthreads();  // others may still read what an earlier call left there
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = lane < warps ? shared[lane] : 0;
  for (int distance = 16; distance > 0; distance /= 2) {
    value = max(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// Quantizes values[0 .. size) · factor, which lie in shared memory and are seen by all threads; blockDim.x is a multiple
// of 32.
__device__ inline void quantize_token(const float* values, int64_t size, float factor, float clip, float largest,
                                      uint8_t* bytes, float* scale_of_token) {
  __shared__ int shared[32];
  int most = 0;  // as integers, magnitudes order as the numbers do, and infinities and NaN above all of them
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    most = max(most, __float_as_int(__fmul_rn(values[i], factor)) & 0x7fffffff);
  }
  most = block_max(most, shared);
  const bool broken = most >= 0x7f800000;
  float scale = __fdiv_rn(__fmul_rn(__int_as_float(most), clip), largest);
  if (scale < 0x1p-126f) scale = 1;
  const float inverse = broken ? 0 : __fdiv_rn(1.0f, scale);
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    const float value = broken ? 0 : __fmul_rn(__fmul_rn(values[i], factor), inverse);
    bytes[i] = uint8_t(128 + __float2int_rn(fminf(fmaxf(value, -largest), largest)));
  }
  if (threadIdx.x == 0) *scale_of_token = broken ? __int_as_float(0x7fc00000) : scale;
}

}  // namespace graphopt
