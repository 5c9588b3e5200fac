// The CUDA kernel of KroneckerTransform.
#include "cuda_call.h"
#include "launchers.h"
#include "sizes.h"

namespace graphopt::kronecker_transform {
namespace {

class KroneckerTransform final : public Kernel {
 public:
  explicit KroneckerTransform(const Node&) {}

  void compute(Call& call) override {
    const Tensor x = call.input(0), left = call.input(1), right = call.input(2);
    const Sizes sizes(x, left, right);
    auto* launch = x.type == ElementType::float16 ? graphopt_cuda_kronecker_transform_half
                                                  : graphopt_cuda_kronecker_transform_float;
    require_launched(launch(x.data, left.as<float>(), right.as<float>(), call.output(0, x.shape), sizes.tokens, sizes.a,
                            sizes.b, call.cuda_stream()));
  }
};

void infer(Inference& inference) { inference.output(0, inference.type(0), inference.input(0)); }

const std::vector<ElementType> kT = {ElementType::float32, ElementType::float16};
const std::vector<ElementType> kFloat = {ElementType::float32};
const Registration registration{{"KroneckerTransform",
                                 {{kT}, {kFloat}, {kFloat}},
                                 {{kT}},
                                 make<KroneckerTransform>,
                                 infer,
                                 "CUDAExecutionProvider"}};

}  // namespace
}  // namespace graphopt::kronecker_transform
