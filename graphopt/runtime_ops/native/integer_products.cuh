// Products of signed bytes with 32-bit sums, four at once and on tensor cores.
#pragma once

#include <cstdint>

namespace graphopt {

// sum + the products of the four bytes of a and b.
__device__ inline int dot4(uint32_t a, uint32_t b, int sum) { return __dp4a(int(a), int(b), sum); }

// sums += A B of a whole warp, where A is 16 × 16 and B is 16 × 8. Lane 4 g + t holds
//   a[i]     numbers 4 t to 4 t + 3 of row g + 8 i of A
//   b        numbers 4 t to 4 t + 3 of column g of B
//   sums[i]  row g + 8 (i / 2), column 2 t + i % 2 of the product
__device__ inline void multiply_tile(int (&sums)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

}  // namespace graphopt
