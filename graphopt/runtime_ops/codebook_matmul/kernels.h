// Inner loops of CodebookMatMul.
//
// "Narrow" weights are indices of 2, 3 or 4 bits of single weights, whose codebook fits a register or two. They are
// read in blocks of `block` columns, a multiple of 8 that depends on the instructions: lane j of a vector takes the
// indices of columns 8j to 8j + 7, first all columns 8j, then all 8j + 1, and so on. What is multiplied with them lies
// in the same order ("interleaved"), filled up with zeros to whole blocks.
#pragma once

#include <cstdint>

#include "isa.h"

namespace graphopt::codebook_matmul {

constexpr int kTable = 16;  // numbers of a narrow codebook; one of fewer bits is repeated

// A narrow codebook in whole numbers: number i is base + step · (256 · high[i] + low[i]), or base + step · high[i]
// where one byte is enough. The first of two tables is for the even columns, the second for the odd ones. With indices
// of 2 bits, both take the two indices of such a pair together.
struct ByteTable {
  uint8_t high[2][kTable];
  uint8_t low[2][kTable];
  float step;
  float base;
};

// A row of x rounded to 8 bits, in blocks as narrow weights: the even columns of a block, then the odd ones; and for
// each lane (8 columns) what a unit is worth, and the sum of its numbers.
struct ByteRow {
  const int8_t* numbers;
  const float* steps;
  const float* sums;
};

// Rows of narrow weights. Whole vectors are read: of the indices to the end of the last block of a row, and `lanes`
// scales from the first one of each block on, whatever rows these belong to, so there must be memory there.
struct Narrow {
  const uint8_t* indices;  // row by row
  int64_t row_bytes;
  const void* scales;  // [rows, groups]
  bool half_scales;
  int64_t groups;
  const float* tables;           // [codebooks, kTable]
  const ByteTable* byte_tables;  // [codebooks]
  bool one_byte;
  const uint8_t* selectors;    // [rows, groups], or nullptr; then blocks lie within groups
  bool table_of_row;           // without selectors: a table for each row, or one for all
  int64_t blocks;              // of a row
  const int32_t* first_group;  // [blocks], the group of a block's first column
  const int32_t* lane_group;   // [blocks, lanes], that of each lane's columns, less the block's first
};

// One row of weights in tiles of any size, or all the rows of one row of tiles.
struct Tiles {
  const float* numbers;  // of the first entry, where the row begins in it
  int64_t book_size;     // numbers from one codebook to the next,
  int64_t entry_size;    // and from one entry to the next
  int64_t width;         // numbers of an entry's row
  int64_t group;         // tiles of a group
  const uint8_t* books;  // the codebook of each group, or nullptr: the first
  const void* scales;    // of each group
  bool half_scales;
  int64_t groups;  // scales from one row to the next
};

struct Kernels {
  int64_t lanes;
  int64_t block;  // columns
  bool gathers;   // whether tiles_dot takes rows whose entries are 1 or 2 numbers wide

  // Rounds each `size` of `columns` numbers to 8 bits: x becomes whole numbers q times the step of their block, which
  // comes out too, and q where it is asked for. A block with a number that isn't finite has NaN as its step.
  void (*round_blocks)(float* x, int64_t columns, int64_t size, float* steps, int8_t* q);
  // A ByteRow of what round_blocks gave, of `columns` filled up to `blocks` with zeros; size is a multiple of 8.
  void (*arrange)(const int8_t* q, const float* block_steps, int64_t columns, int64_t size, int64_t blocks,
                  int8_t* numbers, float* steps, float* sums);
  // Brings `columns` numbers into the interleaved order.
  void (*interleave)(const float* from, int64_t columns, float* to);
  // y[i] = the product of row first + i and interleaved x, for i < count.
  void (*narrow_dot)(const Narrow& weights, int bits, int64_t first, int64_t count, const float* x, float* y);
  // The same with x rounded to 8 bits; nullptr where the instructions for it are missing.
  void (*byte_dot)(const Narrow& weights, int bits, int64_t first, int64_t count, const ByteRow& x, float* y);
  // Blocks first_block to end_block of the weights of row `row`, in the interleaved order.
  void (*narrow_write)(const Narrow& weights, int bits, int64_t row, int64_t first_block, int64_t end_block, float* to);
  // Indices first to first + count of a row.
  void (*unpack)(const uint8_t* row, int64_t row_bytes, int bits, int64_t first, int64_t count, uint16_t* to);
  // The numbers of a row's tiles first to first + count, of which index has the indices.
  void (*spread)(const Tiles& tiles, const uint16_t* index, int64_t first, int64_t count, float* to);
  // The products with x of the rows of a row of tiles, whose indices are all there: of a single row whose entries are 4
  // or 8 numbers wide, or of the first `rows` of 4 or 8 rows whose entries are 1 wide.
  void (*tiles_dot)(const Tiles& tiles, const uint16_t* index, int64_t count, const float* x, int64_t rows, float* y);
  // y[m, n] += the sum of x[m, k] · w[n, k] over k < columns, a multiple of lanes.
  void (*multiply)(const float* x, int64_t x_stride, int64_t m, const float* w, int64_t w_stride, int64_t n,
                   int64_t columns, float* y, int64_t y_stride);
};

GRAPHOPT_ISA_VARIANTS(Kernels)

}  // namespace graphopt::codebook_matmul
