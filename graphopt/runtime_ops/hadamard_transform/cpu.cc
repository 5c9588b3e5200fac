// The CPU kernel of HadamardTransform.
#include <algorithm>

#include "rotation.h"

namespace graphopt::hadamard_transform {
namespace {

class HadamardTransform final : public Kernel {
 public:
  explicit HadamardTransform(const Node& node) : rotation_(node) {}

  void compute(Call& call) override {
    const Tensor x = call.input(0), factor = call.input(1);
    Buffer memory;
    const Sizes sizes(rotation_.group(), factor);
    const Plan plan = rotation_.plan(sizes, factor, memory);
    const int64_t group = sizes.group, together = rotation_.groups_of_a_task(plan);
    const int64_t groups = sizes.groups_of(x) == 0 ? 0 : x.size() / group;
    void* y = call.output(0, x.shape);
    const Kernels& inner = rotation_.inner();
    call.parallel(size_t((groups + together - 1) / together), [&](size_t task) {
      float* scratch = rotation_.scratch(plan);
      const int64_t end = std::min(groups, int64_t(task + 1) * together);
      for (int64_t g = int64_t(task) * together; g < end; ++g) {
        if (x.type == ElementType::float16) {
          inner.halves(plan, x.as<uint16_t>() + g * group, static_cast<uint16_t*>(y) + g * group, scratch);
        } else {
          inner.floats(plan, x.as<float>() + g * group, static_cast<float*>(y) + g * group, scratch);
        }
      }
    });
  }

 private:
  Rotation rotation_;
};

void infer(Inference& inference) { inference.output(0, inference.type(0), inference.input(0)); }

const std::vector<ElementType> kT = {ElementType::float32, ElementType::float16};
const Registration registration{
    {"HadamardTransform", {{kT}, {{ElementType::float32}}}, {{kT}}, make<HadamardTransform>, infer}};

}  // namespace
}  // namespace graphopt::hadamard_transform
