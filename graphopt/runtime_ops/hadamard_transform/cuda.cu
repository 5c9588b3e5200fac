// CUDA kernels of HadamardTransform and HadamardQuantize.
//
// A block transforms one group in shared memory. With a factor of one number a thread takes eight neighbours at once: three
// levels in its registers, five more by exchange with the other lanes of its warp. The levels from there on take up to
// eight numbers of shared memory at a time. The levels come in the order of the portable body, so that numbers are equal.
#include "launchers.h"
#include "numbers.cuh"
#include "per_token.cuh"

namespace graphopt::hadamard_transform {
namespace {

constexpr int kEight = 8;               // numbers that a thread loads at once
constexpr int kWarpNumbers = 32 * kEight;
constexpr int kWarpLevels = 8;
constexpr int kSharedFactor = 64;   // rows of the largest factor that is copied to shared memory

template <typename V>
struct alignas(sizeof(V) * kEight < 16 ? sizeof(V) * kEight : 16) Eight {
  V numbers[kEight];
};

template <typename V>
__device__ void load_eight(const V* from, float (&values)[kEight]) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(Eight<V>) == 0) {
    const Eight<V> read = *reinterpret_cast<const Eight<V>*>(from);
#pragma unroll
    for (int i = 0; i < kEight; ++i) values[i] = number(read.numbers[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) values[i] = number(from[i]);
  }
}

template <typename V>
__device__ void store_eight(V* to, const float (&values)[kEight], float scale) {
  Eight<V> made;
#pragma unroll
  for (int i = 0; i < kEight; ++i) made.numbers[i] = rounded<V>(__fmul_rn(values[i], scale));
  if (reinterpret_cast<uintptr_t>(to) % alignof(Eight<V>) == 0) {
    *reinterpret_cast<Eight<V>*>(to) = made;
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) to[i] = made.numbers[i];
  }
}

// kLevels levels of 2^kLevels numbers in registers.
template <int kLevels>
__device__ void butterfly(float (&values)[1 << kLevels]) {
#pragma unroll
  for (int level = 0; level < kLevels; ++level) {
#pragma unroll
    for (int i = 0; i < 1 << kLevels; ++i) {
      if ((i >> level & 1) == 0) {
        const float a = values[i], b = values[i + (1 << level)];
        values[i] = a + b;
        values[i + (1 << level)] = a - b;
      }
    }
  }
}

// The first `levels`, 3 to kWarpLevels, of the numbers of a warp, eight neighbours a lane.
__device__ void warp_levels(float (&values)[kEight], int levels) {
  butterfly<3>(values);
  const int lane = threadIdx.x % 32;
  for (int distance = 1; distance < 1 << (levels - 3); distance *= 2) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, values[i], distance);
      values[i] = (lane & distance) != 0 ? other - values[i] : values[i] + other;
    }
  }
}

// kLevels levels in shared memory, of rows that are `width` numbers apart.
template <int kLevels>
__device__ void pass(float* values, int size, int width) {
  constexpr int kRows = 1 << kLevels;
  for (int item = threadIdx.x; item < size / kRows; item += blockDim.x) {
    float* from = values + item / width * (kRows * width) + item % width;
    float rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = from[r * width];
    butterfly<kLevels>(rows);
#pragma unroll
    for (int r = 0; r < kRows; ++r) from[r * width] = rows[r];
  }
  __syncthreads();
}

// Blocks of m numbers times the factor F: values[b · m + r] = Σ F[r, i] x[b · m + i]. `turned` is Fᵀ, or nullptr.
template <typename V>
__device__ void apply_factor(const V* x, const float* factor, const float* turned, float* values, int blocks,
                             int m) {
  constexpr int kBlocks = 4;  // blocks of m numbers that a thread works on at once
  for (int item = threadIdx.x; item < (blocks + kBlocks - 1) / kBlocks * m; item += blockDim.x) {
    const int row = item % m, first = item / m * kBlocks;
    float sums[kBlocks] = {};
    for (int i = 0; i < m; ++i) {
      const float f = turned != nullptr ? turned[i * m + row] : factor[row * m + i];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if (first + b < blocks) sums[b] = fmaf(f, number(x[(first + b) * m + i]), sums[b]);
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (first + b < blocks) values[(first + b) * m + row] = sums[b];
    }
  }
}

