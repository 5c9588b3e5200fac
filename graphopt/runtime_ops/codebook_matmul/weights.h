// The weights of a node of CodebookMatMul: checked, and what the inner loops want to know of them.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"
#include "operator.h"
#include "sizes.h"

namespace graphopt::codebook_matmul {

class Weights {
 public:
  // Checks sizes and contents of a node's inputs, of which x isn't looked at. Throws an Error for what is wrong.
  Weights(const Attributes& attributes, const std::vector<Tensor>& inputs);

  const Sizes& sizes() const { return sizes_; }
  int64_t rows() const { return sizes_.rows; }
  int64_t columns() const { return sizes_.columns; }
  // In the type of x, or nullptr.
  const void* bias() const { return bias_; }
  // Rows that belong to a strip of tiles; strips that begin at a multiple of it can be written on their own.
  int64_t tile_rows() const { return sizes_.tile_rows; }
  // Whether the weights are narrow (see kernels.h): then x is wanted interleaved.
  bool narrow() const { return narrow_; }
  // The columns that are written together: a multiple of `step`, of at most `padded` columns.
  int64_t step() const { return step_; }
  int64_t padded() const { return padded_; }

  // Of narrow weights: y[i] = the product of row first + i with interleaved x, without outliers.
  void dot(int64_t first, int64_t count, const float* x, float* y) const;
  // Whether x may come as a ByteRow, and the product with one.
  bool takes_bytes() const { return !byte_tables_.empty(); }
  void dot(int64_t first, int64_t count, const ByteRow& x, float* y) const;
  // Whether whole tiles can be multiplied as vectors, and the product with x in its natural order; `first` is a
  // multiple of tile_rows(), and `count` is, or ends with the last row.
  bool takes_tiles() const;
  void tiles_dot(int64_t first, int64_t count, const float* x, float* y) const;
  // Rows first to first + count, columns begin to end of them (multiples of step), in x's order; columns beyond the
  // last are anything finite where x is 0.
  void write(int64_t first, int64_t count, int64_t begin, int64_t end, float* to) const;
  // The product of the outliers of row `row` with x in its natural order.
  float outlier_dot(int64_t row, const float* x) const;

 private:
  void check_contents() const;
  void prepare_narrow();
  void prepare_bytes();
  Tiles tiles(int64_t row) const;
  void write_tiles(int64_t first, int64_t count, int64_t begin, int64_t end, float* to) const;
  void add_outliers(int64_t row, int64_t begin, int64_t end, float* to) const;
  // The narrow weights that hold `row`, and the rows from it on that lie in them too.
  const Narrow& part(int64_t row, int64_t* within, int64_t* left) const;

  Attributes attributes_;
  Sizes sizes_;
  bool narrow_;
  int64_t step_, padded_;

  const uint8_t* indices_;
  const float* codebooks_;
  const void* scales_;
  const uint8_t* selectors_;
  const int32_t* outlier_rows_;
  const int32_t* outlier_columns_;
  const float* outlier_values_;
  const void* bias_;

  std::vector<float> tables_;
  std::vector<ByteTable> byte_tables_;
  bool one_byte_ = true;
  std::vector<int32_t> first_group_, lane_group_;
  // The last rows, copied to where there is memory behind them.
  std::vector<uint8_t> last_indices_, last_scales_;
  int64_t rows_in_place_ = 0;
  Narrow in_place_{}, copied_{};
};

}  // namespace graphopt::codebook_matmul
