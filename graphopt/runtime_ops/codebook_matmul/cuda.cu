// CUDA kernels of CodebookMatMul, in float32 throughout.
//
// A few rows of x: a warp for each row of weights, whose lanes take eight columns each and look them up as they go.
// More of them: a block writes a tile of weights out to shared memory and multiplies it with a tile of x.
#include "launchers.h"
#include "numbers.cuh"

namespace graphopt::codebook_matmul {
namespace {

constexpr int kEight = 8;  // columns that a thread looks up at a time
constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kChunk = 1024;       // columns of x in shared memory, of a few rows
constexpr int kFew = 4;            // rows of x that a warp multiplies at once
constexpr int kTile = 64;          // rows of x and of weights that a block multiplies,
constexpr int kDepth = 32;         // and columns at a time
constexpr int kPart = kTile / 16;  // of these rows, what one thread of 16 × 16 multiplies
constexpr int kPitch = kTile + 4;  // numbers from one column of a tile to the next

static_assert(kThreads == 16 * 16 && kThreads * kEight == kTile * kDepth, "each thread writes eight numbers of a tile");

// What the kernels want to know of the weights.
struct Weights : GraphoptCodebookWeights {
  int groups, index_row_bytes, mask;
  bool narrow;  // eight columns are 8 · bits bits of one word, of one group
};

__device__ float not_a_number() { return __int_as_float(0x7fffffff); }

// The codebook and the scale of a group of a row.
__device__ const float* group_of(const Weights& weights, int row, int group, float* scale) {
  const int64_t at = int64_t(row) * weights.groups + group;
  *scale = weights.half_scales ? __half2float(static_cast<const __half*>(weights.scales)[at])
                               : static_cast<const float*>(weights.scales)[at];
  const int index_row = row / weights.tile_rows;
  int64_t book = 0;
  if (weights.selectors != nullptr) {
    book = weights.selectors[int64_t(index_row) * weights.groups + group];
  } else if (weights.books > 1) {
    book = index_row;
  }
  if (book >= weights.books) {
    book = 0;
    *scale = not_a_number();
  }
  const int64_t entry = int64_t(weights.tile_rows) * weights.tile_columns;
  return weights.codebooks + book * (weights.mask + 1) * entry + row % weights.tile_rows * weights.tile_columns;
}

// The weights of eight columns of a row; 0 beyond the last column. `column` is a multiple of eight.
__device__ void look_up(const Weights& weights, int row, int column, float (&to)[kEight]) {
  const uint8_t* packed = weights.indices + int64_t(row / weights.tile_rows) * weights.index_row_bytes;
#pragma unroll
  for (int i = 0; i < kEight; ++i) to[i] = 0;
  if (column >= weights.columns) return;
  float scale;
  if (weights.narrow) {
    const int first = column / kEight * weights.bits;
    uint32_t word = 0;
    for (int i = 0; i < weights.bits; ++i) {
      if (first + i < weights.index_row_bytes) word |= uint32_t(packed[first + i]) << 8 * i;
    }
    const float* book = group_of(weights, row, int(column / weights.group_size), &scale);
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (column + i < weights.columns) to[i] = __ldg(book + (word >> weights.bits * i & weights.mask)) * scale;
    }
    return;
  }
  const int64_t entry_size = int64_t(weights.tile_rows) * weights.tile_columns;
  const float* entry = nullptr;
  int last = -1;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if (column + i >= weights.columns) continue;
    const int tile = (column + i) / weights.tile_columns;
    if (tile != last) {
      last = tile;
      const int64_t bit = int64_t(tile) * weights.bits;
      uint32_t word = 0;
      for (int64_t j = bit / 8; j < bit / 8 + 3 && j < weights.index_row_bytes; ++j) {
        word |= uint32_t(packed[j]) << 8 * (j - bit / 8);
      }
      entry = group_of(weights, row, int((column + i) / weights.group_size), &scale) +
              (word >> bit % 8 & weights.mask) * entry_size;
    }
    to[i] = __ldg(entry + (column + i) % weights.tile_columns) * scale;
  }
}

// Rows of x, rounded where block isn't 0.
template <typename V>
struct Operand {
  const V* numbers;
  int columns;
  int block;

  __device__ float plain(int64_t row, int column) const { return number(numbers[row * columns + column]); }

  // The step that the numbers of block `index` of a row are rounded to: NaN where one isn't finite.
  __device__ float step(int64_t row, int index) const {
    const int end = min(columns - index * block, block) + index * block;
    float largest = 0, none = 0;
    for (int column = index * block; column < end; ++column) {
      const float value = plain(row, column);
      largest = fmaxf(largest, fabsf(value));
      none += value * 0.0f;
    }
    return __fdiv_rn(largest, 127.0f) + none;
  }
  __device__ static float rounded_by(float value, float step) {
    return rintf(__fdiv_rn(value, step == 0 ? 1.0f : step)) * step;
  }
  __device__ float at(int64_t row, int column) const {
    const float value = plain(row, column);
    return block == 0 ? value : rounded_by(value, step(row, column / block));
  }