// Groups, without their scale, into `values` in shared memory; all threads see them then.
template <typename V>
__device__ void rotate(const V* x, const float* factor, const float* turned, float* values, int groups, int halves,
                       int m) {
  const int size = groups * halves * m;
  int levels = 31 - __clz(halves);
  int width = m;
  if (m > 1) {
    apply_factor(x, factor, turned, values, groups * halves, m);
  } else if (levels >= kWarpLevels) {
    const float one = factor[0];
    for (int at = threadIdx.x * kEight; at < size; at += blockDim.x * kEight) {  // whole warps
      float eight[kEight];
      load_eight(x + at, eight);
#pragma unroll
      for (int i = 0; i < kEight; ++i) eight[i] = __fmul_rn(eight[i], one);
      warp_levels(eight, kWarpLevels);
      store_eight(values + at, eight, 1);
    }
    levels -= kWarpLevels;
    width = kWarpNumbers;
  } else {
    for (int i = threadIdx.x; i < size; i += blockDim.x) values[i] = __fmul_rn(number(x[i]), factor[0]);
  }
  __syncthreads();
  for (; levels >= 3; levels -= 3, width *= 8) pass<3>(values, size, width);
  if (levels == 2) pass<2>(values, size, width);
  if (levels == 1) pass<1>(values, size, width);
}

// The factor's transpose into shared memory; all threads see it then.
__device__ void turn(const float* factor, float* turned, int m) {
  for (int i = threadIdx.x; i < m * m; i += blockDim.x) turned[i % m * m + i / m] = factor[i];
  __syncthreads();
}

__device__ bool in_shared(int m) { return m > 1 && m <= kSharedFactor; }

template <typename V>
__global__ void transform_groups(const V* x, const float* factor, V* y, int64_t groups, int halves, int m, float scale) {
  extern __shared__ __align__(16) float memory[];
  const int size = halves * m;
  float* turned = in_shared(m) ? memory + (size + 3) / 4 * 4 : nullptr;
  if (turned != nullptr) turn(factor, turned, m);
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    rotate(x + group * size, factor, turned, memory, 1, halves, m);
    V* to = y + group * size;
    if (size % kEight == 0) {
      for (int at = threadIdx.x * kEight; at < size; at += blockDim.x * kEight) {
        float eight[kEight];
        load_eight(memory + at, eight);
        store_eight(to + at, eight, scale);
      }
    } else {
      for (int i = threadIdx.x; i < size; i += blockDim.x) to[i] = rounded<V>(__fmul_rn(memory[i], scale));
    }
    __syncthreads();
  }
}

// Groups of 8 to 256 numbers with a factor of one: several of them a warp, without shared memory.
template <typename V>
__global__ void transform_small_groups(const V* x, const float* factor, V* y, int64_t size, int levels, float scale) {
  const float one = factor[0];
  for (int64_t start = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x / 32 * 32) * kEight; start < size;
       start += int64_t(gridDim.x) * blockDim.x * kEight) {
    const int64_t at = start + threadIdx.x % 32 * kEight;
    float eight[kEight] = {};
    if (at < size) load_eight(x + at, eight);  // all eight are of one group
#pragma unroll
    for (int i = 0; i < kEight; ++i) eight[i] = __fmul_rn(eight[i], one);
    warp_levels(eight, levels);
    if (at < size) store_eight(y + at, eight, scale);
  }
}

template <typename V>
__global__ void quantize_tokens(const V* x, const float* factor, uint8_t* y, float* scales, int64_t tokens, int groups,
                                int halves, int m, float scale, float clip, float largest) {
  extern __shared__ __align__(16) float memory[];
  const int size = groups * halves * m;
  float* turned = in_shared(m) ? memory + (size + 3) / 4 * 4 : nullptr;
  if (turned != nullptr) turn(factor, turned, m);
  for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    rotate(x + token * size, factor, turned, memory, groups, halves, m);
    quantize_token(memory, size, scale, clip, largest, y + token * size, scales + token);
    __syncthreads();
  }
}

// More than any shared memory holds.
constexpr int64_t kMostNumbers = 1 << 20;

// Threads of a block for so many numbers of a group: whole warps.
unsigned threads_for(int64_t size) {
  const int64_t wanted = (size / kEight + 31) / 32 * 32;
  return unsigned(wanted < 64 ? 64 : wanted > 512 ? 512 : wanted);
}

