#include "sizes.h"

#include <algorithm>

namespace graphopt::codebook_matmul {
namespace {

using Long = long long;

constexpr int64_t kMost = int64_t(1) << 40;  // of any size that is computed with

void require_shape(const char* what, const Tensor& tensor, const Shape& wanted) {
  GRAPHOPT_REQUIRE(tensor.shape == wanted, "the shape of the %s is %s, and must be %s", what,
                   text(tensor.shape).c_str(), text(wanted).c_str());
}

void infer(Inference& inference) {
  Inference::Dims dims = inference.input(kX);
  const Inference::Dims scales = inference.input(kScales);
  if (dims.empty() || scales.empty()) return;
  dims.back() = scales.front();
  inference.output(0, inference.type(kX), dims);
}

}  // namespace

Attributes::Attributes(const Node& node)
    : columns(node.integer("columns")),
      bits(node.integer("bits")),
      group_size(node.integer("group_size")),
      activation_block(node.integer("activation_block")) {
  GRAPHOPT_REQUIRE(columns >= 0, "columns is %lld, and must not be negative", Long(columns));
  GRAPHOPT_REQUIRE(bits >= 1 && bits <= 16, "bits is %lld, and must be 1 to 16", Long(bits));
  GRAPHOPT_REQUIRE(group_size > 0, "group_size is %lld, and must be positive", Long(group_size));
  GRAPHOPT_REQUIRE(activation_block >= 0, "activation_block is %lld, and must not be negative", Long(activation_block));
}

Sizes::Sizes(const Attributes& attributes, const std::vector<Tensor>& inputs) {
  const Tensor &codebooks = inputs[kCodebooks], &scales = inputs[kScales];
  const int64_t bits = attributes.bits;
  GRAPHOPT_REQUIRE(codebooks.shape.size() == 4 && codebooks.size() > 0,
                   "the shape of the codebooks is %s, and must be [codebooks, entries, rows, columns]",
                   text(codebooks.shape).c_str());
  GRAPHOPT_REQUIRE(scales.shape.size() == 2, "the shape of the scales is %s, and must be [rows, groups]",
                   text(scales.shape).c_str());
  rows = scales.dim(0), columns = attributes.columns;
  GRAPHOPT_REQUIRE(rows < kMost && columns < kMost, "%lld rows of %lld columns are too many", Long(rows),
                   Long(columns));

  books = codebooks.dim(0), entries = codebooks.dim(1), tile_rows = codebooks.dim(2), tile_columns = codebooks.dim(3);
  GRAPHOPT_REQUIRE(entries == int64_t(1) << bits, "the codebooks have %lld entries, and indices of %lld bits need %lld",
                   Long(entries), Long(bits), Long(1) << bits);
  GRAPHOPT_REQUIRE(attributes.group_size % tile_columns == 0,
                   "group_size %lld isn't a multiple of the tiles' %lld columns", Long(attributes.group_size),
                   Long(tile_columns));
  groups = up(columns, attributes.group_size);
  half_scales = scales.type == ElementType::float16;
  require_shape("scales", scales, {rows, groups});
  index_rows = up(rows, tile_rows), per_row = up(columns, tile_columns), row_bytes = up(per_row * bits, 8);
  require_shape("indices", inputs[kIndices], {index_rows, row_bytes});
  group_size = std::min(attributes.group_size, std::max<int64_t>(per_row, 1) * tile_columns);

  selected = inputs[kSelectors].size() > 0;
  if (selected) {
    require_shape("selectors", inputs[kSelectors], {index_rows, groups});
  } else {
    GRAPHOPT_REQUIRE(books == 1 || books == index_rows,
                     "without selectors there must be one codebook, or one for each of %lld rows of tiles, not %lld",
                     Long(index_rows), Long(books));
  }
  outliers = inputs[kOutlierValues].size();
  GRAPHOPT_REQUIRE(outliers < INT32_MAX, "%lld outliers are too many", Long(outliers));
  require_shape("outlier values", inputs[kOutlierValues], {outliers});
  require_shape("outlier columns", inputs[kOutlierColumns], {outliers});
  has_outliers = outliers > 0 || inputs[kOutlierRows].size() > 0;
  if (has_outliers) require_shape("outlier rows", inputs[kOutlierRows], {rows + 1});
  has_bias = inputs[kBias].size() > 0;
  if (has_bias) require_shape("bias", inputs[kBias], {rows});
}

Shape product_shape(const Sizes& sizes, const Tensor& x) {
  GRAPHOPT_REQUIRE(!x.shape.empty() && x.dim(-1) == sizes.columns, "x is %s, and the weights have %lld columns",
                   text(x.shape).c_str(), Long(sizes.columns));
  Shape shape = x.shape;
  shape.back() = sizes.rows;
  return shape;
}

int64_t rows_of(const Shape& shape) {
  int64_t count = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) count *= shape[i];
  return count;
}

Operator described(std::unique_ptr<Kernel> (*make)(const Node&), const char* provider) {
  using T = ElementType;
  const std::vector<T> types = {T::float32, T::float16, T::float32, T::float16};
  const std::vector<T> scales = {T::float32, T::float32, T::float16, T::float16};
  Operator made{"CodebookMatMul", {}, {{types}}, make, infer, provider};
  made.inputs = {{types},      {{T::uint8}}, {{T::float32}}, {scales}, {{T::uint8}},
                 {{T::int32}}, {{T::int32}}, {{T::float32}}, {types}};
  return made;
}

}  // namespace graphopt::codebook_matmul
