// The CUDA kernel of HadamardTransform.
#include "cuda_call.h"
#include "launchers.h"
#include "sizes.h"

namespace graphopt::hadamard_transform {
namespace {

class HadamardTransform final : public Kernel {
 public:
  explicit HadamardTransform(const Node& node) : group_(node.integer("group_size")), scale_(node.number("scale")) {}

  void compute(Call& call) override {
    const Tensor x = call.input(0), factor = call.input(1);
    const Sizes sizes(group_, factor);
    const int64_t groups = sizes.groups_of(x) == 0 ? 0 : x.size() / sizes.group;
    auto* launch = x.type == ElementType::float16 ? graphopt_cuda_hadamard_transform_half
                                                  : graphopt_cuda_hadamard_transform_float;
    require_launched(launch(x.data, factor.as<float>(), call.output(0, x.shape), groups, sizes.halves, sizes.m, scale_,
                            call.cuda_stream()));
  }

 private:
  int64_t group_;
  float scale_;
};

void infer(Inference& inference) { inference.output(0, inference.type(0), inference.input(0)); }

const std::vector<ElementType> kT = {ElementType::float32, ElementType::float16};
const Registration registration{{"HadamardTransform",
                                 {{kT}, {{ElementType::float32}}},
                                 {{kT}},
                                 make<HadamardTransform>,
                                 infer,
                                 "CUDAExecutionProvider"}};

}  // namespace
}  // namespace graphopt::hadamard_transform
