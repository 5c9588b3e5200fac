// What HadamardTransform and HadamardQuantize have in common on the CPU: the groups of a row, rotated.
#pragma once

#include <vector>

#include "kernels.h"
#include "operator.h"

namespace graphopt::hadamard_transform {

class Rotation {
 public:
  // Of inputs x and factor.
  explicit Rotation(const Node& node)
      : inner_(kernels()), group_(node.integer("group_size")), scale_(node.number("scale")) {
    GRAPHOPT_REQUIRE(group_ > 0, "group_size is %lld, and must be positive", (long long)group_);
    Tensor factor;
    if (node.constant(1, &factor)) {
      check(factor);
      into_panels(factor, &kept_);
    }
  }

  // The plan for a call: of the factor that was a constant of the model, or of the one that it is given, which is then
  // laid out in `memory`.
  Plan plan(const Tensor& x, const Tensor& factor, std::vector<float>* memory) const {
    check(factor);
    GRAPHOPT_REQUIRE(!x.shape.empty() && x.dim(-1) % group_ == 0,
                     "the last dimension of %s isn't a multiple of group_size %lld", text(x.shape).c_str(),
                     (long long)group_);
    const int64_t m = factor.dim(0);
    if (kept_.empty()) into_panels(factor, memory);
    return {group_ / m, m, kept_.empty() ? memory->data() : kept_.data(), factor.as<float>()[0], scale_};
  }

  const Kernels& inner() const { return inner_; }
  int64_t group() const { return group_; }
  size_t scratch(const Plan& plan) const { return size_t(group_ + kChunkRows * plan.m); }

  // Groups that are worth the call of a thread: of some 30,000 numbers with a factor of 1, of fewer with a larger one.
  int64_t groups_of_a_task(const Plan& plan) const {
    const int64_t work = group_ * (plan.m == 1 ? 1 : 1 + plan.m / 4);
    return work >= kTaskWork ? 1 : kTaskWork / work;
  }

 private:
  static constexpr int64_t kTaskWork = 32768;

  void check(const Tensor& factor) const {
    GRAPHOPT_REQUIRE(factor.shape.size() == 2 && factor.dim(0) == factor.dim(1) && factor.dim(0) > 0,
                     "the factor must be a square matrix, not %s", text(factor.shape).c_str());
    const int64_t m = factor.dim(0), halves = group_ / m;
    GRAPHOPT_REQUIRE(halves > 0 && halves * m == group_ && (halves & (halves - 1)) == 0,
                     "group_size %lld isn't a power of two times the factor's %lld rows", (long long)group_, (long long)m);
  }

  void into_panels(const Tensor& factor, std::vector<float>* memory) const {
    const int64_t m = factor.dim(0);
    memory->resize(size_t(m * ((m + 15) / 16 * 16)));
    inner_.into_panels(factor.as<float>(), m, memory->data());
  }

  const Kernels& inner_;  // as it was when the factor was laid out
  int64_t group_;
  float scale_;
  std::vector<float> kept_;
};

}  // namespace graphopt::hadamard_transform
