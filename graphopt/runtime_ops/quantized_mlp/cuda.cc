// The CUDA kernel of QuantizedMlp.
#include "device_memory.h"
#include "inputs.h"
#include "launchers.h"

namespace graphopt::quantized_mlp {
namespace {

class QuantizedMlp final : public Kernel {
 public:
  explicit QuantizedMlp(const Node& node) : inputs_(node) {}

  void compute(Call& call) override {
    const Inputs::Weights weights = inputs_.weights(call);
    const Matrix &up = weights.gate_up, &down = weights.down;
    const Tensor x = call.input(kX);
    const int64_t tokens = Inputs::tokens(weights, x), width = up.length, hidden = down.length;
    void* y = call.output(0, x.shape);
    if (tokens == 0) return;
    const int block = int(up.block), activation_bits = 8 * inputs_.format.terms;
    const int64_t bytes = graphopt_cuda_quantized_mlp_scratch_bytes(tokens, width, hidden, block, activation_bits);
    GRAPHOPT_REQUIRE(bytes >= 0, "x is %s, more than fits any memory", text(x.shape).c_str());
    void* stream = call.cuda_stream();
    const DeviceMemory scratch(size_t(bytes), stream);
    require_launched(graphopt_cuda_quantized_mlp(
        x.data, weights.norm, up.packed, up.scales, up.zero_points, up.minimums, down.packed, down.scales,
        down.zero_points, down.minimums, y, scratch.get(), tokens, width, hidden, up.bits, block, activation_bits,
        inputs_.activation, x.type == ElementType::float16, up.half, inputs_.epsilon, stream));
  }

 private:
  Inputs inputs_;
};

const Registration registration{mlp_operator<QuantizedMlp>("CUDAExecutionProvider")};

}  // namespace
}  // namespace graphopt::quantized_mlp
