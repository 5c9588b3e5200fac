// What HadamardTransform and HadamardQuantize have in common on the CPU: the factor, laid out, and memory.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "kernels.h"
#include "operator.h"
#include "sizes.h"

namespace graphopt::hadamard_transform {

class Rotation {
 public:
  // Of inputs x and factor.
  explicit Rotation(const Node& node)
      : inner_(kernels()), group_(node.integer("group_size")), scale_(node.number("scale")) {
    GRAPHOPT_REQUIRE(group_ > 0, "group_size is %lld, and must be positive", (long long)group_);
    Tensor factor;
    if (node.constant(1, &factor)) kept_ = into_panels(factor, Sizes(group_, factor).m, memory_);
  }

  const Kernels& inner() const { return inner_; }
  int64_t group() const { return group_; }

  // The plan for a call. A factor that is no constant of the model is laid out in `memory`.
  Plan plan(const Sizes& sizes, const Tensor& factor, Buffer& memory) const {
    const float* panels = kept_ != nullptr ? kept_ : into_panels(factor, sizes.m, memory);
    return {sizes.halves, sizes.m, panels, factor.as<float>()[0], scale_};
  }

  // Working memory of this thread: of one group, with so many numbers in front.
  float* scratch(const Plan& plan, int64_t more = 0) const {
    thread_local Buffer memory;
    const int64_t numbers = more + group_ + kChunkRows * plan.m;
    return reinterpret_cast<float*>(memory.reserve(sizeof(float) * size_t(numbers)));
  }

  // Groups that are worth the call of a thread: of some 30,000 numbers with a factor of 1, of fewer with a larger one.
  int64_t groups_of_a_task(const Plan& plan) const {
    const int64_t of_a_number = plan.m == 1 ? 1 : 1 + plan.m / 4;
    return std::max<int64_t>(1, kTaskWork / of_a_number / group_);
  }

 private:
  static constexpr int64_t kTaskWork = 32768;

  const float* into_panels(const Tensor& factor, int64_t m, Buffer& memory) const {
    float* panels = reinterpret_cast<float*>(memory.reserve(sizeof(float) * size_t(m * ((m + 15) / 16 * 16))));
    inner_.into_panels(factor.as<float>(), m, panels);
    return panels;
  }

  const Kernels& inner_;  // as it was when the factor was laid out
  int64_t group_;
  float scale_;
  Buffer memory_;
  const float* kept_ = nullptr;  // the factor, where it is a constant of the model
};

}  // namespace graphopt::hadamard_transform
