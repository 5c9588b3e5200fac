#include "kernels.h"
#include "simd.h"

namespace graphopt::hadamard_transform::GRAPHOPT_ISA {
namespace {

using namespace graphopt::GRAPHOPT_ISA;

// One level: sums and differences of numbers that are `width` apart.
GRAPHOPT_INLINE void level(float* values, int64_t pairs, int64_t width) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    float* first = values + 2 * pair * width;
    float* second = first + width;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      const F a = load(first + i), b = load(second + i);
      store(first + i, a + b);
      store(second + i, a - b);
    }
    for (; i < width; ++i) {
      const float a = first[i], b = second[i];
      first[i] = a + b;
      second[i] = a - b;
    }
  }
}

void transform(float* values, int64_t halves, int64_t width) {
  for (int64_t pairs = halves / 2; pairs > 0; pairs /= 2, width *= 2) level(values, pairs, width);
}

}  // namespace

const Kernels variant = {transform};

}  // namespace graphopt::hadamard_transform::GRAPHOPT_ISA
