// Products of block-quantized weights with rows of activations that are quantized in the same blocks.
//
// Weights lie as in ONNX Runtime's MatMulNBits: a row after the other, its numbers of 2, 4 or 8 bits from the lowest bits
// of a byte up. A product takes a chunk of 64 bytes of a row at a time. Activations are kept in the order in which the
// numbers of a chunk come out when its bytes are shifted and masked, with all that a chunk needs beside each other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace graphopt::quantized_linear {

constexpr int kChunk = 64;  // bytes of weights
constexpr int kWords = 16;  // 32-bit words of a chunk; no block is shorter than one

// A weight: the value of number q in block b is scale[b] * (q - zero[b]) + minimum[b].
struct Matrix {
  const uint8_t* packed = nullptr;       // [rows, length * bits / 8]
  const void* scales = nullptr;          // [rows, blocks]
  const uint8_t* zero_points = nullptr;  // [rows, (blocks * bits + 7) / 8], packed like the numbers; null: middle()
  const void* minimums = nullptr;        // [rows, blocks]; null: zero
  bool half = false;                     // scales and minimums are half-precision numbers
  int bits = 0;
  int64_t block = 0;   // numbers of a block, a power of two
  int64_t rows = 0;
  int64_t length = 0;  // numbers of a row, a multiple of `block`

  // The zero point where none is given: the middle of the numbers, or zero where minimums say where they begin.
  int32_t middle() const { return minimums != nullptr ? 0 : 1 << (bits - 1); }
  int64_t blocks() const { return length / block; }
  int64_t row_bytes() const { return length * bits / 8; }
  int64_t chunks() const { return (row_bytes() + kChunk - 1) / kChunk; }
};

// How rows of activations of one length are kept for a matrix: `row` bytes each, chunk after chunk
//   int8_t values[terms][8 / bits][64]   high bytes and, with two terms, low bytes
//   int32_t offsets[terms][16]           minus the zero point times the sum of a block's values, in its first word
//   float scales[16]                     of the activations, for each word
// and behind the chunks, for each block, the sum of its dequantized activations.
struct Layout {
  int bits, terms;
  int32_t middle;
  int64_t block, length, chunks, chunk_bytes, row;

  Layout(const Matrix& matrix, int terms)
      : bits(matrix.bits),
        terms(terms),
        middle(matrix.middle()),
        block(matrix.block),
        length(matrix.length),
        chunks(matrix.chunks()),
        chunk_bytes(int64_t(terms) * (8 / matrix.bits + 1) * kChunk + kChunk),
        row((chunks * chunk_bytes + matrix.blocks() * 4 + kChunk - 1) / kChunk * kChunk) {}
};

struct Kernels {
  // x / sqrt(mean(x^2) + epsilon) * weight.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t length, float* y);
  // Quantizes numbers [first, last) of a row, which begin and end with a block. Whoever writes a row's last block fills
  // its last chunk up with zeros.
  void (*quantize)(const Layout& layout, const float* x, int64_t first, int64_t last, uint8_t* row);
  // y[m * stride + n - first] = the product of weight row n with activation row m, for `count` activation rows and
  // weight rows [first, last).
  void (*multiply)(const Matrix& matrix, const Layout& layout, const uint8_t* rows, int64_t count, int64_t first,
                   int64_t last, float* y, int64_t stride);
  // gate[i] = activation(gate[i]) * up[i]; the activation by number: 0 silu, 1 gelu, 2 gelu with tanh, 3 relu.
  void (*gate)(int activation, float* gate, const float* up, int64_t count);
};

GRAPHOPT_ISA_VARIANTS(Kernels)

}  // namespace graphopt::quantized_linear
