// Attention of one new token a row.
#pragma once

#include "layout.h"
#include "operator.h"

namespace graphopt::quantized_kv_attention {

// Writes the new tokens and their results. `copy` is run first, for i < copies.
void decode(Call& call, const Work& work, size_t copies, const std::function<void(size_t)>& copy);

}  // namespace graphopt::quantized_kv_attention
