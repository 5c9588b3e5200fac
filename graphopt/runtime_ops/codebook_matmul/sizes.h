// The attributes of a node of CodebookMatMul and the sizes of its inputs, checked.
#pragma once

#include <vector>

#include "operator.h"

namespace graphopt::codebook_matmul {

// The inputs of a node in their order.
enum Input {
  kX,
  kIndices,
  kCodebooks,
  kScales,
  kSelectors,
  kOutlierRows,
  kOutlierColumns,
  kOutlierValues,
  kBias,
  kInputs
};

struct Attributes {
  // Throws an Error for what is out of range.
  explicit Attributes(const Node& node);

  int64_t columns;
  int64_t bits;
  int64_t group_size;
  int64_t activation_block;
};

struct Sizes {
  // Of the inputs of a node but x. Throws an Error where they don't fit one another.
  Sizes(const Attributes& attributes, const std::vector<Tensor>& inputs);

  int64_t rows, columns;  // of the weights
  int64_t groups;         // of a row, and the columns of one: no more than there are, but for the last tile's
  int64_t group_size;
  int64_t books, entries, tile_rows, tile_columns;  // the sizes of the codebooks
  int64_t index_rows, per_row, row_bytes;           // rows of indices, and of each the indices and the bytes
  int64_t outliers;
  // Which of the inputs that may be empty aren't.
  bool selected, has_outliers, has_bias;
  bool half_scales;

  // Whether each row of tiles has a codebook of its own.
  bool book_of_row() const { return books > 1 && !selected; }
};

// How many parts of a size hold `count`.
inline int64_t up(int64_t count, int64_t size) { return count / size + (count % size != 0); }

// The shape of the product with x. Throws an Error where the columns of x aren't those of the weights.
Shape product_shape(const Sizes& sizes, const Tensor& x);

// How many rows of its last dimension a tensor has.
int64_t rows_of(const Shape& shape);

// The operator with a kernel of an execution provider, nullptr: of the CPU.
Operator described(std::unique_ptr<Kernel> (*make)(const Node&), const char* provider);

}  // namespace graphopt::codebook_matmul
