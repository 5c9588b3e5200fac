// CUDA kernels of QuantizedMlp: those of QuantizedLinear for both products, and one between them. The hidden numbers
// are rounded by a kernel of their own: blocks of 16 to 256 of them would be too few thread blocks for a product.
#include "../quantized_linear/device.h"
#include "launchers.h"

namespace graphopt::quantized_mlp {
namespace {

using namespace graphopt::quantized_linear;

constexpr int kThreads = 128;

// As in the portable body.
__device__ float activated(int activation, float x) {
  switch (activation) {
    case 0: return x / (1.0f + expf(-x));
    case 1: return x * 0.5f * (erff(x * 0.70710678f) + 1.0f);
    case 2: return x * 0.5f * (tanhf((x + x * x * x * 0.044715f) * 0.79788456f) + 1.0f);
    default: return x < 0.0f ? 0.0f : x;
  }
}

// Rounds activation(gate) · up; `products` [tokens, 2 · to.length] holds a token's gates and, behind them, its ups.
__global__ void __launch_bounds__(kThreads) round_hidden(const float* products, int activation, Activations to) {
  const int64_t blocks = to.blocks_of_token(), warps = int64_t(gridDim.x) * (kThreads / 32);
  const int64_t first = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  for (int64_t item = first; item < to.tokens * blocks; item += warps) {
    const int64_t token = item / blocks, block = item % blocks;
    const float* gates = products + token * 2 * to.length + block * to.block();
    const float* ups = gates + to.length;
    round_block(to, token, block, [=](int i) { return activated(activation, gates[i]) * ups[i]; });
  }
}

// Tokens that go through all kernels before the next ones do: their hidden numbers in float32 bound the working memory.
constexpr int64_t kSlice = 1024;

int64_t slice_of(int64_t tokens) { return tokens < kSlice ? tokens : kSlice; }

struct Mlp {
  DeviceFormat format;
  Weight gate_up, down;
  const float* norm;
  float epsilon;
  int activation;
  bool half;

  cudaError_t run(const void* x, void* y, void* scratch, int64_t tokens, cudaStream_t stream) const {
    const int64_t width = down.rows, hidden = gate_up.rows / 2;
    const Activations outer = activations_at(scratch, format, tokens, width);
    char* rest = static_cast<char*>(scratch) + activation_bytes(format, tokens, width);
    const Activations inner = activations_at(rest, format, tokens, hidden);
    float* products = reinterpret_cast<float*>(rest + activation_bytes(format, tokens, hidden));
    if (hidden > 0) {
      if (const cudaError_t refused = round_tokens(x, half, norm, epsilon, outer, stream)) return refused;
      const Output to_products{products, nullptr, nullptr, gate_up.rows, false};
      if (const cudaError_t refused = multiply(gate_up, outer, to_products, stream)) return refused;
      constexpr int64_t kWarpsTogether = kThreads / 32;
      const int64_t warps = tokens * inner.blocks_of_token();
      const unsigned grid = blocks_for((warps + kWarpsTogether - 1) / kWarpsTogether);
      round_hidden<<<grid, kThreads, 0, stream>>>(products, activation, inner);
      if (const cudaError_t refused = cudaGetLastError()) return refused;
    }
    return multiply(down, inner, Output{y, nullptr, x, width, half}, stream);
  }
};

}  // namespace
}  // namespace graphopt::quantized_mlp

int64_t graphopt_cuda_quantized_mlp_scratch_bytes(int64_t tokens, int64_t width, int64_t hidden, int block_size,
                                                  int activation_bits) {
  using namespace graphopt::quantized_linear;
  const DeviceFormat format{8, block_size, activation_bits, false};
  if (!format.valid() || !format.fits(tokens, width) || !format.fits(tokens, hidden)) return -1;
  const int64_t together = graphopt::quantized_mlp::slice_of(tokens);
  return activation_bytes(format, together, width) + activation_bytes(format, together, hidden) +
         together * 2 * hidden * int64_t(sizeof(float));
}

int graphopt_cuda_quantized_mlp(const void* x, const float* norm, const void* gate_up, const void* gate_up_scales,
                                const void* gate_up_zero_points, const void* gate_up_minimums, const void* down,
                                const void* down_scales, const void* down_zero_points, const void* down_minimums,
                                void* y, void* scratch, int64_t tokens, int64_t width, int64_t hidden, int bits,
                                int block_size, int activation_bits, int activation, int half, int half_scales,
                                float epsilon, void* stream) {
  using namespace graphopt::quantized_mlp;
  const DeviceFormat format{bits, block_size, activation_bits, half_scales != 0};
  if (!format.valid() || !format.fits(tokens, width) || !format.fits(tokens, hidden)) return cudaErrorInvalidValue;
  if (activation < 0 || activation > 3) return cudaErrorInvalidValue;
  if (tokens == 0 || width == 0) return cudaSuccess;
  Mlp mlp{format, {}, {}, norm, epsilon, activation, half != 0};
  const bool aligned = weight_at(gate_up, gate_up_scales, gate_up_zero_points, gate_up_minimums, format, 2 * hidden, width,
                                 &mlp.gate_up) &&
                       weight_at(down, down_scales, down_zero_points, down_minimums, format, width, hidden, &mlp.down);
  if (!aligned) return cudaErrorInvalidValue;
  const int64_t bytes_of_token = width * (half != 0 ? 2 : 4);
  for (int64_t begin = 0; begin < tokens; begin += kSlice) {
    const void* from = static_cast<const char*>(x) + begin * bytes_of_token;
    void* to = static_cast<char*>(y) + begin * bytes_of_token;
    const cudaStream_t in = static_cast<cudaStream_t>(stream);
    if (const cudaError_t refused = mlp.run(from, to, scratch, slice_of(tokens - begin), in)) return refused;
  }
  return cudaSuccess;
}
