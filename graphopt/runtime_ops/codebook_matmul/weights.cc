#include "weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>


namespace graphopt::codebook_matmul {
namespace {

using Long = long long;

constexpr int64_t kMost = int64_t(1) << 40;  // of any size that is computed: products of two still fit

int64_t up(int64_t count, int64_t size) { return count / size + (count % size != 0); }

void require_shape(const char* what, const Tensor& tensor, const Shape& wanted) {
  GRAPHOPT_REQUIRE(tensor.shape == wanted, "%s are %s, and must be %s", what, text(tensor.shape).c_str(),
                   text(wanted).c_str());
}

}  // namespace

Weights::Weights(const Attributes& attributes, const std::vector<Tensor>& inputs) : attributes_(attributes) {
  check_sizes(inputs);
  check_contents();
  if (narrow_) prepare_narrow();
}

void Weights::check_sizes(const std::vector<Tensor>& inputs) {
  const Tensor &x = inputs[kX], &codebooks = inputs[kCodebooks], &scales = inputs[kScales];
  const int64_t bits = attributes_.bits, group_size = attributes_.group_size;
  GRAPHOPT_REQUIRE(!x.shape.empty(), "x is a number, and must have columns");
  columns_ = x.dim(-1);
  GRAPHOPT_REQUIRE(codebooks.shape.size() == 4 && codebooks.size() > 0,
                   "the codebooks are %s, and must be [codebooks, entries, rows, columns]", text(codebooks.shape).c_str());
  books_ = codebooks.dim(0), entries_ = codebooks.dim(1), tile_rows_ = codebooks.dim(2), tile_columns_ = codebooks.dim(3);
  GRAPHOPT_REQUIRE(entries_ == int64_t(1) << bits, "the codebooks have %lld entries, and indices of %lld bits need %lld",
                   Long(entries_), Long(bits), Long(1) << bits);
  GRAPHOPT_REQUIRE(group_size % tile_columns_ == 0, "group_size %lld isn't a multiple of the tiles' %lld columns",
                   Long(group_size), Long(tile_columns_));
  GRAPHOPT_REQUIRE(scales.shape.size() == 2, "the scales are %s, and must be [rows, groups]", text(scales.shape).c_str());
  rows_ = scales.dim(0), groups_ = up(columns_, group_size);
  GRAPHOPT_REQUIRE(rows_ < kMost && columns_ < kMost, "%lld rows of %lld columns are too many", Long(rows_), Long(columns_));
  require_shape("the scales", scales, {rows_, groups_});
  index_rows_ = up(rows_, tile_rows_), per_row_ = up(columns_, tile_columns_), row_bytes_ = up(per_row_ * bits, 8);
  require_shape("the indices", inputs[kIndices], {index_rows_, row_bytes_});
  if (inputs[kSelectors].size() > 0) {
    require_shape("the selectors", inputs[kSelectors], {index_rows_, groups_});
    selectors_ = inputs[kSelectors].as<uint8_t>();
  } else {
    GRAPHOPT_REQUIRE(books_ == 1 || books_ == index_rows_,
                     "without selectors there must be one codebook, or one for each of %lld rows of tiles, not %lld",
                     Long(index_rows_), Long(books_));
  }
  outliers_ = inputs[kOutlierValues].size();
  GRAPHOPT_REQUIRE(outliers_ < INT32_MAX, "%lld outliers are too many", Long(outliers_));
  require_shape("the outlier values", inputs[kOutlierValues], {outliers_});
  require_shape("the outlier columns", inputs[kOutlierColumns], {outliers_});
  if (outliers_ > 0 || inputs[kOutlierRows].size() > 0) {
    require_shape("the outlier rows", inputs[kOutlierRows], {rows_ + 1});
    outlier_rows_ = inputs[kOutlierRows].as<int32_t>();
  }
  if (inputs[kBias].size() > 0) {
    require_shape("the bias", inputs[kBias], {rows_});
    bias_ = inputs[kBias].data;
  }

  indices_ = inputs[kIndices].as<uint8_t>();
  codebooks_ = codebooks.as<float>();
  scales_ = scales.data;
  half_scales_ = scales.type == ElementType::float16;
  outlier_columns_ = inputs[kOutlierColumns].as<int32_t>();
  outlier_values_ = inputs[kOutlierValues].as<float>();
  // Groups end between the lanes of a block, and where codebooks are selected, between blocks.
  narrow_ = bits >= 2 && bits <= 4 && tile_rows_ == 1 && tile_columns_ == 1 &&
            (groups_ <= 1 || group_size % (selectors_ != nullptr ? kernels().block : 8) == 0);
  step_ = narrow_ ? kernels().block : tile_columns_ * kernels().lanes;
  padded_ = up(columns_, step_) * step_;
  // A group that ends far beyond the last column is as good as one that ends behind it.
  attributes_.group_size = std::min(group_size, std::max<int64_t>(per_row_, 1) * tile_columns_);
}

void Weights::check_contents() const {
  for (int64_t i = 0; i < books_ * entries_ * tile_rows_ * tile_columns_; ++i) {
    GRAPHOPT_REQUIRE(std::isfinite(codebooks_[i]), "number %lld of the codebooks isn't finite", Long(i));
  }
  for (int64_t i = 0; selectors_ != nullptr && i < index_rows_ * groups_; ++i) {
    GRAPHOPT_REQUIRE(selectors_[i] < books_, "selector %lld is %d, and there are %lld codebooks", Long(i),
                     int(selectors_[i]), Long(books_));
  }
  if (outlier_rows_ == nullptr) return;
  GRAPHOPT_REQUIRE(outlier_rows_[0] == 0 && outlier_rows_[rows_] == outliers_,
                   "the outlier rows go from %d to %d, and must go from 0 to %lld", outlier_rows_[0], outlier_rows_[rows_],
                   Long(outliers_));
  for (int64_t row = 0; row < rows_; ++row) {
    GRAPHOPT_REQUIRE(outlier_rows_[row] <= outlier_rows_[row + 1], "the outlier rows decrease after row %lld", Long(row));
  }
  for (int64_t i = 0; i < outliers_; ++i) {
    GRAPHOPT_REQUIRE(outlier_columns_[i] >= 0 && outlier_columns_[i] < columns_,
                     "outlier %lld is in column %d of %lld", Long(i), outlier_columns_[i], Long(columns_));
  }
}

void Weights::prepare_narrow() {
  const int64_t lanes = kernels().lanes, block = kernels().block, blocks = padded_ / block;
  tables_.resize(size_t(books_ * kTable));
  for (int64_t i = 0; i < books_ * kTable; ++i) tables_[i] = codebooks_[i / kTable * entries_ + i % entries_];
  first_group_.resize(size_t(blocks));
  lane_group_.resize(size_t(blocks * lanes));
  for (int64_t lane = 0; lane < blocks * lanes; ++lane) {
    // The lanes beyond the last column take some scale of the row's: what they multiply is 0.
    const int64_t group = std::min(lane * 8 / attributes_.group_size, groups_ - 1);
    if (lane % lanes == 0) first_group_[lane / lanes] = int32_t(group);
    lane_group_[lane] = int32_t(group) - first_group_[lane / lanes];
  }
  if (kernels().byte_dot != nullptr && attributes_.activation_block > 0 && attributes_.activation_block % 8 == 0) {
    prepare_bytes();
  }
  in_place_ = {indices_,  row_bytes_, scales_, half_scales_,       groups_,           tables_.data(), byte_tables_.data(),
               one_byte_, selectors_, table_of_row(), blocks, first_group_.data(), lane_group_.data()};
  // Whole vectors are read: rows from which that would go beyond the end are copied.
  const int64_t row_read = blocks * lanes * attributes_.bits;
  const int64_t scales_read = blocks > 0 ? first_group_.back() + lanes : 0;
  rows_in_place_ = rows_;
  while (rows_in_place_ > 0 && ((rows_in_place_ - 1) * row_bytes_ + row_read > rows_ * row_bytes_ ||
                                (rows_in_place_ - 1) * groups_ + scales_read > rows_ * groups_)) {
    --rows_in_place_;
  }
  const int64_t last = rows_ - rows_in_place_, width = half_scales_ ? 2 : 4;
  if (last == 0) return;
  last_indices_.resize(size_t(last * row_bytes_ + row_read));
  last_scales_.resize(size_t((last * groups_ + scales_read) * width));
  std::memcpy(last_indices_.data(), indices_ + rows_in_place_ * row_bytes_, size_t(last * row_bytes_));
  std::memcpy(last_scales_.data(), static_cast<const uint8_t*>(scales_) + rows_in_place_ * groups_ * width,
              size_t(last * groups_ * width));
  copied_ = in_place_;
  copied_.indices = last_indices_.data();
  copied_.scales = last_scales_.data();
  if (selectors_ != nullptr) copied_.selectors = selectors_ + rows_in_place_ * groups_;
  if (table_of_row()) {
    copied_.tables += rows_in_place_ * kTable;
    if (takes_bytes()) copied_.byte_tables += rows_in_place_;
  }
}

void Weights::prepare_bytes() {
  std::vector<double> steps(static_cast<size_t>(books_)), bases(steps.size());
  for (int64_t book = 0; book < books_; ++book) {
    const float* from = codebooks_ + book * entries_;
    const double least = *std::min_element(from, from + entries_), most = *std::max_element(from, from + entries_);
    const double size = std::max(-least, most);
    // Far from where products of floats have their precision, they are left to those.
    if (size > 1e30 || (size < 1e-30 && size != 0)) return;
    // A codebook like those of FP4, multiples of one step, needs a byte only.
    double exact = 0;
    for (int units = 1; units <= 127 && exact == 0; ++units) {
      const double step = size / units;
      const bool fits = std::all_of(from, from + entries_, [&](float number) {
        return std::fabs(number - std::nearbyint(number / step) * step) <= 1e-7 * size;
      });
      if (fits) exact = step;
    }
    one_byte_ = one_byte_ && (exact != 0 || size == 0);
    steps[book] = exact, bases[book] = -128 * exact;
  }
  byte_tables_.resize(size_t(books_));
  for (int64_t book = 0; book < books_; ++book) {
    const float* from = codebooks_ + book * entries_;
    if (!one_byte_) {
      bases[book] = *std::min_element(from, from + entries_);
      steps[book] = (*std::max_element(from, from + entries_) - bases[book]) / 65535;
    }
    ByteTable& table = byte_tables_[book];
    table.step = float(steps[book]), table.base = float(bases[book]);
    for (int64_t i = 0; i < kTable; ++i) {
      for (int odd = 0; odd < 2; ++odd) {
        const int64_t index = attributes_.bits == 2 ? (odd ? i / 4 : i % 4) : i % entries_;
        const double number = from[index];
        const int units = steps[book] == 0 ? 0 : int(std::nearbyint((number - bases[book]) / steps[book]));
        table.high[odd][i] = uint8_t(one_byte_ ? units : units >> 8);
        table.low[odd][i] = uint8_t(one_byte_ ? 0 : units & 255);
      }
    }
  }
}

const Narrow& Weights::part(int64_t row, int64_t* within, int64_t* left) const {
  const bool copied = row >= rows_in_place_;
  *within = copied ? row - rows_in_place_ : row;
  *left = (copied ? rows_ : rows_in_place_) - row;
  return copied ? copied_ : in_place_;
}

void Weights::dot(int64_t first, int64_t count, const float* x, float* y) const {
  while (count > 0) {
    int64_t within, left;
    const Narrow& narrow = part(first, &within, &left);
    const int64_t here = std::min(count, left);
    kernels().narrow_dot(narrow, int(attributes_.bits), within, here, x, y);
    first += here, y += here, count -= here;
  }
}

void Weights::dot(int64_t first, int64_t count, const ByteRow& x, float* y) const {
  while (count > 0) {
    int64_t within, left;
    const Narrow& narrow = part(first, &within, &left);
    const int64_t here = std::min(count, left);
    kernels().byte_dot(narrow, int(attributes_.bits), within, here, x, y);
    first += here, y += here, count -= here;
  }
}

void Weights::write(int64_t first, int64_t count, int64_t begin, int64_t end, float* to) const {
  if (narrow_) {
    const int64_t block = kernels().block;
    for (int64_t row = 0; row < count; ++row) {
      int64_t within, left;
      const Narrow& narrow = part(first + row, &within, &left);
      kernels().narrow_write(narrow, int(attributes_.bits), within, begin / block, end / block, to + row * (end - begin));
    }
  } else {
    write_tiles(first, count, begin, end, to);
  }
  for (int64_t row = 0; outliers_ > 0 && row < count; ++row) {
    add_outliers(first + row, begin, end, to + row * (end - begin));
  }
}

void Weights::write_tiles(int64_t first, int64_t count, int64_t begin, int64_t end, float* to) const {
  const int64_t width = end - begin, entry = tile_rows_ * tile_columns_, book = entries_ * entry;
  const int64_t first_tile = begin / tile_columns_, end_tile = std::min(end / tile_columns_, per_row_);
  const int64_t tiles = std::max<int64_t>(0, end_tile - first_tile);
  thread_local std::vector<uint16_t> indices;
  indices.resize(size_t(tiles));
  uint16_t* const index = indices.data();
  for (int64_t row = first; row < first + count; ++row) {
    const int64_t index_row = row / tile_rows_, within = row % tile_rows_;
    if (within == 0) {
      kernels().unpack(indices_ + index_row * row_bytes_, row_bytes_, int(attributes_.bits), first_tile, tiles, index);
    }
    const float* numbers = codebooks_ + within * tile_columns_ + (table_of_row() ? index_row * book : 0);
    const Tiles row_of{numbers, book, entry, tile_columns_, attributes_.group_size / tile_columns_,
                       selectors_ != nullptr ? selectors_ + index_row * groups_ : nullptr,
                       static_cast<const uint8_t*>(scales_) + row * groups_ * (half_scales_ ? 2 : 4), half_scales_};
    float* const here = to + (row - first) * width;
    kernels().spread(row_of, index, first_tile, tiles, here);
    std::fill(here + tiles * tile_columns_, here + width, 0.0f);
  }
}

void Weights::add_outliers(int64_t row, int64_t begin, int64_t end, float* to) const {
  const int64_t lanes = kernels().lanes, block = kernels().block;
  for (int32_t i = outlier_rows_[row]; i < outlier_rows_[row + 1]; ++i) {
    const int64_t column = outlier_columns_[i];
    if (column < begin || column >= end) continue;
    int64_t at = column - begin;
    if (narrow_) at = at / block * block + at % 8 * lanes + at % block / 8;
    to[at] += outlier_values_[i];
  }
}

float Weights::outlier_dot(int64_t row, const float* x) const {
  float total = 0;
  if (outliers_ == 0) return total;
  for (int32_t i = outlier_rows_[row]; i < outlier_rows_[row + 1]; ++i) total += outlier_values_[i] * x[outlier_columns_[i]];
  return total;
}

}  // namespace graphopt::codebook_matmul
