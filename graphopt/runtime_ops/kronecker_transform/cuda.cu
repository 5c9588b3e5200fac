// CUDA kernels of KroneckerTransform and KroneckerQuantize.
//
// A block transforms one token: X B into shared memory, then Aᵀ times that. In both products a warp computes tiles of kRows
// rows and 32 · kColumns columns: neighbouring lanes have neighbouring columns of the right operand, and all lanes of a warp
// the same numbers of the left one. Sums are of float32, as in the portable body, not of a tensor core's shorter numbers.
#include "launchers.h"
#include "numbers.cuh"
#include "per_token.cuh"

namespace graphopt::kronecker_transform {
namespace {

constexpr int kRows = 8;

// Tile by tile sum(k, row, column) += left(row, k) · right(k, column) over k < depth, then put(row, column, sum), for all
// rows < rows and columns < columns. Every warp of the block calls it.
template <int kColumns, typename Left, typename Right, typename Put>
__device__ void multiply(int rows, int depth, int columns, Left left, Right right, Put put) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int down = (rows + kRows - 1) / kRows, across = (columns + 32 * kColumns - 1) / (32 * kColumns);
  for (int tile = warp; tile < down * across; tile += warps) {
    const int first_row = tile % down * kRows, first_column = tile / down * 32 * kColumns + lane;
    float sums[kRows][kColumns] = {};
    for (int k = 0; k < depth; ++k) {
      float numbers[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = first_column + 32 * c;
        numbers[c] = column < columns ? right(k, column) : 0;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float one = first_row + r < rows ? left(first_row + r, k) : 0;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[r][c] = fmaf(one, numbers[c], sums[r][c]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int row = first_row + r, column = first_column + 32 * c;
        if (row < rows && column < columns) put(row, column, sums[r][c]);
      }
    }
  }
}

// Aᵀ X B of one token, given out by put(index, number). `product` is shared memory for a · b numbers. All of x has been
// read before the first number is given out.
template <int kColumns, typename V, typename Put>
__device__ void transform(const V* x, const float* left, const float* right, float* product, int a, int b, Put put) {
  multiply<kColumns>(
      a, b, b, [=](int row, int k) { return number(x[row * b + k]); },
      [=](int k, int column) { return right[k * b + column]; },
      [=](int row, int column, float sum) { product[row * b + column] = sum; });
  __syncthreads();
  multiply<kColumns>(
      a, a, b, [=](int row, int k) { return left[k * a + row]; },
      [=](int k, int column) { return product[k * b + column]; },
      [=](int row, int column, float sum) { put(row * b + column, sum); });
  __syncthreads();
}

template <int kColumns, typename V>
__global__ void transform_tokens(const V* x, const float* left, const float* right, V* y, int64_t tokens, int a, int b) {
  extern __shared__ __align__(16) float memory[];
  for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    V* to = y + token * a * b;
    transform<kColumns>(x + token * a * b, left, right, memory, a, b,
                        [=](int index, float value) { to[index] = rounded<V>(value); });
  }
}

template <int kColumns, typename V>
__global__ void quantize_tokens(const V* x, const float* left, const float* right, uint8_t* y, float* scales,
                                int64_t tokens, int a, int b, float clip, float largest) {
  extern __shared__ __align__(16) float memory[];
  float* values = memory + a * b;
  for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    transform<kColumns>(x + token * a * b, left, right, memory, a, b,
                        [=](int index, float value) { values[index] = value; });
    quantize_token(values, a * b, 1, clip, largest, y + token * a * b, scales + token);
    __syncthreads();
  }
}

// More than any shared memory holds.
constexpr int64_t kMostNumbers = 1 << 20;

bool sensible(int64_t tokens, int64_t a, int64_t b) {
  return tokens >= 0 && a > 0 && b > 0 && a <= kMostNumbers && b <= kMostNumbers / a;
}

// A warp for each tile, 2 to 16 of them.
unsigned threads_for(int64_t a, int64_t b, int columns) {
  const int64_t tiles = (a + kRows - 1) / kRows * ((b + 32 * columns - 1) / (32 * columns));
  return unsigned(tiles < 2 ? 2 : tiles > 16 ? 16 : tiles) * 32;
}

