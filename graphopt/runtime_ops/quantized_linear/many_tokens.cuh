// The product for many tokens, on tensor cores: a thread block computes a tile of tokens and rows of the weight, a step
// of their length after the other in shared memory.
#pragma once

#include "integer_products.cuh"
#include "product.cuh"

namespace graphopt::quantized_linear {

constexpr int kWarps = 4;          // of a thread block, beside each other along the rows of the weight
constexpr int kDepth = 16;         // numbers that tensor cores take at once
constexpr int kShortestBlock = 16;

// kTokenTiles of 16 tokens times kWarps · kRowTiles of 8 rows; kStep: numbers of a step.
template <int kBits, int kTerms, int kTokenTiles, int kRowTiles, int kStep>
__global__ void __launch_bounds__(32 * kWarps) multiply_many(Weight weight, Activations x, Output out) {
  constexpr int kTokens = 16 * kTokenTiles, kRows = 8 * kRowTiles * kWarps;
  constexpr int kPlanes = 8 / kBits, kWords = kStep / (4 * kPlanes), kQuads = kStep / 16;
  constexpr int kBlocks = kStep / kShortestBlock;
  // Rows in shared memory are so long that what a warp reads at once lies in different banks.
  __shared__ uint32_t values[kTerms][kTokens][kStep / 4 + 4];
  __shared__ uint32_t packed[kRows][kWords + (kBits == 2 ? 1 : 4)];
  __shared__ Block blocks_of_x[kBlocks][kTokens];
  __shared__ float scales[kBlocks][kRows];
  __shared__ float minimums[kBlocks][kRows];
  __shared__ int zeros[kBlocks][kRows];

  const int thread = int(threadIdx.x), warp = thread / 32, group = thread % 32 / 4, member = thread % 4;
  const int64_t row = int64_t(blockIdx.x) * kRows;
  const int blocks_of_step = kStep >> x.block_log2 > 0 ? kStep >> x.block_log2 : 1;
  for (int64_t token = int64_t(blockIdx.y) * kTokens; token < x.tokens; token += int64_t(gridDim.y) * kTokens) {
    float totals[kTokenTiles][kRowTiles][4] = {};
    int sums[kTokenTiles][kRowTiles][4][kTerms] = {};
    for (int64_t begin = 0; begin < x.length; begin += kStep) {
      __syncthreads();  // others may still read the step before
      const int64_t first_word = begin / (4 * kPlanes);
      for (int i = thread; i < kTerms * kTokens * kQuads; i += 32 * kWarps) {
        // Four words of a plane, which come apart in the order of the numbers: slices of a step are whole blocks then.
        const int quad = i % kQuads, m = i / kQuads % kTokens, term = i / kQuads / kTokens;
        const int p = quad % kPlanes, word = quad / kPlanes * 4;
        uint4 read = make_uint4(0, 0, 0, 0);
        if (token + m < x.tokens && first_word + word < weight.words) {
          read = *reinterpret_cast<const uint4*>(x.bytes + term * x.term_bytes() + (token + m) * x.row +
                                                 p * (x.row / kPlanes) + (first_word + word) * 4);
        }
        uint32_t* to = &values[term][m][word * kPlanes + p];
        to[0] = read.x, to[kPlanes] = read.y, to[2 * kPlanes] = read.z, to[3 * kPlanes] = read.w;
      }
      for (int i = thread; i < kRows * kWords; i += 32 * kWarps) {
        const int word = i % kWords, n = i / kWords;
        const bool inside = row + n < weight.rows && first_word + word < weight.words;
        packed[n][word] = inside ? __ldg(weight.packed + (row + n) * weight.words + first_word + word) : 0;
      }
      const int64_t first_block = begin >> x.block_log2;
      for (int i = thread; i < blocks_of_step * kTokens; i += 32 * kWarps) {
        const int m = i % kTokens, block = i / kTokens;
        const bool inside = token + m < x.tokens && first_block + block < weight.blocks;
        blocks_of_x[block][m] = inside ? x.blocks[(token + m) * weight.blocks + first_block + block] : Block{0.0f, 0};
      }
      for (int i = thread; i < blocks_of_step * kRows; i += 32 * kWarps) {
        const int n = i % kRows, block = i / kRows;
        const bool inside = row + n < weight.rows && first_block + block < weight.blocks;
        const int64_t at = (row + n) * weight.blocks + first_block + block;
        scales[block][n] = inside ? scalar(weight.scales, weight.half, at) : 0.0f;
        minimums[block][n] = inside && weight.minimums != nullptr ? scalar(weight.minimums, weight.half, at) : 0.0f;
        zeros[block][n] = inside ? zero_point<kBits>(weight, row + n, first_block + block) : 0;
      }
      __syncthreads();

#pragma unroll 2
      for (int slice = 0; slice < kStep / kDepth; ++slice) {
        // The member's four numbers in the order of the activations' bytes: a part of one word.
        const int quarter = slice * 4 + member;
        uint32_t right[kRowTiles];
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j) {
          right[j] = part_of<kBits>(packed[(warp * kRowTiles + j) * 8 + group][quarter / kPlanes], quarter % kPlanes);
        }
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
          for (int term = 0; term < kTerms; ++term) {
            const uint32_t left[2] = {values[term][i * 16 + group][quarter], values[term][i * 16 + group + 8][quarter]};
#pragma unroll
            for (int j = 0; j < kRowTiles; ++j) {
              int tile[4];
#pragma unroll
              for (int e = 0; e < 4; ++e) tile[e] = sums[i][j][e][term];
              multiply_tile(tile, left, right[j]);
#pragma unroll
              for (int e = 0; e < 4; ++e) sums[i][j][e][term] = tile[e];
            }
          }
        }
        if (((begin + (slice + 1) * kDepth) & (x.block() - 1)) != 0) continue;
        // A block is through.
        const int block = blocks_of_step > 1 ? (slice * kDepth) >> x.block_log2 : 0;
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
          for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const Block of_x = blocks_of_x[block][i * 16 + group + e / 2 * 8];
              const int n = (warp * kRowTiles + j) * 8 + member * 2 + e % 2;
              const float scale = scales[block][n] * of_x.scale;
              totals[i][j][e] += whole<kTerms>(sums[i][j][e], zeros[block][n], of_x.sum) * scale;
              if (weight.minimums != nullptr) totals[i][j][e] += minimums[block][n] * (of_x.scale * float(of_x.sum));
#pragma unroll
              for (int term = 0; term < kTerms; ++term) sums[i][j][e][term] = 0;
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t m = token + i * 16 + group + e / 2 * 8;
          const int64_t n = row + (warp * kRowTiles + j) * 8 + member * 2 + e % 2;
          if (m < x.tokens && n < weight.rows) put(out, m, n, totals[i][j][e]);
        }
      }
    }
  }
}

}  // namespace graphopt::quantized_linear
