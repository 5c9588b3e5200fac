// CUDA launchers of CodebookMatMul. All pointers are of the device.
#pragma once

#include "launcher.h"

// The weights of a node, see the operator's description. What the device finds out of range in them (a selector, a row
// of outliers, a column of one) makes the numbers that it goes into NaN; nothing else is read in its place.
struct GraphoptCodebookWeights {
  const uint8_t* indices;          // [index rows, row_bytes]
  const float* codebooks;          // [books, 2^bits, tile_rows, tile_columns]
  const void* scales;              // [rows, groups], of float or of half
  const uint8_t* selectors;        // [index rows, groups], or nullptr
  const int32_t* outlier_rows;     // [rows + 1], or nullptr
  const int32_t* outlier_columns;  // [outliers]
  const float* outlier_values;     // [outliers]
  const void* bias;                // [rows], of x's type, or nullptr
  int64_t rows, columns;           // N and K
  int64_t group_size;              // columns of a group
  int64_t books;
  int64_t outliers;
  int32_t bits, tile_rows, tile_columns, half_scales;
};

// y [m, rows] = x [m, columns] times the transpose of the weights; each `activation_block` columns of x are rounded to
// 8 bits first, unless it is 0. The sizes must be those of the weights' tensors.
GRAPHOPT_LAUNCHER int graphopt_cuda_codebook_matmul_float(const void* x, const GraphoptCodebookWeights* weights,
                                                          void* y, int64_t m, int64_t activation_block, void* stream);
GRAPHOPT_LAUNCHER int graphopt_cuda_codebook_matmul_half(const void* x, const GraphoptCodebookWeights* weights, void* y,
                                                         int64_t m, int64_t activation_block, void* stream);
