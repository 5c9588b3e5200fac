// Half-precision numbers of CUDA kernels on the host.
#pragma once

#include "cuda_on_host.h"
#include "float16.h"

struct __half {
  graphopt::Half value;
};

inline float __half2float(__half half) { return graphopt::to_float(half.value); }
inline __half __float2half_rn(float value) { return {graphopt::from_float<graphopt::Half>(value)}; }
