// Products of matrices small enough to lie in a cache, by blocks that fill the registers.
//
// The right operand lies in panels: of 64 columns (or as many as fill a block's registers) all rows, then of the next 64.
// Rows of a matrix whose width is a power of two would be a few lines of the cache in each other's way.
#pragma once

#include "simd_memory.h"

namespace graphopt::GRAPHOPT_ISA {

// Vectors of columns that a block of the result is wide at most.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif

GRAPHOPT_INLINE int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Vectors that the first of the panels of so many vectors is wide: all are about as wide.
GRAPHOPT_INLINE int64_t panel(int64_t vectors) { return parts(vectors, parts(vectors, kColumns)); }

// Numbers that the panels of a matrix have room for.
GRAPHOPT_INLINE int64_t panels_size(int64_t rows, int64_t columns) { return rows * parts(columns, kLanes) * kLanes; }

// The panels of a matrix, or of its transpose, filled up with zeros. `matrix` is rows × columns, the transpose of that
// where kTransposed.
template <bool kTransposed>
GRAPHOPT_INLINE void into_panels(const float* matrix, int64_t rows, int64_t columns, float* panels) {
  int64_t first = 0;
  for (int64_t vectors = parts(columns, kLanes); vectors > 0;) {
    const int64_t wide = panel(vectors), width = wide * kLanes;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < width; i += kLanes, panels += kLanes) {
        const int64_t column = first + i, count = columns - column < kLanes ? columns - column : kLanes;
        if constexpr (kTransposed) {
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            panels[lane] = lane < count ? matrix[(column + lane) * rows + row] : 0;
          }
        } else {
          const float* at = matrix + row * columns + column;
          store(panels, count == kLanes ? load(at) : load_first(at, count));
        }
      }
    }
    first += width;
    vectors -= wide;
  }
}

// The block of kR rows and kC vectors of columns of a product. Its last vector is stored as far as `last` lanes.
template <bool kTransposed, int kR, int kC>
GRAPHOPT_INLINE void multiply_block(const float* left, int64_t left_width, const float* panel, int64_t depth, float* to,
                                    int64_t to_width, int64_t last) {
  F sums[kR][kC];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) sums[r][c] = F{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    F columns[kC];
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) columns[c] = load(panel + (k * kC + c) * kLanes);
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
void multiply_panel(const float* left, int64_t left_width, const float* panel, int64_t rows, int64_t depth, float* to,
                    int64_t to_width, int64_t last) {
  // As many sums as there are registers for, beside a row of the panel.
  constexpr int kRows = kC == kColumns ? 6 : 8;
  for (int64_t blocks = parts(rows, kRows); blocks > 0; --blocks) {
    const int64_t high = parts(rows, blocks);
    switch (high) {
#define GRAPHOPT_ROWS(r) \
  case r: multiply_block<kTransposed, r <= kRows ? r : 1, kC>(left, left_width, panel, depth, to, to_width, last); break;
      GRAPHOPT_ROWS(1)
      GRAPHOPT_ROWS(2)
      GRAPHOPT_ROWS(3)
      GRAPHOPT_ROWS(4)
      GRAPHOPT_ROWS(5)
      GRAPHOPT_ROWS(6)
      GRAPHOPT_ROWS(7)
      GRAPHOPT_ROWS(8)
#undef GRAPHOPT_ROWS
    }
    left += high * (kTransposed ? 1 : left_width);
    to += high * to_width;
    rows -= high;
  }
}

// to = left · right, or leftᵀ · right where kTransposed. left is rows × depth (transposed: depth × rows) in rows of
// `left_width` numbers; right is depth × columns in panels; to is rows × columns, in rows of `to_width` numbers, or, where
// kToPanels, the rows from `to_row` on of panels of `to_width` rows.
template <bool kTransposed, bool kToPanels>
GRAPHOPT_INLINE void multiply(const float* left, int64_t left_width, const float* right, int64_t rows, int64_t depth,
                              int64_t columns, float* to, int64_t to_width, int64_t to_row = 0) {
  for (int64_t vectors = parts(columns, kLanes); vectors > 0;) {
    const int64_t wide = panel(vectors), width = wide * kLanes;
    const int64_t last = !kToPanels && columns < width ? columns - (wide - 1) * kLanes : kLanes;
    float* at = kToPanels ? to + to_row * width : to;
    const int64_t row = kToPanels ? width : to_width;
    switch (wide) {
      case 1: multiply_panel<kTransposed, 1>(left, left_width, right, rows, depth, at, row, last); break;
      case 2: multiply_panel<kTransposed, 2>(left, left_width, right, rows, depth, at, row, last); break;
#if defined(__AVX512F__) || defined(__aarch64__)
      case 3: multiply_panel<kTransposed, 3>(left, left_width, right, rows, depth, at, row, last); break;
      case 4: multiply_panel<kTransposed, 4>(left, left_width, right, rows, depth, at, row, last); break;
#endif
    }
    right += depth * width;
    to += kToPanels ? to_width * width : width;
    columns -= width;
    vectors -= wide;
  }
}

}  // namespace graphopt::GRAPHOPT_ISA
