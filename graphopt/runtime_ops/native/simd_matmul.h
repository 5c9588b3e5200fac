// Products of matrices small enough to lie in the first-level cache.
#pragma once

#include "simd_memory.h"

namespace graphopt::GRAPHOPT_ISA {

// Vectors of columns that a block of the result is wide: with its rows it fills the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif

// The block of kR rows and kC vectors of columns of a product: `left` is kR × depth, or its transpose where kTransposed,
// `right` is depth × kC vectors, all with rows of so many numbers. The last vector is stored as far as `last` lanes.
template <bool kTransposed, int kR, int kC>
GRAPHOPT_INLINE void multiply_block(const float* left, int64_t left_width, const float* right, int64_t right_width,
                                    int64_t depth, float* to, int64_t to_width, int64_t last) {
  F sums[kR][kC];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) sums[r][c] = F{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    F columns[kC];
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) columns[c] = load(right + k * right_width + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const F one = all(kTransposed ? left[k * left_width + r] : left[r * left_width + k]);
#pragma GCC unroll 4
      for (int c = 0; c < kC; ++c) sums[r][c] = fma(one, columns[c], sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) {
      float* at = to + r * to_width + c * kLanes;
      if (c + 1 < kC || last == kLanes) {
        store(at, sums[r][c]);
      } else {
        store_first(at, sums[r][c], last);
      }
    }
  }
}

template <bool kTransposed, int kC>
void multiply_columns(const float* left, int64_t left_width, const float* right, int64_t right_width, int64_t rows,
                      int64_t depth, float* to, int64_t to_width, int64_t last) {
  constexpr int kRows = kC == kColumns ? 6 : 8;
  const int64_t step = kTransposed ? 1 : left_width;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    multiply_block<kTransposed, kRows, kC>(left + row * step, left_width, right, right_width, depth,
                                           to + row * to_width, to_width, last);
  }
  if (row + 4 <= rows) {
    multiply_block<kTransposed, 4, kC>(left + row * step, left_width, right, right_width, depth, to + row * to_width,
                                       to_width, last);
    row += 4;
  }
  if (row + 2 <= rows) {
    multiply_block<kTransposed, 2, kC>(left + row * step, left_width, right, right_width, depth, to + row * to_width,
                                       to_width, last);
    row += 2;
  }
  if (row < rows) {
    multiply_block<kTransposed, 1, kC>(left + row * step, left_width, right, right_width, depth, to + row * to_width,
                                       to_width, last);
  }
}

// to = left · right, or leftᵀ · right where kTransposed. left is rows × depth (transposed: depth × rows), right depth ×
// columns, to rows × columns; each has rows of `..._width` numbers. Rows of `right` are read to the end of the last
// vector, whatever stands there; `to` is written at its columns alone.
template <bool kTransposed>
GRAPHOPT_INLINE void multiply(const float* left, int64_t left_width, const float* right, int64_t right_width,
                              int64_t rows, int64_t depth, int64_t columns, float* to, int64_t to_width) {
  int64_t vectors = (columns + kLanes - 1) / kLanes;
  for (int64_t blocks = (vectors + kColumns - 1) / kColumns; blocks > 0; --blocks) {
    const int64_t wide = (vectors + blocks - 1) / blocks;
    const int64_t last = blocks > 1 ? kLanes : columns - (wide - 1) * kLanes;
    switch (wide) {
      case 1: multiply_columns<kTransposed, 1>(left, left_width, right, right_width, rows, depth, to, to_width, last);
        break;
      case 2: multiply_columns<kTransposed, 2>(left, left_width, right, right_width, rows, depth, to, to_width, last);
        break;
#if defined(__AVX512F__) || defined(__aarch64__)
      case 3: multiply_columns<kTransposed, 3>(left, left_width, right, right_width, rows, depth, to, to_width, last);
        break;
      default: multiply_columns<kTransposed, 4>(left, left_width, right, right_width, rows, depth, to, to_width, last);
        break;
#endif
    }
    right += wide * kLanes;
    to += wide * kLanes;
    columns -= wide * kLanes;
    vectors -= wide;
  }
}

}  // namespace graphopt::GRAPHOPT_ISA
