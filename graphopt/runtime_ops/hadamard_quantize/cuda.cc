// The CUDA kernel of HadamardQuantize.
#include "../hadamard_transform/launchers.h"
#include "../hadamard_transform/sizes.h"
#include "cuda_call.h"
#include "per_token.h"

namespace graphopt::hadamard_transform {
namespace {

class HadamardQuantize final : public Kernel {
 public:
  explicit HadamardQuantize(const Node& node)
      : group_(node.integer("group_size")), scale_(node.number("scale")), per_token_(node) {}

  void compute(Call& call) override {
    const Tensor x = call.input(0), factor = call.input(1);
    const Sizes sizes(group_, factor);
    const int64_t groups = sizes.some_groups_of(x);
    uint8_t* y = call.output<uint8_t>(0, x.shape);
    float* scales = call.output<float>(1, PerToken::scales(x.shape));
    auto* launch = x.type == ElementType::float16 ? graphopt_cuda_hadamard_quantize_half
                                                  : graphopt_cuda_hadamard_quantize_float;
    require_launched(launch(x.data, factor.as<float>(), y, scales, x.size() / x.dim(-1), groups, sizes.halves, sizes.m,
                            scale_, per_token_.clip, per_token_.largest, call.cuda_stream()));
  }

 private:
  int64_t group_;
  float scale_;
  PerToken per_token_;
};

void infer(Inference& inference) { PerToken::infer(inference); }

const std::vector<ElementType> kT = {ElementType::float32, ElementType::float16};
const std::vector<ElementType> kFloat = {ElementType::float32};
const Registration registration{{"HadamardQuantize",
                                 {{kT}, {kFloat}},
                                 {{{ElementType::uint8}}, {kFloat}},
                                 make<HadamardQuantize>,
                                 infer,
                                 "CUDAExecutionProvider"}};

}  // namespace
}  // namespace graphopt::hadamard_transform