  // Columns first to first + count of `height` rows from `row` on, into to[column · column_pitch + i · row_pitch]; 0
  // beyond the last column and from row m on. All threads of the block take part.
  __device__ void load(int64_t row, int height, int64_t m, int first, int count, float* to, int row_pitch,
                       int column_pitch) const {
    for (int i = threadIdx.x; i < height * count; i += kThreads) {
      const int r = i / count, c = i % count;
      const bool within = row + r < m && first + c < columns;
      to[c * column_pitch + r * row_pitch] = within ? plain(row + r, first + c) : 0.0f;
    }
    if (block == 0) return;
    __syncthreads();
    const int end = min(first + count, columns);
    if (first >= end) return;
    const int first_block = first / block, blocks = (end - 1) / block - first_block + 1;
    for (int i = threadIdx.x; i < height * blocks; i += kThreads) {
      const int r = i / blocks, index = first_block + i % blocks;
      if (row + r >= m) continue;
      const float by = step(row + r, index);
      const int last = min(end - index * block, block) + index * block;
      for (int column = max(first, index * block); column < last; ++column) {
        float& value = to[(column - first) * column_pitch + r * row_pitch];
        value = rounded_by(value, by);
      }
    }
  }
};

// Where the outliers of a row of weights begin and end; what is out of range makes `*total` NaN.
__device__ void outliers_of(const Weights& weights, int row, int* begin, int* end, float* total) {
  *begin = *end = 0;
  if (weights.outlier_rows == nullptr) return;
  const int first = weights.outlier_rows[row], last = weights.outlier_rows[row + 1];
  if (first < 0 || last < first || last > weights.outliers) {
    *total = not_a_number();
    return;
  }
  *begin = first, *end = last;
}

template <typename V>
__device__ float outlier(const Weights& weights, const Operand<V>& x, int64_t row, int index) {
  const int column = weights.outlier_columns[index];
  if (column < 0 || column >= weights.columns) return not_a_number();
  return weights.outlier_values[index] * x.at(row, column);
}

template <typename V>
__device__ V finished(const Weights& weights, float total, int row) {
  return rounded<V>(weights.bias == nullptr ? total : total + number(static_cast<const V*>(weights.bias)[row]));
}

