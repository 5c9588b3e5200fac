// CUDA kernels of QuantizedLinear: one rounds the activations, once for all rows of the weight, and one multiplies.
#include "device.h"
#include "few_tokens.cuh"
#include "launchers.h"
#include "many_tokens.cuh"

namespace graphopt::quantized_linear {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kFew = 8;          // tokens up to which the weight's rows are read by lanes of their own
constexpr int64_t kSome = 32;        // tokens up to which the tile of tensor cores is small
constexpr int64_t kThreadBlocks = 256;  // that rounding is spread over, some more than multiprocessors

// The sum of all threads' values; every thread of the thread block calls it and gets it.
__device__ float sum_of_all(float value) {
  __shared__ float of_warps[kThreads / 32];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  __syncthreads();  // others may still read what an earlier call left there
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < kThreads / 32; ++i) total += of_warps[i];
  return total;
}

// `parts` thread blocks round a token: each finds the token's mean square and rounds its own share.
__global__ void __launch_bounds__(kThreads)
    round_tokens_kernel(const void* x, bool half, const float* norm, float epsilon, Activations to, int parts) {
  const int warp = int(threadIdx.x) / 32;
  const int64_t blocks = to.blocks_of_token();
  for (int64_t item = blockIdx.x; item < to.tokens * parts; item += gridDim.x) {
    const int64_t token = item / parts, begin = token * to.length;
    float root = 1;
    if (norm != nullptr) {
      float squares = 0;
      for (int64_t i = threadIdx.x; i < to.length; i += kThreads) {
        const float value = scalar(x, half, begin + i);
        squares += value * value;
      }
      root = __fsqrt_rn(__fdiv_rn(sum_of_all(squares), float(to.length)) + epsilon);
    }
    for (int64_t block = item % parts * (kThreads / 32) + warp; block < blocks; block += parts * (kThreads / 32)) {
      round_block(to, token, block, [=](int i) {
        const int64_t at = block * to.block() + i;
        const float value = scalar(x, half, begin + at);
        return norm != nullptr ? __fmul_rn(__fdiv_rn(value, root), norm[at]) : value;
      });
    }
  }
}

template <int kBits, int kTerms, int kTokens>
void launch_few(const Weight& weight, const Activations& x, const Output& out, cudaStream_t stream) {
  // As many lanes as find something to do in a row.
  constexpr int kRowThreads = 128;
  int lanes_log2 = 0;
  while (lanes_log2 < 5 && int64_t(kWordsAtOnce) << lanes_log2 < weight.words) ++lanes_log2;
  const dim3 grid(unsigned(((weight.rows << lanes_log2) + kRowThreads - 1) / kRowThreads),
                  unsigned((x.tokens + kTokens - 1) / kTokens));
  multiply_few<kBits, kTerms, kTokens><<<grid, kRowThreads, 0, stream>>>(weight, x, out, lanes_log2);
}

template <int kBits, int kTerms, int kTokenTiles, int kRowTiles, int kStep>
void launch_many(const Weight& weight, const Activations& x, const Output& out, cudaStream_t stream) {
  constexpr int64_t kTokens = 16 * kTokenTiles, kRows = 8 * kRowTiles * kWarps, kMostAcross = 65535;
  const int64_t across = (x.tokens + kTokens - 1) / kTokens;
  const dim3 grid(unsigned((weight.rows + kRows - 1) / kRows), unsigned(across < kMostAcross ? across : kMostAcross));
  multiply_many<kBits, kTerms, kTokenTiles, kRowTiles, kStep><<<grid, 32 * kWarps, 0, stream>>>(weight, x, out);
}

template <int kBits, int kTerms>
void launch(const Weight& weight, const Activations& x, const Output& out, cudaStream_t stream) {
  if (x.tokens == 1) {
    launch_few<kBits, kTerms, 1>(weight, x, out, stream);
  } else if (x.tokens <= kFew) {
    launch_few<kBits, kTerms, 4>(weight, x, out, stream);
  } else if (x.tokens <= kSome) {
    launch_many<kBits, kTerms, 1, 1, 256>(weight, x, out, stream);
  } else {
    launch_many<kBits, kTerms, 4, 2, 128>(weight, x, out, stream);
  }
}

template <int kBits>
void launch(const Weight& weight, const Activations& x, const Output& out, cudaStream_t stream) {
  if (x.terms == 2) {
    launch<kBits, 2>(weight, x, out, stream);
  } else {
    launch<kBits, 1>(weight, x, out, stream);
  }
}

int64_t row_of(int64_t length) { return (length + kRowMultiple - 1) / kRowMultiple * kRowMultiple; }

