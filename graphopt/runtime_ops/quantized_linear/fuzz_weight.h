// A quantized weight of a fuzzed node, for the operators that take one.
#pragma once

#include "fuzz/case.h"

namespace graphopt::fuzz {

struct Grid {
  explicit Grid(Random& random)
      : bits(random.pick<int64_t>({2, 4, 4, 8})), block(random.pick<int64_t>({16, 32, 32, 64, 128, 256})) {}

  void attributes(Random& random, Case& made) const {
    made.attribute("bits", bits);
    made.attribute("block_size", block);
    made.attribute("activation_bits", random.pick<int64_t>({8, 16}));
    made.attribute("epsilon", 1e-5f);
  }

  // The four inputs of a weight.
  void weight(Random& random, Case& made, int64_t rows, int64_t blocks) const {
    made.input({rows, blocks, block * bits / 8});
    made.input({rows, blocks});
    if (random.chance(50)) {
      made.input({0});
    } else {
      made.input({rows, (blocks * bits + 7) / 8});
    }
    if (random.chance(50)) {
      made.input({0});
    } else {
      made.input({rows, blocks});
    }
  }

  int64_t bits, block;
};

}  // namespace graphopt::fuzz
