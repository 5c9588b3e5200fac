// The header of this name in native/, with tensor cores' product by what lanes tell each other.
#pragma once

#include "cuda_on_host.h"

namespace graphopt {

inline int dot4(uint32_t a, uint32_t b, int sum) { return __dp4a(int(a), int(b), sum); }

inline void multiply_tile(int (&sums)[4], const uint32_t (&a)[2], uint32_t b) {
  const int group = lane_on_host() / 4, member = lane_on_host() % 4;
  for (int quarter = 0; quarter < 4; ++quarter) {
    const uint64_t both = __shfl_sync(~0u, uint64_t(a[1]) << 32 | a[0], group * 4 + quarter);
    for (int column = 0; column < 2; ++column) {
      const uint32_t right = __shfl_sync(~0u, b, (member * 2 + column) * 4 + quarter);
      sums[column] = dot4(uint32_t(both), right, sums[column]);
      sums[2 + column] = dot4(uint32_t(both >> 32), right, sums[2 + column]);
    }
  }
}

}  // namespace graphopt
