// The product for few tokens: some lanes of a warp for each row of the weight, whose bytes are read once, 16 at a time.
#pragma once

#include "integer_products.cuh"
#include "product.cuh"

namespace graphopt::quantized_linear {

constexpr int kWordsAtOnce = 4;

__device__ inline void load_words(const Weight& weight, int64_t n, int64_t first, uint32_t (&words)[kWordsAtOnce]) {
  const uint32_t* from = weight.packed + n * weight.words + first;
  if (weight.aligned) {
    const uint4 read = __ldg(reinterpret_cast<const uint4*>(from));
    words[0] = read.x, words[1] = read.y, words[2] = read.z, words[3] = read.w;
  } else {
#pragma unroll
    for (int i = 0; i < kWordsAtOnce; ++i) words[i] = first + i < weight.words ? __ldg(from + i) : 0;
  }
}

// What the block adds that ends with a word, where one does.
struct BlockOfWeight {
  float scale, minimum;
  int zero;
};

// blockIdx.x: rows; blockIdx.y: kTokens tokens. A row has 2^lanes_log2 lanes, at most 32.
template <int kBits, int kTerms, int kTokens>
__global__ void multiply_few(Weight weight, Activations x, Output out, int lanes_log2) {
  constexpr int kPlanes = 8 / kBits;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t n = thread >> lanes_log2, token = int64_t(blockIdx.y) * kTokens, plane = x.row / kPlanes;
  const int lanes = 1 << lanes_log2, lane = int(threadIdx.x) & (lanes - 1);
  const int in_block = 1 << weight.words_of_block_log2, together = in_block < kWordsAtOnce ? in_block : kWordsAtOnce;
  float totals[kTokens] = {};
  if (n < weight.rows) {
#pragma unroll 2
    for (int64_t first = int64_t(lane) * kWordsAtOnce; first < weight.words; first += int64_t(lanes) * kWordsAtOnce) {
      uint32_t words[kWordsAtOnce];
      load_words(weight, n, first, words);
      BlockOfWeight blocks[kWordsAtOnce];
#pragma unroll
      for (int i = 0; i < kWordsAtOnce; ++i) {
        // Words of one block lie together, or are all of what comes behind the row.
        if (((i + 1) & (together - 1)) != 0 || first + i >= weight.words) continue;
        const int64_t block = (first + i) >> weight.words_of_block_log2, at = n * weight.blocks + block;
        // Whoever has a block's first word adds what comes once a block.
        const bool begins = ((first + i + 1 - together) & (in_block - 1)) == 0;
        blocks[i].scale = scalar(weight.scales, weight.half, at);
        blocks[i].zero = begins ? zero_point<kBits>(weight, n, block) : 0;
        blocks[i].minimum = begins && weight.minimums != nullptr ? scalar(weight.minimums, weight.half, at) : 0.0f;
      }
#pragma unroll
      for (int m = 0; m < kTokens; ++m) {
        // Tokens that there aren't repeat the last one.
        const int64_t t = token + m < x.tokens ? token + m : x.tokens - 1;
        uint4 numbers[kTerms][kPlanes];
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          const int8_t* bytes = x.bytes + term * x.term_bytes() + t * x.row + first * 4;
#pragma unroll
          for (int p = 0; p < kPlanes; ++p) numbers[term][p] = *reinterpret_cast<const uint4*>(bytes + p * plane);
        }
        int sums[kTerms] = {};
#pragma unroll
        for (int i = 0; i < kWordsAtOnce; ++i) {
#pragma unroll
          for (int p = 0; p < kPlanes; ++p) {
            const uint32_t part = part_of<kBits>(words[i], p);
#pragma unroll
            for (int term = 0; term < kTerms; ++term) {
              const uint4& four = numbers[term][p];
              sums[term] = dot4(part, i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w, sums[term]);
            }
          }
          if (((i + 1) & (together - 1)) != 0 || first + i >= weight.words) continue;
          const Block of_x = x.blocks[t * weight.blocks + ((first + i) >> weight.words_of_block_log2)];
          totals[m] += whole<kTerms>(sums, blocks[i].zero, of_x.sum) * (blocks[i].scale * of_x.scale);
          if (weight.minimums != nullptr) totals[m] += blocks[i].minimum * (of_x.scale * float(of_x.sum));
#pragma unroll
          for (int term = 0; term < kTerms; ++term) sums[term] = 0;
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      totals[m] += __shfl_xor_sync(0xffffffffu, totals[m], distance);
    }
    if (lane == 0 && n < weight.rows && token + m < x.tokens) put(out, token + m, n, totals[m]);
  }
}

}  // namespace graphopt::quantized_linear
