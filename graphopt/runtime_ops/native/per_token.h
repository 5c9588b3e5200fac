// What operators that give out bytes with one scale for each token have in common (the bytes: simd_quantize.h).
#pragma once

#include "operator.h"

namespace graphopt {

struct PerToken {
  explicit PerToken(const Node& node) : clip(node.number("clip")), largest(float(node.integer("largest"))) {
    GRAPHOPT_REQUIRE(largest >= 1 && largest <= 127, "largest is %g, and must be from 1 to 127", double(largest));
    GRAPHOPT_REQUIRE(clip > 0 && clip <= 1, "clip is %g, and must be above 0 and at most 1", double(clip));
  }

  // The shape of the scales of [..., features].
  static Shape scales(Shape shape) {
    shape.back() = 1;
    return shape;
  }

  static void infer(Inference& inference) {
    Inference::Dims dims = inference.input(0);
    inference.output(0, ElementType::uint8, dims);
    if (dims.empty()) return;
    dims.back() = {1, ""};
    inference.output(1, ElementType::float32, dims);
  }

  float clip;
  float largest;
};

}  // namespace graphopt
