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

// blockIdx.x: rows; blockIdx.y: kTokens tokens. A row has 2^lanes_log2 lanes, at most 32.
template <int kBits, int kTerms, int kTokens>
__global__ void multiply_few(Weight weight, Activations x, Output out, int lanes_log2) {
  constexpr int kParts = 8 / kBits;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t n = thread >> lanes_log2, token = int64_t(blockIdx.y) * kTokens;
  const int lanes = 1 << lanes_log2, lane = int(threadIdx.x) & (lanes - 1);
  const int in_block = 1 << weight.words_of_block_log2, together = in_block < kWordsAtOnce ? in_block : kWordsAtOnce;
  float totals[kTokens] = {};
  if (n < weight.rows) {
#pragma unroll 2
    for (int64_t first = int64_t(lane) * kWordsAtOnce; first < weight.words; first += int64_t(lanes) * kWordsAtOnce) {
      uint32_t words[kWordsAtOnce];
      load_words(weight, n, first, words);
      int sums[kTokens][kTerms] = {};
#pragma unroll
      for (int i = 0; i < kWordsAtOnce; ++i) {
#pragma unroll
        for (int m = 0; m < kTokens; ++m) {
          // Tokens that there aren't repeat the last one.
          const int64_t t = token + m < x.tokens ? token + m : x.tokens - 1;
#pragma unroll
          for (int term = 0; term < kTerms; ++term) {
            const int8_t* bytes = x.bytes + term * x.term_bytes() + t * x.row + (first + i) * (4 * kParts);
            uint32_t numbers[kParts];
            if (kParts == 4) {
              const uint4 read = *reinterpret_cast<const uint4*>(bytes);
              numbers[0] = read.x, numbers[1 % kParts] = read.y, numbers[2 % kParts] = read.z, numbers[3 % kParts] = read.w;
            } else if (kParts == 2) {
              const uint2 read = *reinterpret_cast<const uint2*>(bytes);
              numbers[0] = read.x, numbers[1 % kParts] = read.y;
            } else {
              numbers[0] = *reinterpret_cast<const uint32_t*>(bytes);
            }
#pragma unroll
            for (int p = 0; p < kParts; ++p) {
              sums[m][term] = dot4(part_of<kBits>(words[i], p), numbers[p], sums[m][term]);
            }
          }
        }
        // Words of one block lie together, or are all of the row's end.
        if (((i + 1) & (together - 1)) == 0 && first + i < weight.words) {
          const int64_t block = (first + i) >> weight.words_of_block_log2;
          // Whoever has a block's first word adds what comes once a block.
          const bool begins = ((first + i + 1 - together) & (in_block - 1)) == 0;
          const float scale = scalar(weight.scales, weight.half, n * weight.blocks + block);
          const int zero = begins ? zero_point<kBits>(weight, n, block) : 0;
          const float minimum =
              begins && weight.minimums != nullptr ? scalar(weight.minimums, weight.half, n * weight.blocks + block) : 0.0f;
#pragma unroll
          for (int m = 0; m < kTokens; ++m) {
            const int64_t t = token + m < x.tokens ? token + m : x.tokens - 1;
            const Block of_x = x.blocks[t * weight.blocks + block];
            totals[m] += whole<kTerms>(sums[m], zero, of_x.sum) * (scale * of_x.scale);
            if (begins && weight.minimums != nullptr) totals[m] += minimum * (of_x.scale * float(of_x.sum));
#pragma unroll
            for (int term = 0; term < kTerms; ++term) sums[m][term] = 0;
          }
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
