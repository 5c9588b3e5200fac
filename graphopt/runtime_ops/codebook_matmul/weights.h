// The weights of a node of CodebookMatMul: checked, and what the inner loops want to know of them.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"
#include "operator.h"

namespace graphopt::codebook_matmul {

// The inputs of a node in their order.
enum Input { kX, kIndices, kCodebooks, kScales, kSelectors, kOutlierRows, kOutlierColumns, kOutlierValues, kBias, kInputs };

struct Attributes {
  int64_t bits;
  int64_t group_size;
  int64_t activation_block;
};

class Weights {
 public:
  // Checks sizes and contents; `inputs` are those of the node, of which x only tells the number of columns.
  // Throws an Error for what is wrong.
  Weights(const Attributes& attributes, const std::vector<Tensor>& inputs);

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  // In the type of x, or nullptr.
  const void* bias() const { return bias_; }
  // Rows that belong to a strip of tiles; strips that begin at a multiple of it can be written on their own.
  int64_t tile_rows() const { return tile_rows_; }
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
  // Rows first to first + count, columns begin to end of them (multiples of step), in x's order; columns beyond the last
  // are anything finite where x is 0.
  void write(int64_t first, int64_t count, int64_t begin, int64_t end, float* to) const;
  // The product of the outliers of row `row` with x in its natural order.
  float outlier_dot(int64_t row, const float* x) const;

 private:
  void check_sizes(const std::vector<Tensor>& inputs);
  void check_contents() const;
  void prepare_narrow();
  void prepare_bytes();
  void write_tiles(int64_t first, int64_t count, int64_t begin, int64_t end, float* to) const;
  void add_outliers(int64_t row, int64_t begin, int64_t end, float* to) const;
  bool table_of_row() const { return books_ > 1 && selectors_ == nullptr; }
  // The narrow weights that hold `row`, and the rows from it on that lie in them too.
  const Narrow& part(int64_t row, int64_t* within, int64_t* left) const;

  Attributes attributes_;
  int64_t rows_ = 0, columns_ = 0, groups_ = 0;
  int64_t books_ = 0, entries_ = 0, tile_rows_ = 0, tile_columns_ = 0;
  int64_t index_rows_ = 0, per_row_ = 0, row_bytes_ = 0, outliers_ = 0;
  bool narrow_ = false, half_scales_ = false;
  int64_t step_ = 0, padded_ = 0;

  const uint8_t* indices_ = nullptr;
  const float* codebooks_ = nullptr;
  const void* scales_ = nullptr;
  const uint8_t* selectors_ = nullptr;
  const int32_t* outlier_rows_ = nullptr;
  const int32_t* outlier_columns_ = nullptr;
  const float* outlier_values_ = nullptr;
  const void* bias_ = nullptr;

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
