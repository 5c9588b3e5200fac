// What a valid node of CodebookMatMul looks like, for the fuzzer.
#include "fuzz/case.h"

namespace graphopt::fuzz {
namespace {

int64_t up(int64_t count, int64_t size) { return (count + size - 1) / size; }

const Maker maker{"CodebookMatMul", [](Random& random, Case& made) {
  const bool narrow = random.chance(60);  // the widths whose codebooks are kept in registers
  const int64_t bits = narrow ? random.between(2, 4) : random.pick<int64_t>({1, 4, 5, 8});
  const int64_t r = narrow ? 1 : random.pick<int64_t>({1, 1, 3, 4, 8});
  const int64_t c = narrow ? 1 : random.pick<int64_t>({1, 1, 2, 3, 4, 8});
  const int64_t rows = random.below(40), columns = random.pick<int64_t>({0, 1, 7, 40, 128, 300, 700});
  const int64_t group = random.pick<int64_t>({1, 8, 24, 128, 1024}) * c, groups = up(columns, group);
  const int64_t tiles = up(rows, r), outliers = rows > 0 && columns > 0 && random.chance(50) ? random.below(30) : 0;
  const bool select = tiles * groups > 0 && random.chance(30);
  const int64_t books = select ? random.between(1, 5) : tiles > 0 && random.chance(30) ? tiles : 1;
  made.attribute("columns", columns);
  made.attribute("bits", bits);
  made.attribute("group_size", group);
  made.attribute("activation_block", random.pick<int64_t>({0, 32, 13}));
  made.input({random.below(5), columns});
  made.input({tiles, up(up(columns, c) * bits, 8)}, 0, 255);
  made.input({books, int64_t(1) << bits, r, c});
  made.input({rows, groups});
  if (select) {
    made.input({tiles, groups}, 0, books - 1);
  } else {
    made.input({0});
  }
  if (outliers > 0) {
    std::vector<double> ends(size_t(rows + 1));
    for (int64_t row = 1; row <= rows; ++row) ends[size_t(row)] = double(outliers * row / rows);
    made.values({rows + 1}, ends);
    made.input({outliers}, 0, columns - 1);
  } else {
    made.input({0});
    made.input({0});
  }
  made.input({outliers});
  made.input({random.chance(50) ? rows : 0});
}};

}  // namespace
}  // namespace graphopt::fuzz
