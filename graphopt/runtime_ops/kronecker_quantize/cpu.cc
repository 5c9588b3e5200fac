// The CPU kernel of KroneckerQuantize.
#include "../kronecker_transform/product.h"
#include "per_token.h"

namespace graphopt::kronecker_transform {
namespace {

class KroneckerQuantize final : public Kernel {
 public:
  explicit KroneckerQuantize(const Node& node) : product_(node), per_token_(node) {}

  void compute(Call& call) override {
    const Tensor x = call.input(0), left = call.input(1), right = call.input(2);
    Buffer memory;
    const Plan plan = product_.plan(Sizes(x, left, right), left, right, memory);
    uint8_t* y = call.output<uint8_t>(0, x.shape);
    float* scales = call.output<float>(1, PerToken::scales(x.shape));
    const int64_t features = plan.a * plan.b;
    product_.run(call, plan, x, nullptr, [&](int64_t token, const float* values) {
      scales[token] =
          product_.inner().quantize(values, features, per_token_.clip, per_token_.largest, y + token * features);
    });
  }

 private:
  Product product_;
  PerToken per_token_;
};

void infer(Inference& inference) { PerToken::infer(inference); }

const std::vector<ElementType> kT = {ElementType::float32, ElementType::float16};
const std::vector<ElementType> kFloat = {ElementType::float32};
const Registration registration{{"KroneckerQuantize",
                                 {{kT}, {kFloat}, {kFloat}},
                                 {{{ElementType::uint8}}, {kFloat}},
                                 make<KroneckerQuantize>,
                                 infer}};

}  // namespace
}  // namespace graphopt::kronecker_transform