size_t shared_bytes(int64_t numbers, int64_t m) {
  return size_t((numbers + 3) / 4 * 4 + (m > 1 && m <= kSharedFactor ? m * m : 0)) * sizeof(float);
}

bool sensible(int64_t items, int64_t halves, int64_t m) {
  return items >= 0 && m > 0 && halves > 0 && (halves & (halves - 1)) == 0 && halves < 1 << 24 && m < 1 << 24;
}

template <typename V>
int launch_transform(const void* x, const float* factor, void* y, int64_t groups, int64_t halves, int64_t m, float scale,
                     void* stream) {
  if (!sensible(groups, halves, m)) return cudaErrorInvalidValue;
  if (groups == 0) return cudaSuccess;
  const V* from = static_cast<const V*>(x);
  V* to = static_cast<V*>(y);
  if (m == 1 && halves >= kEight && halves <= kWarpNumbers) {
    int levels = 0;
    while (int64_t(1) << levels < halves) ++levels;
    const int64_t size = groups * halves;
    constexpr int kThreads = 256;
    const int64_t blocks = (size + kThreads * kEight - 1) / (kThreads * kEight);
    transform_small_groups<V><<<blocks_for(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        from, factor, to, size, levels, scale);
    return cudaGetLastError();
  }
  if (halves * m > kMostNumbers) return cudaErrorInvalidValue;
  const size_t bytes = shared_bytes(halves * m, m);
  if (const cudaError_t refused = allow_shared_memory(transform_groups<V>, bytes)) return refused;
  transform_groups<V><<<blocks_for(groups), threads_for(halves * m), bytes, static_cast<cudaStream_t>(stream)>>>(
      from, factor, to, groups, int(halves), int(m), scale);
  return cudaGetLastError();
}

template <typename V>
int launch_quantize(const void* x, const float* factor, uint8_t* y, float* scales, int64_t tokens, int64_t groups,
                    int64_t halves, int64_t m, float scale, float clip, float largest, void* stream) {
  if (!sensible(tokens, halves, m) || groups <= 0) return cudaErrorInvalidValue;
  if (tokens == 0) return cudaSuccess;
  const int64_t group = halves * m;
  if (group > kMostNumbers || groups > kMostNumbers / group) return cudaErrorInvalidValue;
  const size_t bytes = shared_bytes(groups * group, m);
  if (const cudaError_t refused = allow_shared_memory(quantize_tokens<V>, bytes)) return refused;
  quantize_tokens<V><<<blocks_for(tokens), threads_for(groups * group), bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const V*>(x), factor, y, scales, tokens, int(groups), int(halves), int(m), scale, clip, largest);
  return cudaGetLastError();
}

}  // namespace
}  // namespace graphopt::hadamard_transform

int graphopt_cuda_hadamard_transform_float(const void* x, const float* factor, void* y, int64_t groups, int64_t halves,
                                           int64_t m, float scale, void* stream) {
  return graphopt::hadamard_transform::launch_transform<float>(x, factor, y, groups, halves, m, scale, stream);
}

int graphopt_cuda_hadamard_transform_half(const void* x, const float* factor, void* y, int64_t groups, int64_t halves,
                                          int64_t m, float scale, void* stream) {
  return graphopt::hadamard_transform::launch_transform<__half>(x, factor, y, groups, halves, m, scale, stream);
}

int graphopt_cuda_hadamard_quantize_float(const void* x, const float* factor, uint8_t* y, float* scales, int64_t tokens,
                                          int64_t groups, int64_t halves, int64_t m, float scale, float clip,
                                          float largest, void* stream) {
  return graphopt::hadamard_transform::launch_quantize<float>(x, factor, y, scales, tokens, groups, halves, m, scale, clip,
                                                              largest, stream);
}

int graphopt_cuda_hadamard_quantize_half(const void* x, const float* factor, uint8_t* y, float* scales, int64_t tokens,
                                         int64_t groups, int64_t halves, int64_t m, float scale, float clip,
                                         float largest, void* stream) {
  return graphopt::hadamard_transform::launch_quantize<__half>(x, factor, y, scales, tokens, groups, halves, m, scale,
                                                               clip, largest, stream);
}
