// The CPU kernel of KroneckerTransform.
#include "product.h"

namespace graphopt::kronecker_transform {
namespace {

class KroneckerTransform final : public Kernel {
 public:
  explicit KroneckerTransform(const Node& node) : product_(node) {}

  void compute(Call& call) override {
    const Tensor x = call.input(0), left = call.input(1), right = call.input(2);
    Buffer memory;
    const Plan plan = product_.plan(Sizes(x, left, right), left, right, memory);
    void* y = call.output(0, x.shape);
    product_.run(call, plan, x, y, [](int64_t, float*) {});
  }

 private:
  Product product_;
};

void infer(Inference& inference) { inference.output(0, inference.type(0), inference.input(0)); }

const std::vector<ElementType> kT = {ElementType::float32, ElementType::float16};
const std::vector<ElementType> kFloat = {ElementType::float32};
const Registration registration{
    {"KroneckerTransform", {{kT}, {kFloat}, {kFloat}}, {{kT}}, make<KroneckerTransform>, infer}};

}  // namespace
}  // namespace graphopt::kronecker_transform
