// The launchers' errors as errors of a node.
#pragma once

#include "launcher.h"
#include "operator.h"

namespace graphopt {

inline void require_launched(int code) {
  GRAPHOPT_REQUIRE(code == 0, "CUDA error %d, %s", code, graphopt_cuda_error(code));
}

}  // namespace graphopt
