// Inner loops of KroneckerTransform and KroneckerQuantize.
#pragma once

#include <cstdint>

#include "isa.h"

namespace graphopt::kronecker_transform {

// One token's transform, Y = Aᵀ X B.
struct Plan {
  int64_t a;           // rows of X
  int64_t b;           // columns of X
  const float* left;   // A, [a, a]
  const float* right;  // B in panels
};

// Room in `scratch` for one token: X B in panels, then X or Y as floats.
inline int64_t scratch_size(int64_t a, int64_t b) { return a * ((b + 15) / 16 * 16 + b); }

struct Kernels {
  // B [b, b] in panels; `panels` has room for b rows of a multiple of 16 numbers.
  void (*into_panels)(const float* right, int64_t b, float* panels);
  // X B, the rows from `begin` to `end`, into scratch; of float (0) or half-precision (1) numbers.
  void (*first[2])(const Plan& plan, const void* x, float* scratch, int64_t begin, int64_t end);
  // Aᵀ times that, the rows from `begin` to `end` of Y, when all of it is there. y may be the memory of x.
  void (*second[2])(const Plan& plan, float* scratch, void* y, int64_t begin, int64_t end);
  // See native/simd_quantize.h.
  float (*quantize)(const float* values, int64_t size, float clip, float largest, uint8_t* bytes);
};

GRAPHOPT_ISA_VARIANTS(Kernels)

}  // namespace graphopt::kronecker_transform
