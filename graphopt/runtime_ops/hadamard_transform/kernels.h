// Inner loops of HadamardTransform.
#pragma once

#include <cstdint>

#include "isa.h"

namespace graphopt::hadamard_transform {

struct Kernels {
  // The fast Walsh-Hadamard transform in place, of `halves` (a power of two) times `width` numbers: for each of `width`
  // columns a transform over the rows.
  void (*transform)(float* values, int64_t halves, int64_t width);
};

GRAPHOPT_ISA_VARIANTS(Kernels)

}  // namespace graphopt::hadamard_transform
