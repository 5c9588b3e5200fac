// What HadamardTransform and HadamardQuantize have in common on the CPU: the groups of a row, rotated.
#pragma once

#include <vector>

#include "kernels.h"
#include "operator.h"

namespace graphopt::hadamard_transform {

class Rotation {
 public:
  explicit Rotation(const Node& node) : group_(node.integer("group_size")), scale_(node.number("scale")) {
    GRAPHOPT_REQUIRE(group_ > 0, "group_size is %lld, and must be positive", (long long)group_);
    Tensor factor;
    if (node.constant(1, &factor)) {
      check(factor);
      kept_ = packed(factor);
      is_constant_ = true;
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
    if (!is_constant_) *memory = packed(factor);
    return {group_ / m, m, (is_constant_ ? kept_ : *memory).data(), padded(m), factor.as<float>()[0], scale_};
  }

  int64_t group() const { return group_; }
  size_t scratch(const Plan& plan) const { return size_t(group_ + kChunkRows * plan.m); }

  // Groups that are worth the call of a thread: of some 30,000 numbers with a factor of 1, of fewer with a larger one.
  int64_t groups_of_a_task(const Plan& plan) const {
    const int64_t work = group_ * (plan.m == 1 ? 1 : 1 + plan.m / 4);
    return work >= kTaskWork ? 1 : kTaskWork / work;
  }

 private:
  static constexpr int64_t kTaskWork = 32768;

  // A multiple of the lanes of any vector.
  static int64_t padded(int64_t m) { return (m + 15) / 16 * 16; }

  void check(const Tensor& factor) const {
    GRAPHOPT_REQUIRE(factor.shape.size() == 2 && factor.dim(0) == factor.dim(1) && factor.dim(0) > 0,
                     "the factor must be a square matrix, not %s", text(factor.shape).c_str());
    const int64_t m = factor.dim(0), halves = group_ / m;
    GRAPHOPT_REQUIRE(halves > 0 && halves * m == group_ && (halves & (halves - 1)) == 0,
                     "group_size %lld isn't a power of two times the factor's %lld rows", (long long)group_, (long long)m);
  }

  static std::vector<float> packed(const Tensor& factor) {
    const int64_t m = factor.dim(0), width = padded(m);
    if (m == 1) return {};
    std::vector<float> made(size_t(m * width));
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t i = 0; i < m; ++i) made[i * width + row] = factor.as<float>()[row * m + i];
    }
    return made;
  }

  int64_t group_;
  float scale_;
  std::vector<float> kept_;
  bool is_constant_ = false;
};

}  // namespace graphopt::hadamard_transform
