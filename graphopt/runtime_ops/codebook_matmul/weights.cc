#include "weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace graphopt::codebook_matmul {
using Long = long long;

Weights::Weights(const Attributes& attributes, const std::vector<Tensor>& inputs)
    : attributes_(attributes),
      sizes_(attributes, inputs),
      indices_(inputs[kIndices].as<uint8_t>()),
      codebooks_(inputs[kCodebooks].as<float>()),
      scales_(inputs[kScales].data),
      selectors_(sizes_.selected ? inputs[kSelectors].as<uint8_t>() : nullptr),
      outlier_rows_(sizes_.has_outliers ? inputs[kOutlierRows].as<int32_t>() : nullptr),
      outlier_columns_(inputs[kOutlierColumns].as<int32_t>()),
      outlier_values_(inputs[kOutlierValues].as<float>()),
      bias_(sizes_.has_bias ? inputs[kBias].data : nullptr) {
  check_contents();
  // Groups end between the lanes of a block, and where codebooks are selected, between blocks.
  const int64_t between = sizes_.selected ? kernels().block : 8;
  narrow_ = attributes.bits >= 2 && attributes.bits <= 4 && sizes_.tile_rows == 1 && sizes_.tile_columns == 1 &&
            (sizes_.groups <= 1 || sizes_.group_size % between == 0);
  step_ = narrow_ ? kernels().block : sizes_.tile_columns * kernels().lanes;
  padded_ = up(sizes_.columns, step_) * step_;
  if (narrow_) prepare_narrow();
}

void Weights::check_contents() const {
  for (int64_t i = 0; i < sizes_.books * sizes_.entries * sizes_.tile_rows * sizes_.tile_columns; ++i) {
    GRAPHOPT_REQUIRE(std::isfinite(codebooks_[i]), "number %lld of the codebooks isn't finite", Long(i));
  }
  for (int64_t i = 0; selectors_ != nullptr && i < sizes_.index_rows * sizes_.groups; ++i) {
    GRAPHOPT_REQUIRE(selectors_[i] < sizes_.books, "selector %lld is %d, and there are %lld codebooks", Long(i),
                     int(selectors_[i]), Long(sizes_.books));
  }
  if (outlier_rows_ == nullptr) return;
  GRAPHOPT_REQUIRE(outlier_rows_[0] == 0 && outlier_rows_[sizes_.rows] == sizes_.outliers,
                   "the outlier rows go from %d to %d, and must go from 0 to %lld", outlier_rows_[0],
                   outlier_rows_[sizes_.rows], Long(sizes_.outliers));
  for (int64_t row = 0; row < sizes_.rows; ++row) {
    GRAPHOPT_REQUIRE(outlier_rows_[row] <= outlier_rows_[row + 1], "the outlier rows decrease after row %lld",
                     Long(row));
  }
  for (int64_t i = 0; i < sizes_.outliers; ++i) {
    GRAPHOPT_REQUIRE(outlier_columns_[i] >= 0 && outlier_columns_[i] < sizes_.columns,
                     "outlier %lld is in column %d of %lld", Long(i), outlier_columns_[i], Long(sizes_.columns));
  }
}

