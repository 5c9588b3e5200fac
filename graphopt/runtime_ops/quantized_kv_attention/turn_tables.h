// Cosines and sines as blocks of tokens are turned by them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "layout.h"
#include "operator.h"

namespace graphopt::quantized_kv_attention {

// The block-th of a table [rows, half], as [half, width]; 0 behind the last row.
void turn_table(const float* table, int64_t rows, int64_t half, int64_t width, int64_t block, float* to);

// All blocks of a node's tables. Nodes whose tables are the same constants share them.
class TurnTables {
 public:
  // nullptr: the tables aren't constants, or nothing is turned by them.
  static std::shared_ptr<const TurnTables> of(const Node& node, size_t cos, size_t sin, int64_t width);

  const float* cos(int64_t block) const { return numbers_.data() + 2 * block * size_; }
  const float* sin(int64_t block) const { return cos(block) + size_; }

 private:
  int64_t size_ = 0;  // of a block
  std::vector<float> numbers_;
};

}  // namespace graphopt::quantized_kv_attention
