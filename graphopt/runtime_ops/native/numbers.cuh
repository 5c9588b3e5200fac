// Numbers of float and half-precision tensors in CUDA kernels.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace graphopt {

__device__ inline float number(float value) { return value; }
__device__ inline float number(__half value) { return __half2float(value); }

template <typename V>
__device__ inline V rounded(float value);
template <>
__device__ inline float rounded<float>(float value) {
  return value;
}
template <>
__device__ inline __half rounded<__half>(float value) {
  return __float2half_rn(value);
}

// The most dynamic shared memory that a kernel may have without asking.
constexpr size_t kPlainSharedMemory = 48 << 10;

template <typename Kernel>
inline cudaError_t allow_shared_memory(Kernel kernel, size_t bytes) {
  if (bytes <= kPlainSharedMemory) return cudaSuccess;
  if (bytes > INT32_MAX) return cudaErrorInvalidValue;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

// Blocks of a grid whose blocks each take every gridDim.x-th item.
inline unsigned blocks_for(int64_t items) { return unsigned(items < 1 << 20 ? items : 1 << 20); }

}  // namespace graphopt
