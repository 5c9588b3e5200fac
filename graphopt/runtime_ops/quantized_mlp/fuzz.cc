// What a valid node of QuantizedMlp looks like, for the fuzzer.
#include "../quantized_linear/fuzz_weight.h"

namespace graphopt::fuzz {
namespace {

const Maker maker{"QuantizedMlp", [](Random& random, Case& made) {
  const Grid grid(random);
  grid.attributes(random, made);
  made.attribute("activation", random.below(4));
  const int64_t most = grid.block > 64 ? 1 : 3;
  const int64_t width = grid.block * random.between(1, most), hidden = grid.block * random.between(1, most);
  made.input({random.below(3), random.below(3), width});
  made.input({random.chance(50) ? 0 : width});
  grid.weight(random, made, 2 * hidden, width / grid.block);
  grid.weight(random, made, width, hidden / grid.block);
}};

}  // namespace
}  // namespace graphopt::fuzz
