// The CUDA launcher of QuantizedKVAttention.
#pragma once

#include "launcher.h"

// All that one run needs. Pointers are of the device but `totals`; shapes are those of the operator's description.
struct GraphoptQuantizedKVAttention {
  const void* query;   // [batch, fresh, heads * depth] of float, or of half precision where `half` isn't 0
  const void* key;     // [batch, fresh, kv_heads * depth]
  const void* value;
  const uint8_t* past_codes;  // [batch, past_blocks, ...]; may be the present's, and then past_blocks is `blocks`
  const void* past_scales;
  const void* past_recent;
  const float* cos;  // [at least the largest total, turned]; rows behind them aren't read
  const float* sin;
  void* output;  // as query
  uint8_t* codes;  // [batch, blocks, ...]
  void* scales;
  void* recent;
  const int32_t* totals;  // [batch], on the host: tokens of each row with the new ones
  void* scratch;          // of graphopt_cuda_quantized_kv_attention_scratch_bytes
  int64_t batch, fresh, past_blocks, blocks;
  int64_t heads, kv_heads, depth;
  int64_t width, window, group;  // tokens of a block, tokens that aren't quantized, features with a scale per token
  int64_t key_bits, value_bits;
  int64_t turned;  // columns of the tables; 0: nothing is rotated
  int64_t local;   // tokens that a query sees at most; negative: all
  int32_t per_channel, interleaved, at_read, half;
  float scale, softcap;
};

// Bytes of working memory; negative where sizes are too large for a grid.
GRAPHOPT_LAUNCHER int64_t graphopt_cuda_quantized_kv_attention_scratch_bytes(const GraphoptQuantizedKVAttention* run);

// Puts the new tokens into the cache and attends. Sizes aren't checked: see given.cc for what they must be.
// cudaErrorInvalidValue: a block of keys of one head and 16 queries don't fit into shared memory.
GRAPHOPT_LAUNCHER int graphopt_cuda_quantized_kv_attention(const GraphoptQuantizedKVAttention* run, void* stream);
