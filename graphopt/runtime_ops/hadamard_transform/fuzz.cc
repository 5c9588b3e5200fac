// What a valid node of HadamardTransform looks like, for the fuzzer.
#include "fuzz/case.h"

namespace graphopt::fuzz {
namespace {

const Maker maker{"HadamardTransform", [](Random& random, Case& made) {
  const int64_t m = random.pick<int64_t>({1, 1, 3, 12}), group = m << random.below(7);
  made.attribute("group_size", group);
  made.attribute("scale", random.number());
  made.input({random.below(4), random.below(3), group * random.below(4)});
  made.input({m, m});
}};

}  // namespace
}  // namespace graphopt::fuzz
