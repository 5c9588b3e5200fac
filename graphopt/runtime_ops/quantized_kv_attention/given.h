// What a node is given, checked before anything of it is read; the same on the CPU and on CUDA.
#pragma once

#include <vector>

#include "layout.h"
#include "operator.h"

namespace graphopt::quantized_kv_attention {

enum Input : size_t {
  kQuery, kKey, kValue, kPastCodes, kPastScales, kPastRecent, kSeqlensK, kCosCache, kSinCache, kInputs
};

// One run's inputs, and its outputs in `work`.
struct Given {
  Tensor in[kInputs];
  std::vector<Row> rows;
  int64_t past_blocks;  // blocks that the past has room for
  Work work;

  // Bytes of one row of codes (i = 0), scales (1) or recent tokens (2), of the past or of the present.
  int64_t row_bytes(size_t i, int64_t blocks) const;
  const void* past(size_t i) const { return in[kPastCodes + i].data; }
  void* present(size_t i) const;
  // Whether the present lies where the past does.
  bool in_place() const;
};

// A node's attributes.
class Settings {
 public:
  explicit Settings(const Node& node);
  // Throws where something is wrong. `given.work` points into `given`.
  void read(Call& call, Given& given) const;
  bool shared() const { return shared_; }
  bool turns_at_read() const { return at_read_; }
  int64_t width() const { return width_; }

 private:
  int64_t heads_, kv_heads_, width_, window_, key_bits_, value_bits_, group_, local_;
  bool per_channel_, at_read_, interleaved_, shared_;
  float scale_, softcap_;
};

Operator described(std::unique_ptr<Kernel> (*make)(const Node&), const char* provider);

}  // namespace graphopt::quantized_kv_attention