void Weights::prepare_narrow() {
  const int64_t lanes = kernels().lanes, block = kernels().block, blocks = padded_ / block;
  tables_.resize(size_t(sizes_.books * kTable));
  for (int64_t i = 0; i < sizes_.books * kTable; ++i)
    tables_[i] = codebooks_[i / kTable * sizes_.entries + i % sizes_.entries];
  first_group_.resize(size_t(blocks));
  lane_group_.resize(size_t(blocks * lanes));
  for (int64_t lane = 0; lane < blocks * lanes; ++lane) {
    // The lanes beyond the last column take some scale of the row's: what they multiply is 0.
    const int64_t group = std::min(lane * 8 / sizes_.group_size, sizes_.groups - 1);
    if (lane % lanes == 0) first_group_[lane / lanes] = int32_t(group);
    lane_group_[lane] = int32_t(group) - first_group_[lane / lanes];
  }
  if (kernels().byte_dot != nullptr && attributes_.activation_block > 0 && attributes_.activation_block % 8 == 0) {
    prepare_bytes();
  }
  in_place_ = {indices_,       sizes_.row_bytes,    scales_,           sizes_.half_scales, sizes_.groups,
               tables_.data(), byte_tables_.data(), one_byte_,         selectors_,         sizes_.book_of_row(),
               blocks,         first_group_.data(), lane_group_.data()};
  // Whole vectors are read: rows from which that would go beyond the end are copied.
  const int64_t row_read = blocks * lanes * attributes_.bits;
  const int64_t scales_read = blocks > 0 ? first_group_.back() + lanes : 0;
  rows_in_place_ = sizes_.rows;
  while (rows_in_place_ > 0 && ((rows_in_place_ - 1) * sizes_.row_bytes + row_read > sizes_.rows * sizes_.row_bytes ||
                                (rows_in_place_ - 1) * sizes_.groups + scales_read > sizes_.rows * sizes_.groups)) {
    --rows_in_place_;
  }
  const int64_t last = sizes_.rows - rows_in_place_, width = sizes_.half_scales ? 2 : 4;
  if (last == 0) return;
  last_indices_.resize(size_t(last * sizes_.row_bytes + row_read));
  last_scales_.resize(size_t((last * sizes_.groups + scales_read) * width));
  std::memcpy(last_indices_.data(), indices_ + rows_in_place_ * sizes_.row_bytes, size_t(last * sizes_.row_bytes));
  std::memcpy(last_scales_.data(), static_cast<const uint8_t*>(scales_) + rows_in_place_ * sizes_.groups * width,
              size_t(last * sizes_.groups * width));
  copied_ = in_place_;
  copied_.indices = last_indices_.data();
  copied_.scales = last_scales_.data();
  if (selectors_ != nullptr) copied_.selectors = selectors_ + rows_in_place_ * sizes_.groups;
  if (sizes_.book_of_row()) {
    copied_.tables += rows_in_place_ * kTable;
    if (takes_bytes()) copied_.byte_tables += rows_in_place_;
  }
}

