// What a valid node of KroneckerTransform looks like, for the fuzzer.
#include "fuzz/case.h"

namespace graphopt::fuzz {
namespace {

const Maker maker{"KroneckerTransform", [](Random& random, Case& made) {
  // The large pair is so much work that threads share a token.
  const bool large = random.chance(5);
  const int64_t a = large ? 100 : random.between(1, 20), b = large ? 110 : random.between(1, 40);
  made.input({random.below(4), random.below(3), a * b});
  made.input({a, a});
  made.input({b, b});
}};

}  // namespace
}  // namespace graphopt::fuzz
