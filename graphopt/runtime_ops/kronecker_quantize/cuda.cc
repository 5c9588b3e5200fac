// The CUDA kernel of KroneckerQuantize.
#include "../kronecker_transform/launchers.h"
#include "../kronecker_transform/sizes.h"
#include "cuda_call.h"
#include "per_token.h"

namespace graphopt::kronecker_transform {
namespace {

class KroneckerQuantize final : public Kernel {
 public:
  explicit KroneckerQuantize(const Node& node) : per_token_(node) {}

  void compute(Call& call) override {
    const Tensor x = call.input(0), left = call.input(1), right = call.input(2);
    const Sizes sizes(x, left, right);
    uint8_t* y = call.output<uint8_t>(0, x.shape);
    float* scales = call.output<float>(1, PerToken::scales(x.shape));
    auto* launch = x.type == ElementType::float16 ? graphopt_cuda_kronecker_quantize_half
                                                  : graphopt_cuda_kronecker_quantize_float;
    require_launched(launch(x.data, left.as<float>(), right.as<float>(), y, scales, sizes.tokens, sizes.a, sizes.b,
                            per_token_.clip, per_token_.largest, call.cuda_stream()));
  }

 private:
  PerToken per_token_;
};

void infer(Inference& inference) { PerToken::infer(inference); }

const std::vector<ElementType> kT = {ElementType::float32, ElementType::float16};
const std::vector<ElementType> kFloat = {ElementType::float32};
const Registration registration{{"KroneckerQuantize",
                                 {{kT}, {kFloat}, {kFloat}},
                                 {{{ElementType::uint8}}, {kFloat}},
                                 make<KroneckerQuantize>,
                                 infer,
                                 "CUDAExecutionProvider"}};

}  // namespace
}  // namespace graphopt::kronecker_transform