// Bytes of the blocks' scales and sums, so that what lies behind them begins at a multiple of 256.
int64_t block_bytes(const DeviceFormat& format, int64_t tokens, int64_t length) {
  return (tokens * (length / format.block) * int64_t(sizeof(Block)) + 255) / 256 * 256;
}

}  // namespace

int64_t activation_bytes(const DeviceFormat& format, int64_t tokens, int64_t length) {
  const int64_t bytes = tokens * row_of(length) * (format.activation_bits / 8);
  return block_bytes(format, tokens, length) + (bytes + 255) / 256 * 256;
}

Activations activations_at(void* memory, const DeviceFormat& format, int64_t tokens, int64_t length) {
  Activations made;
  made.blocks = static_cast<Block*>(memory);
  made.bytes = static_cast<int8_t*>(memory) + block_bytes(format, tokens, length);
  made.tokens = tokens;
  made.row = row_of(length);
  made.length = length;
  made.block_log2 = 0;
  while (1 << made.block_log2 < format.block) ++made.block_log2;
  made.bits = format.bits;
  made.terms = format.activation_bits / 8;
  return made;
}

bool weight_at(const void* packed, const void* scales, const void* zero_points, const void* minimums,
               const DeviceFormat& format, int64_t rows, int64_t length, Weight* weight) {
  weight->packed = static_cast<const uint32_t*>(packed);
  weight->scales = scales;
  weight->zero_points = static_cast<const uint8_t*>(zero_points);
  weight->minimums = minimums;
  weight->rows = rows;
  weight->blocks = length / format.block;
  weight->words = length * format.bits / 32;
  weight->zero_bytes = (weight->blocks * format.bits + 7) / 8;
  weight->zero = (minimums != nullptr ? 0 : 1 << (format.bits - 1)) - (format.bits == 8 ? 128 : 0);
  weight->words_of_block_log2 = 0;
  while (32 << weight->words_of_block_log2 < format.block * format.bits) ++weight->words_of_block_log2;
  weight->half = format.half_scales;
  weight->aligned = reinterpret_cast<uintptr_t>(packed) % 16 == 0 && weight->words % kWordsAtOnce == 0;
  return reinterpret_cast<uintptr_t>(packed) % 4 == 0;
}

cudaError_t round_tokens(const void* x, bool half, const float* norm, float epsilon, const Activations& to,
                         cudaStream_t stream) {
  const int64_t warps = kThreads / 32, most = (to.blocks_of_token() + warps - 1) / warps;
  int64_t parts = to.tokens < kThreadBlocks ? kThreadBlocks / to.tokens : 1;
  if (parts > most) parts = most;
  round_tokens_kernel<<<blocks_for(to.tokens * parts), kThreads, 0, stream>>>(x, half, norm, epsilon, to, int(parts));
  return cudaGetLastError();
}

cudaError_t multiply(const Weight& weight, const Activations& x, const Output& out, cudaStream_t stream) {
  if (weight.rows > INT32_MAX / 4) return cudaErrorInvalidValue;  // beyond a grid's width
  switch (x.bits) {
    case 2: launch<2>(weight, x, out, stream); break;
    case 4: launch<4>(weight, x, out, stream); break;
    default: launch<8>(weight, x, out, stream); break;
  }
  return cudaGetLastError();
}

}  // namespace graphopt::quantized_linear

int64_t graphopt_cuda_quantized_linear_scratch_bytes(int64_t tokens, int64_t length, int block_size,
                                                     int activation_bits) {
  const graphopt::quantized_linear::DeviceFormat format{8, block_size, activation_bits, false};
  if (!format.valid() || !format.fits(tokens, length)) return -1;
  return activation_bytes(format, tokens, length);
}

int graphopt_cuda_quantized_linear(const void* x, const float* norm, const void* weight, const void* scales,
                                   const void* zero_points, const void* minimums, const float* bias,
                                   const void* residual, void* y, void* scratch, int64_t tokens, int64_t rows,
                                   int64_t length, int bits, int block_size, int activation_bits, int half,
                                   int half_scales, float epsilon, void* stream) {
  using namespace graphopt::quantized_linear;
  const DeviceFormat format{bits, block_size, activation_bits, half_scales != 0};
  if (!format.valid() || !format.fits(tokens, length) || rows < 0) return cudaErrorInvalidValue;
  if (tokens == 0 || rows == 0) return cudaSuccess;
  Weight matrix;
  if (!weight_at(weight, scales, zero_points, minimums, format, rows, length, &matrix)) return cudaErrorInvalidValue;
  const cudaStream_t in = static_cast<cudaStream_t>(stream);
  const Activations rounded = activations_at(scratch, format, tokens, length);
  if (length > 0) {
    if (const cudaError_t refused = round_tokens(x, half != 0, norm, epsilon, rounded, in)) return refused;
  }
  return multiply(matrix, rounded, Output{y, bias, residual, rows, half != 0}, in);
}
