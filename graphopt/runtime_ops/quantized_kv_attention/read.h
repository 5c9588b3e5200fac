// Reads quantized blocks.
#pragma once

#include <vector>

#include "layout.h"

namespace graphopt::quantized_kv_attention {

// Keys [depth, width], turned where they are stored without, and values [width, depth] of one block and KV head.
class FloatReader {
 public:
  void prepare(const Work& work);
  const float* keys(int64_t row, int64_t block, int64_t kv, const float* cos, const float* sin);
  const float* values(int64_t row, int64_t block, int64_t kv);

 private:
  const Work* work_;
  std::vector<uint8_t> codes_;
  std::vector<float> scales_, keys_, values_;
};

// Scores and weighted sums of values for one query a head, by integers.
class BlockReader {
 public:
  // `queries` is [H, depth].
  void prepare(const Work& work, const float* queries);
  // Before the heads of a block are read.
  void turn_to(int64_t block);
  // The scores [queries of a KV head, width].
  float* scores(int64_t row, int64_t block, int64_t kv);
  // Adds the values of the block last scored, weighted by what its scores have become: out[query * stride + feature].
  void add_values(float* out, int64_t stride);

 private:
  void quantize_queries();
  int64_t chunks() const;
  float* side_by_side(int64_t kv, int64_t first);

  const Work* work_;
  const float* queries_;
  const uint8_t* packed_;
  const float* cos_at_;  // [half, width], of the block
  const float* sin_at_;
  std::vector<uint8_t> codes_, words_, query_words_;
  std::vector<float> scales_, scores_, keys_, cos_, sin_, side_by_side_;
  std::vector<float> query_steps_, query_offsets_, query_totals_;  // [H, groups], of keys with scales per token
};

}  // namespace graphopt::quantized_kv_attention
