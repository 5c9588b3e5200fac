// The CUDA launcher of QuantizedKVAttention. Pointers are of the device, but that of `totals`.
#pragma once

#include "launcher.h"

// Puts the new tokens into the cache and attends, with sizes that aren't checked: see given.cc for what they must be.
//
//   query [batch, fresh, heads * depth], key and value [batch, fresh, kv_heads * depth] and output, as query: of float, or
//     of half precision where `half` isn't 0
//   past_codes, past_scales, past_recent: as the operator's description has them, of past_blocks blocks; codes, scales and
//     recent: the present, of `blocks` blocks, at the same place or at another
//   totals [batch], on the host: tokens of each row with the new ones, seqlens_k + 1
//   cos, sin [as many rows as the largest total, turned]; turned = 0: nothing is rotated
//   scratch: as many bytes as the function below says
//   width, window, group: tokens of a block, tokens that aren't quantized, features with one scale per token
//   local: tokens that a query sees at most; negative: all
//   shared: not 0: the past holds the new tokens already, and is the present too; nothing is written to it
//
// cudaErrorInvalidValue: a block of keys of one head and 16 queries don't fit into shared memory.
GRAPHOPT_LAUNCHER int graphopt_cuda_quantized_kv_attention(
    const void* query, const void* key, const void* value, const uint8_t* past_codes, const void* past_scales,
    const void* past_recent, const int32_t* totals, const float* cos, const float* sin, void* output, uint8_t* codes,
    void* scales, void* recent, void* scratch, int64_t batch, int64_t fresh, int64_t past_blocks, int64_t blocks,
    int64_t heads, int64_t kv_heads, int64_t depth, int64_t width, int64_t window, int64_t group, int64_t key_bits,
    int64_t value_bits, int64_t turned, int64_t local, int32_t per_channel, int32_t interleaved, int32_t at_read,
    int32_t half, int32_t shared, float scale, float softcap, void* stream);

// Bytes of working memory; negative where sizes are too large for a grid.
GRAPHOPT_LAUNCHER int64_t graphopt_cuda_quantized_kv_attention_scratch_bytes(const int32_t* totals, int64_t batch,
                                                                             int64_t fresh, int64_t heads,
                                                                             int64_t kv_heads, int64_t depth,
                                                                             int64_t width, int64_t window);
