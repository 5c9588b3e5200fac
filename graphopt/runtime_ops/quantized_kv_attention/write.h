// What becomes of new keys and values.
#pragma once

#include "layout.h"

namespace graphopt::quantized_kv_attention {

// A new token's key or value as half-precision numbers [depth], keys turned where they are stored so.
void narrowed(const Work& work, bool key, int64_t row, int64_t index, int64_t kv, uint16_t* to);

// Quantizes a full block: keys [depth, width], values [width, depth].
void write_block(const Work& work, int64_t row, int64_t block, int64_t kv, const float* keys, const float* values);

// Puts the only new token of a row into the ring, and quantizes the block that it makes full, if any.
void append(const Work& work, int64_t row, int64_t kv);

}  // namespace graphopt::quantized_kv_attention
