// The CUDA kernel of QuantizedLinear.
#include "device_memory.h"
#include "inputs.h"
#include "launchers.h"

namespace graphopt::quantized_linear {
namespace {

class QuantizedLinear final : public Kernel {
 public:
  explicit QuantizedLinear(const Node& node) : inputs_(node) {}

  void compute(Call& call) override {
    const Inputs::Weights weights = inputs_.weights(call);
    const Matrix& matrix = weights.matrix;
    const Tensor x = call.input(kX), residual = call.input(kResidual);
    bool adds = false;
    const Shape shape = Inputs::product(matrix, x, residual, &adds);
    const int64_t tokens = Inputs::tokens(x);
    void* y = call.output(0, shape);
    if (tokens == 0 || matrix.rows == 0) return;
    const int block = int(matrix.block), activation_bits = 8 * inputs_.format.terms;
    const int64_t bytes =
        graphopt_cuda_quantized_linear_scratch_bytes(tokens, matrix.length, block, activation_bits);
    GRAPHOPT_REQUIRE(bytes >= 0, "x is %s, more than fits any memory", text(x.shape).c_str());
    void* stream = call.cuda_stream();
    const DeviceMemory scratch(size_t(bytes), stream);
    require_launched(graphopt_cuda_quantized_linear(
        x.data, weights.norm, matrix.packed, matrix.scales, matrix.zero_points, matrix.minimums, weights.bias,
        adds ? residual.data : nullptr, y, scratch.get(), tokens, matrix.rows, matrix.length,
        matrix.bits, block, activation_bits, x.type == ElementType::float16, matrix.half, inputs_.epsilon, stream));
  }

 private:
  Inputs inputs_;
};

const Registration registration{linear_operator<QuantizedLinear>("CUDAExecutionProvider")};

}  // namespace
}  // namespace graphopt::quantized_linear