template <int kColumns, typename V>
int launch_transform(const void* x, const float* left, const float* right, void* y, int64_t tokens, int64_t a, int64_t b,
                     void* stream) {
  const size_t bytes = size_t(a * b) * sizeof(float);
  auto* kernel = transform_tokens<kColumns, V>;
  if (const cudaError_t refused = allow_shared_memory(kernel, bytes)) return refused;
  kernel<<<blocks_for(tokens), threads_for(a, b, kColumns), bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const V*>(x), left, right, static_cast<V*>(y), tokens, int(a), int(b));
  return cudaGetLastError();
}

template <int kColumns, typename V>
int launch_quantize(const void* x, const float* left, const float* right, uint8_t* y, float* scales, int64_t tokens,
                    int64_t a, int64_t b, float clip, float largest, void* stream) {
  const size_t bytes = 2 * size_t(a * b) * sizeof(float);
  auto* kernel = quantize_tokens<kColumns, V>;
  if (const cudaError_t refused = allow_shared_memory(kernel, bytes)) return refused;
  kernel<<<blocks_for(tokens), threads_for(a, b, kColumns), bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const V*>(x), left, right, y, scales, tokens, int(a), int(b), clip, largest);
  return cudaGetLastError();
}

template <typename V>
int transform_any(const void* x, const float* left, const float* right, void* y, int64_t tokens, int64_t a, int64_t b,
                  void* stream) {
  if (!sensible(tokens, a, b)) return cudaErrorInvalidValue;
  if (tokens == 0) return cudaSuccess;
  if (b <= 32) return launch_transform<1, V>(x, left, right, y, tokens, a, b, stream);
  if (b <= 64) return launch_transform<2, V>(x, left, right, y, tokens, a, b, stream);
  return launch_transform<4, V>(x, left, right, y, tokens, a, b, stream);
}

template <typename V>
int quantize_any(const void* x, const float* left, const float* right, uint8_t* y, float* scales, int64_t tokens,
                 int64_t a, int64_t b, float clip, float largest, void* stream) {
  if (!sensible(tokens, a, b)) return cudaErrorInvalidValue;
  if (tokens == 0) return cudaSuccess;
  if (b <= 32) return launch_quantize<1, V>(x, left, right, y, scales, tokens, a, b, clip, largest, stream);
  if (b <= 64) return launch_quantize<2, V>(x, left, right, y, scales, tokens, a, b, clip, largest, stream);
  return launch_quantize<4, V>(x, left, right, y, scales, tokens, a, b, clip, largest, stream);
}

}  // namespace
}  // namespace graphopt::kronecker_transform

int graphopt_cuda_kronecker_transform_float(const void* x, const float* left, const float* right, void* y,
                                            int64_t tokens, int64_t a, int64_t b, void* stream) {
  return graphopt::kronecker_transform::transform_any<float>(x, left, right, y, tokens, a, b, stream);
}

int graphopt_cuda_kronecker_transform_half(const void* x, const float* left, const float* right, void* y, int64_t tokens,
                                           int64_t a, int64_t b, void* stream) {
  return graphopt::kronecker_transform::transform_any<__half>(x, left, right, y, tokens, a, b, stream);
}

int graphopt_cuda_kronecker_quantize_float(const void* x, const float* left, const float* right, uint8_t* y,
                                           float* scales, int64_t tokens, int64_t a, int64_t b, float clip,
                                           float largest, void* stream) {
  return graphopt::kronecker_transform::quantize_any<float>(x, left, right, y, scales, tokens, a, b, clip, largest,
                                                            stream);
}

int graphopt_cuda_kronecker_quantize_half(const void* x, const float* left, const float* right, uint8_t* y,
                                          float* scales, int64_t tokens, int64_t a, int64_t b, float clip, float largest,
                                          void* stream) {
  return graphopt::kronecker_transform::quantize_any<__half>(x, left, right, y, scales, tokens, a, b, clip, largest,
                                                             stream);
}
