// What a valid node of KroneckerQuantize looks like, for the fuzzer.
#include "fuzz/case.h"

namespace graphopt::fuzz {
namespace {

const Maker maker{"KroneckerQuantize", [](Random& random, Case& made) {
  const int64_t a = random.between(1, 20), b = random.between(1, 40);
  made.attribute("clip", random.pick({1.0f, 0.9f}));
  made.attribute("largest", random.pick<int64_t>({127, 7, 1}));
  made.input({random.below(4), random.below(3), a * b});
  made.input({a, a});
  made.input({b, b});
}};

}  // namespace
}  // namespace graphopt::fuzz
