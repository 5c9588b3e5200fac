// The steps of QuantizedLinear and QuantizedMlp on the device, for the launchers of both.
#pragma once

#include "product.cuh"

namespace graphopt::quantized_linear {

// What a launcher is told of how numbers are made.
struct DeviceFormat {
  int bits;
  int block;
  int activation_bits;
  bool half_scales;

  bool valid() const {
    return (bits == 2 || bits == 4 || bits == 8) && block >= 16 && block <= 256 && (block & (block - 1)) == 0 &&
           (activation_bits == 8 || activation_bits == 16);
  }
  // Whether `tokens` rows of `length` numbers can be: a multiple of the block, and sizes in bytes that fit an integer.
  bool fits(int64_t tokens, int64_t length) const {
    constexpr int64_t kMost = int64_t(1) << 46;
    if (tokens < 0 || length < 0 || length % block != 0 || tokens > kMost || length > kMost) return false;
    return length == 0 || tokens <= kMost / length;
  }
};

// Bytes that the rounded activations of so many tokens take, a multiple of 256.
int64_t activation_bytes(const DeviceFormat& format, int64_t tokens, int64_t length);

// Where they lie in memory of so many bytes.
Activations activations_at(void* memory, const DeviceFormat& format, int64_t tokens, int64_t length);

// A weight of rows · length numbers; false: its numbers don't begin at a multiple of 4 bytes.
bool weight_at(const void* packed, const void* scales, const void* zero_points, const void* minimums,
               const DeviceFormat& format, int64_t rows, int64_t length, Weight* weight);

// Rounds x [tokens, length], times the gains over its root mean square where there are gains.
cudaError_t round_tokens(const void* x, bool half, const float* norm, float epsilon, const Activations& to,
                         cudaStream_t stream);

cudaError_t multiply(const Weight& weight, const Activations& x, const Output& out, cudaStream_t stream);

}  // namespace graphopt::quantized_linear
