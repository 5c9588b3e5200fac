// What a valid node of HadamardQuantize looks like, for the fuzzer.
#include "fuzz/case.h"

namespace graphopt::fuzz {
namespace {

const Maker maker{"HadamardQuantize", [](Random& random, Case& made) {
  const int64_t m = random.pick<int64_t>({1, 1, 3, 12}), group = m << random.below(7);
  made.attribute("group_size", group);
  made.attribute("scale", random.number());
  made.attribute("clip", random.pick({1.0f, 0.9f}));
  made.attribute("largest", random.pick<int64_t>({127, 7, 1}));
  made.input({random.below(4), random.below(3), group * random.between(1, 3)});
  made.input({m, m});
}};

}  // namespace
}  // namespace graphopt::fuzz
