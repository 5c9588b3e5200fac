// The sizes of KroneckerTransform and KroneckerQuantize, checked.
#pragma once

#include "operator.h"

namespace graphopt::kronecker_transform {

inline void require_square(const Tensor& matrix, const char* name) {
  GRAPHOPT_REQUIRE(matrix.shape.size() == 2 && matrix.dim(0) == matrix.dim(1) && matrix.dim(0) > 0,
                   "%s must be a square matrix, not %s", name, text(matrix.shape).c_str());
}

struct Sizes {
  Sizes(const Tensor& x, const Tensor& left, const Tensor& right) {
    require_square(left, "left");
    require_square(right, "right");
    a = left.dim(0);
    b = right.dim(0);
    GRAPHOPT_REQUIRE(!x.shape.empty() && x.dim(-1) % b == 0 && x.dim(-1) / b == a,
                     "the last dimension of %s isn't the %lld times %lld rows of the two matrices",
                     text(x.shape).c_str(), (long long)a, (long long)b);
    tokens = x.size() / (a * b);
  }

  int64_t a;
  int64_t b;
  int64_t tokens;
};

}  // namespace graphopt::kronecker_transform
