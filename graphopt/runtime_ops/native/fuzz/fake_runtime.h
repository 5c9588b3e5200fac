// ONNX Runtime as the library sees it, for one node and with nothing behind it.
#pragma once

#include <string>
#include <vector>

#include "fuzz/case.h"

namespace graphopt::fuzz {

// The operators that the library registers.
const std::vector<const abi::CustomOp*>& registered_operators();

// How a call of the library ended.
struct Outcome {
  bool ok = true;
  std::string error;
};

// Shape inference for a node. The dimensions of its inputs are known, named or unknown at random.
Outcome infer(const Case& made, Random& random);

// A kernel made for the node of a case. Attributes that the case lacks are missing for the kernel too, unless `open`:
// then the kernel gets something at random for whatever it asks for.
class FakeKernel {
 public:
  FakeKernel(Case& made, bool open, Random& random);
  ~FakeKernel();
  FakeKernel(const FakeKernel&) = delete;
  FakeKernel& operator=(const FakeKernel&) = delete;

  const Outcome& made() const { return outcome_; }
  // Runs it; `blank` fills the outputs before. Inputs that share memory with an output change.
  Outcome run(Case& made, uint8_t blank);
  // The bytes of the outputs of the last run.
  const std::vector<std::vector<std::byte>>& outputs() const { return outputs_; }

 private:
  const abi::CustomOp& op_;
  void* kernel_ = nullptr;
  Outcome outcome_;
  std::vector<std::vector<std::byte>> outputs_;
};

}  // namespace graphopt::fuzz
