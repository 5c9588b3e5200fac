// What a valid node of QuantizedLinear looks like, for the fuzzer.
#include "fuzz_weight.h"

namespace graphopt::fuzz {
namespace {

const Maker maker{"QuantizedLinear", [](Random& random, Case& made) {
  const Grid grid(random);
  grid.attributes(random, made);
  const int64_t tokens = random.below(6), rows = random.below(12), blocks = random.between(1, 4);
  made.input({tokens, blocks * grid.block});
  made.input({random.chance(50) ? 0 : blocks * grid.block});
  grid.weight(random, made, rows, blocks);
  made.input({random.chance(50) ? 0 : rows});
  if (random.chance(50)) {
    made.input({0});
  } else {
    made.input({tokens, rows});
  }
}};

}  // namespace
}  // namespace graphopt::fuzz
