// The sizes of HadamardTransform and HadamardQuantize, checked.
#pragma once

#include "operator.h"

namespace graphopt::hadamard_transform {

struct Sizes {
  // Of groups of so many features and a factor [m, m].
  Sizes(int64_t group, const Tensor& factor) : group(group) {
    GRAPHOPT_REQUIRE(group > 0, "group_size is %lld, and must be positive", (long long)group);
    GRAPHOPT_REQUIRE(factor.shape.size() == 2 && factor.dim(0) == factor.dim(1) && factor.dim(0) > 0,
                     "the factor must be a square matrix, not %s", text(factor.shape).c_str());
    m = factor.dim(0);
    halves = group / m;
    GRAPHOPT_REQUIRE(halves > 0 && halves * m == group && (halves & (halves - 1)) == 0,
                     "group_size %lld isn't a power of two times the factor's %lld rows", (long long)group,
                     (long long)m);
  }

  // How many groups a token of x [..., K] has.
  int64_t groups_of(const Tensor& x) const {
    GRAPHOPT_REQUIRE(!x.shape.empty() && x.dim(-1) % group == 0,
                     "the last dimension of %s isn't a multiple of group_size %lld", text(x.shape).c_str(),
                     (long long)group);
    return x.dim(-1) / group;
  }

  // The same where every token gets a scale.
  int64_t some_groups_of(const Tensor& x) const {
    const int64_t groups = groups_of(x);
    GRAPHOPT_REQUIRE(groups > 0, "tokens with no features, %s, have no scale", text(x.shape).c_str());
    return groups;
  }

  int64_t group;
  int64_t m;
  int64_t halves;  // group / m, a power of two
};

}  // namespace graphopt::hadamard_transform
