// The CPU kernel of HadamardQuantize.
#include <algorithm>

#include "../hadamard_transform/rotation.h"
#include "per_token.h"

namespace graphopt::hadamard_transform {
namespace {

class HadamardQuantize final : public Kernel {
 public:
  explicit HadamardQuantize(const Node& node) : rotation_(node), per_token_(node) {}

  void compute(Call& call) override {
    const Tensor x = call.input(0), factor = call.input(1);
    Buffer memory;
    const Sizes sizes(rotation_.group(), factor);
    const Plan plan = rotation_.plan(sizes, factor, memory);
    const int64_t group = sizes.group, features = sizes.some_groups_of(x) * group, tokens = x.size() / features;
    uint8_t* y = call.output<uint8_t>(0, x.shape);
    float* scales = call.output<float>(1, PerToken::scales(x.shape));
    const Kernels& inner = rotation_.inner();
    const int64_t together = std::max<int64_t>(1, rotation_.groups_of_a_task(plan) * group / features);
    call.parallel(size_t((tokens + together - 1) / together), [&](size_t task) {
      float* own = rotation_.scratch(plan, (features + 15) / 16 * 16);
      float* scratch = own + (features + 15) / 16 * 16;
      const int64_t end = std::min(tokens, int64_t(task + 1) * together);
      for (int64_t token = int64_t(task) * together; token < end; ++token) {
        for (int64_t at = 0; at < features; at += group) {
          const int64_t from = token * features + at;
          if (x.type == ElementType::float16) {
            inner.halves_to_floats(plan, x.as<uint16_t>() + from, own + at, scratch);
          } else {
            inner.floats(plan, x.as<float>() + from, own + at, scratch);
          }
        }
        scales[token] =
            inner.quantize(own, features, per_token_.clip, per_token_.largest, y + token * features);
      }
    });
  }

 private:
  Rotation rotation_;
  PerToken per_token_;
};

void infer(Inference& inference) { PerToken::infer(inference); }

const std::vector<ElementType> kT = {ElementType::float32, ElementType::float16};
const std::vector<ElementType> kFloat = {ElementType::float32};
const Registration registration{
    {"HadamardQuantize", {{kT}, {kFloat}}, {{{ElementType::uint8}}, {kFloat}}, make<HadamardQuantize>, infer}};

}  // namespace
}  // namespace graphopt::hadamard_transform
