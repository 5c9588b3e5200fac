// Inner loops of HadamardTransform and HadamardQuantize. Half-precision numbers are their 16 bits.
#pragma once

#include <cstdint>

#include "isa.h"

namespace graphopt::hadamard_transform {

// One group's transform, y = (H ⊗ F) x · scale.
struct Plan {
  int64_t halves;       // rows of H, a power of two
  int64_t m;            // rows of F
  const float* factor;  // for m > 1: Fᵀ in panels
  float one;            // for m = 1: the number F
  float scale;
};

constexpr int64_t kChunkRows = 48;  // rows that the factor is applied to at a time

struct Kernels {
  // The transpose of F [m, m] in panels; `panels` has room for m rows of a multiple of 16 numbers.
  void (*into_panels)(const float* factor, int64_t m, float* panels);
  // `scratch` holds (halves + kChunkRows) · m numbers and lies apart from x and y, which may be the same memory.
  void (*floats)(const Plan& plan, const float* x, float* y, float* scratch);
  void (*halves)(const Plan& plan, const uint16_t* x, uint16_t* y, float* scratch);
  void (*halves_to_floats)(const Plan& plan, const uint16_t* x, float* y, float* scratch);
  // See native/simd_quantize.h.
  float (*quantize)(const float* values, int64_t size, float clip, float largest, uint8_t* bytes);
};

GRAPHOPT_ISA_VARIANTS(Kernels)

}  // namespace graphopt::hadamard_transform