// kFew rows of x a block in y's direction; a warp for each row of weights.
template <typename V>
__global__ void __launch_bounds__(kThreads) multiply_few(Operand<V> x, Weights weights, V* y, int64_t m) {
  __shared__ float of_x[kFew][kChunk];
  const int lane = threadIdx.x % kWarp, n = int(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t top = int64_t(blockIdx.y) * kFew;
  const int height = int(min(int64_t(kFew), m - top));
  float totals[kFew] = {};
  for (int first = 0; first < weights.columns; first += kChunk) {
    __syncthreads();
    x.load(top, height, m, first, kChunk, &of_x[0][0], kChunk, 1);
    __syncthreads();
    if (n >= weights.rows) continue;
    const int here = int(min(int64_t(kChunk), weights.columns - first));
    for (int column = lane * kEight; column < here; column += kWarp * kEight) {
      float numbers[kEight];
      look_up(weights, n, first + column, numbers);
#pragma unroll
      for (int r = 0; r < kFew; ++r) {
        if (r >= height) break;
#pragma unroll
        for (int i = 0; i < kEight; ++i) totals[r] = fmaf(numbers[i], of_x[r][column + i], totals[r]);
      }
    }
  }
  if (n >= weights.rows) return;
#pragma unroll
  for (int r = 0; r < kFew; ++r) {
    if (r >= height) break;
    float total = totals[r];
    int begin, end;
    outliers_of(weights, n, &begin, &end, &total);
    for (int i = begin + lane; i < end; i += kWarp) total += outlier(weights, x, top + r, i);
    for (int away = kWarp / 2; away > 0; away /= 2) total += __shfl_xor_sync(0xffffffff, total, away);
    if (lane == 0) y[(top + r) * weights.rows + n] = finished<V>(weights, total, n);
  }
}

// Blocks take tiles of kTile rows of weights, and of x every gridDim.y-th tile.
template <typename V>
__global__ void __launch_bounds__(kThreads) multiply_tiles(Operand<V> x, Weights weights, V* y, int64_t m) {
  __shared__ float of_x[kDepth * kPitch], of_w[kDepth * kPitch];
  const int left = int(blockIdx.x) * kTile;
  const int across = threadIdx.x % 16 * kPart, down = threadIdx.x / 16 * kPart;
  // What this thread writes of the tile of weights.
  const int own_row = threadIdx.x / (kDepth / kEight), own_column = threadIdx.x % (kDepth / kEight) * kEight;
  for (int64_t top = int64_t(blockIdx.y) * kTile; top < m; top += int64_t(gridDim.y) * kTile) {
    float totals[kPart][kPart] = {};
    for (int first = 0; first < weights.columns; first += kDepth) {
      __syncthreads();
      x.load(top, kTile, m, first, kDepth, of_x, 1, kPitch);
      float numbers[kEight] = {};
      if (left + own_row < weights.rows) look_up(weights, left + own_row, first + own_column, numbers);
#pragma unroll
      for (int i = 0; i < kEight; ++i) of_w[(own_column + i) * kPitch + own_row] = numbers[i];
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        const float4 a = *reinterpret_cast<const float4*>(of_x + k * kPitch + down);
        const float4 b = *reinterpret_cast<const float4*>(of_w + k * kPitch + across);
        const float rows[kPart] = {a.x, a.y, a.z, a.w}, columns[kPart] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
#pragma unroll
          for (int j = 0; j < kPart; ++j) totals[i][j] = fmaf(rows[i], columns[j], totals[i][j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kPart; ++j) {
      const int n = left + across + j;
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        const int64_t row = top + down + i;
        if (n >= weights.rows || row >= m) continue;
        float total = totals[i][j];
        int begin, end;
        outliers_of(weights, n, &begin, &end, &total);
        for (int index = begin; index < end; ++index) total += outlier(weights, x, row, index);
        y[row * weights.rows + n] = finished<V>(weights, total, n);
      }
    }
  }
}

// Whether all sizes are such that the kernels' arithmetic holds them.
bool sensible(const GraphoptCodebookWeights& weights, int64_t m, int64_t activation_block) {
  constexpr int64_t kMost = int64_t(1) << 30;
  return m >= 0 && m < kMost && activation_block >= 0 && weights.rows >= 0 && weights.rows < kMost &&
         weights.columns >= 0 && weights.columns < kMost / 2 && weights.bits >= 1 && weights.bits <= 16 &&
         weights.tile_rows > 0 && weights.tile_columns > 0 && weights.group_size > 0 &&
         weights.group_size % weights.tile_columns == 0 && weights.books > 0 && weights.outliers >= 0 &&
         weights.outliers < INT32_MAX;
}

template <typename V>
int launch(const void* x, const GraphoptCodebookWeights* given, void* y, int64_t m, int64_t activation_block,
           void* stream) {
  if (given == nullptr || !sensible(*given, m, activation_block)) return cudaErrorInvalidValue;
  if (m == 0 || given->rows == 0) return cudaSuccess;
  Weights weights;
  static_cast<GraphoptCodebookWeights&>(weights) = *given;
  const int64_t tiles = (given->columns + given->tile_columns - 1) / given->tile_columns;
  weights.groups = int((given->columns + given->group_size - 1) / given->group_size);
  weights.index_row_bytes = int((tiles * given->bits + 7) / 8);
  weights.mask = (1 << given->bits) - 1;
  weights.narrow = given->bits <= 4 && given->tile_rows == 1 && given->tile_columns == 1 &&
                   (weights.groups <= 1 || given->group_size % kEight == 0);
  const int columns = int(given->columns);
  const int block = activation_block < columns ? int(activation_block) : columns;
  const Operand<V> operand{static_cast<const V*>(x), columns, activation_block == 0 ? 0 : block};
  const auto on = static_cast<cudaStream_t>(stream);
  if (m <= 4 * kFew) {
    constexpr int kRows = kThreads / kWarp;
    const dim3 grid(unsigned((given->rows + kRows - 1) / kRows), unsigned((m + kFew - 1) / kFew));
    multiply_few<V><<<grid, kThreads, 0, on>>>(operand, weights, static_cast<V*>(y), m);
  } else {
    const int64_t high = (m + kTile - 1) / kTile;
    const dim3 grid(unsigned((given->rows + kTile - 1) / kTile), unsigned(high < 65535 ? high : 65535));
    multiply_tiles<V><<<grid, kThreads, 0, on>>>(operand, weights, static_cast<V*>(y), m);
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace graphopt::codebook_matmul

int graphopt_cuda_codebook_matmul_float(const void* x, const GraphoptCodebookWeights* weights, void* y, int64_t m,
                                        int64_t activation_block, void* stream) {
  return graphopt::codebook_matmul::launch<float>(x, weights, y, m, activation_block, stream);
}

int graphopt_cuda_codebook_matmul_half(const void* x, const GraphoptCodebookWeights* weights, void* y, int64_t m,
                                       int64_t activation_block, void* stream) {
  return graphopt::codebook_matmul::launch<__half>(x, weights, y, m, activation_block, stream);
}
