// What a node of QuantizedMlp is given, checked, for the kernels of every device.
#pragma once

#include "../quantized_linear/matrix.h"

namespace graphopt::quantized_mlp {

using quantized_linear::activation_types;
using quantized_linear::constants;
using quantized_linear::Format;
using quantized_linear::gains;
using quantized_linear::matrix;
using quantized_linear::Matrix;
using quantized_linear::scale_types;

enum Input : size_t { kX, kNorm, kGateUp, kDown = kGateUp + 4, kInputs = kDown + 4 };

class Inputs {
 public:
  struct Weights {
    const float* norm = nullptr;  // null: none
    Matrix gate_up, down;
  };

  explicit Inputs(const Node& node)
      : format(node), epsilon(node.number("epsilon")), activation(int(node.integer("activation"))) {
    GRAPHOPT_REQUIRE(activation >= 0 && activation <= 3, "activation is %d, and must be 0, 1, 2 or 3", activation);
    Tensor found[kInputs];
    constant_ = constants(node, kNorm, kInputs, found);
    if (constant_) weights_ = take([&](size_t i) { return found[i]; });
  }

  Weights weights(const Call& call) const {
    return constant_ ? weights_ : take([&](size_t i) { return call.input(i); });
  }

  // How many rows of activations x has.
  static int64_t tokens(const Weights& weights, const Tensor& x) {
    const int64_t width = weights.gate_up.length;
    GRAPHOPT_REQUIRE(!x.shape.empty() && x.dim(-1) == width, "x is %s, and the weights take rows of %lld numbers",
                     text(x.shape).c_str(), (long long)width);
    return width == 0 ? 0 : x.size() / width;
  }

  const Format format;
  const float epsilon;
  const int activation;

 private:
  template <typename Get>
  Weights take(const Get& input) const {
    Weights made;
    made.gate_up = matrix(input, kGateUp, format, "gate_up");
    made.down = matrix(input, kDown, format, "down");
    GRAPHOPT_REQUIRE(made.gate_up.rows == 2 * made.down.length && made.gate_up.length == made.down.rows,
                     "gate_up is %lld × %lld and down %lld × %lld; they don't fit each other",
                     (long long)made.gate_up.rows, (long long)made.gate_up.length, (long long)made.down.rows,
                     (long long)made.down.length);
    made.norm = gains(input(kNorm), made.gate_up.length);
    return made;
  }

  bool constant_;
  Weights weights_;
};

// The operator with a kernel of class K.
template <typename K>
Operator mlp_operator(const char* provider) {
  using T = ElementType;
  const std::vector<T> x = activation_types(), scales = scale_types();
  auto infer = [](Inference& inference) { inference.output(0, inference.type(kX), inference.input(kX)); };
  return {"QuantizedMlp",
          {{x},
           {{T::float32}},
           {{T::uint8}},
           {scales},
           {{T::uint8}},
           {scales},
           {{T::uint8}},
           {scales},
           {{T::uint8}},
           {scales}},
          {{x}},
          make<K>,
          infer,
          provider};
}

}  // namespace graphopt::quantized_mlp