void Weights::prepare_bytes() {
  std::vector<double> steps(static_cast<size_t>(sizes_.books)), bases(steps.size());
  for (int64_t book = 0; book < sizes_.books; ++book) {
    const float* from = codebooks_ + book * sizes_.entries;
    const double least = *std::min_element(from, from + sizes_.entries),
                 most = *std::max_element(from, from + sizes_.entries);
    const double size = std::max(-least, most);
    // Far from where products of floats have their precision, they are left to those.
    if (size > 1e30 || (size < 1e-30 && size != 0)) return;
    // A codebook like those of FP4, multiples of one step, needs a byte only.
    double exact = 0;
    for (int units = 1; units <= 127 && exact == 0; ++units) {
      const double step = size / units;
      const bool fits = std::all_of(from, from + sizes_.entries, [&](float number) {
        return std::fabs(number - std::nearbyint(number / step) * step) <= 1e-7 * size;
      });
      if (fits) exact = step;
    }
    one_byte_ = one_byte_ && (exact != 0 || size == 0);
    steps[book] = exact, bases[book] = -128 * exact;
  }
  byte_tables_.resize(size_t(sizes_.books));
  for (int64_t book = 0; book < sizes_.books; ++book) {
    const float* from = codebooks_ + book * sizes_.entries;
    if (!one_byte_) {
      bases[book] = *std::min_element(from, from + sizes_.entries);
      steps[book] = (*std::max_element(from, from + sizes_.entries) - bases[book]) / 65535;
    }
    ByteTable& table = byte_tables_[book];
    table.step = float(steps[book]), table.base = float(bases[book]);
    for (int64_t i = 0; i < kTable; ++i) {
      for (int odd = 0; odd < 2; ++odd) {
        const int64_t index = attributes_.bits == 2 ? (odd ? i / 4 : i % 4) : i % sizes_.entries;
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
  *left = (copied ? sizes_.rows : rows_in_place_) - row;
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
      kernels().narrow_write(narrow, int(attributes_.bits), within, begin / block, end / block,
                             to + row * (end - begin));
    }
  } else {
    write_tiles(first, count, begin, end, to);
  }
  for (int64_t row = 0; sizes_.outliers > 0 && row < count; ++row) {
    add_outliers(first + row, begin, end, to + row * (end - begin));
  }
}

Tiles Weights::tiles(int64_t row) const {
  const int64_t entry = sizes_.tile_rows * sizes_.tile_columns, book = sizes_.entries * entry;
  const int64_t index_row = row / sizes_.tile_rows;
  return {codebooks_ + row % sizes_.tile_rows * sizes_.tile_columns + (sizes_.book_of_row() ? index_row * book : 0),
          book,
          entry,
          sizes_.tile_columns,
          sizes_.group_size / sizes_.tile_columns,
          selectors_ != nullptr ? selectors_ + index_row * sizes_.groups : nullptr,
          static_cast<const uint8_t*>(scales_) + row * sizes_.groups * (sizes_.half_scales ? 2 : 4),
          sizes_.half_scales,
          sizes_.groups};
}

bool Weights::takes_tiles() const {
  const int64_t rows = sizes_.tile_rows, columns = sizes_.tile_columns;
  if (rows == 1 && columns <= 2) return !narrow_ && kernels().gathers;
  return (rows == 1 && (columns == 4 || columns == 8)) || (columns == 1 && (rows == 4 || rows == 8));
}

void Weights::tiles_dot(int64_t first, int64_t count, const float* x, float* y) const {
  thread_local std::vector<uint16_t> indices;
  indices.resize(size_t(sizes_.per_row));
  uint16_t* const index = indices.data();
  for (int64_t row = 0; row < count; row += sizes_.tile_rows) {
    const uint8_t* const packed = indices_ + (first + row) / sizes_.tile_rows * sizes_.row_bytes;
    kernels().unpack(packed, sizes_.row_bytes, int(attributes_.bits), 0, sizes_.per_row, index);
    kernels().tiles_dot(tiles(first + row), index, sizes_.per_row, x, std::min(sizes_.tile_rows, count - row), y + row);
  }
}

void Weights::write_tiles(int64_t first, int64_t count, int64_t begin, int64_t end, float* to) const {
  const int64_t width = end - begin, first_tile = begin / sizes_.tile_columns;
  const int64_t end_tile = std::min(end / sizes_.tile_columns, sizes_.per_row);
  const int64_t count_of_tiles = std::max<int64_t>(0, end_tile - first_tile);
  thread_local std::vector<uint16_t> indices;
  indices.resize(size_t(count_of_tiles));
  uint16_t* const index = indices.data();
  for (int64_t row = first; row < first + count; ++row) {
    if (row % sizes_.tile_rows == 0) {
      const uint8_t* const packed = indices_ + row / sizes_.tile_rows * sizes_.row_bytes;
      kernels().unpack(packed, sizes_.row_bytes, int(attributes_.bits), first_tile, count_of_tiles, index);
    }
    float* const here = to + (row - first) * width;
    kernels().spread(tiles(row), index, first_tile, count_of_tiles, here);
    std::fill(here + count_of_tiles * sizes_.tile_columns, here + width, 0.0f);
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
  if (sizes_.outliers == 0) return total;
  for (int32_t i = outlier_rows_[row]; i < outlier_rows_[row + 1]; ++i)
    total += outlier_values_[i] * x[outlier_columns_[i]];
  return total;
}

}  // namespace graphopt::codebook_matmul
