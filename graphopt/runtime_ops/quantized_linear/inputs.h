// What a node of QuantizedLinear is given, checked, for the kernels of every device.
#pragma once

#include "matrix.h"

namespace graphopt::quantized_linear {

enum Input : size_t { kX, kNorm, kWeight, kScales, kZeros, kMinimums, kBias, kResidual };

class Inputs {
 public:
  struct Weights {
    Matrix matrix;
    const float* norm = nullptr;  // null: none
    const float* bias = nullptr;
  };

  explicit Inputs(const Node& node) : format(node), epsilon(node.number("epsilon")) {
    // Weights are checked once where they are constants, as they nearly always are.
    Tensor found[kResidual];
    constant_ = constants(node, kNorm, kResidual, found);
    if (constant_) weights_ = take([&](size_t i) { return found[i]; });
  }

  Weights weights(const Call& call) const {
    return constant_ ? weights_ : take([&](size_t i) { return call.input(i); });
  }

  // The shape of the product. `adds` becomes whether there is a residual.
  static Shape product(const Matrix& matrix, const Tensor& x, const Tensor& residual, bool* adds) {
    GRAPHOPT_REQUIRE(!x.shape.empty() && x.dim(-1) == matrix.length,
                     "x is %s, and the weight takes rows of %lld numbers", text(x.shape).c_str(),
                     (long long)matrix.length);
    Shape shape = x.shape;
    shape.back() = matrix.rows;
    *adds = residual.shape == shape;
    GRAPHOPT_REQUIRE(*adds || residual.size() == 0, "the residual is %s, and the product %s",
                     text(residual.shape).c_str(), text(shape).c_str());
    return shape;
  }

  // How many rows of activations x has.
  static int64_t tokens(const Tensor& x) {
    int64_t count = 1;
    for (size_t i = 0; i + 1 < x.shape.size(); ++i) count *= x.shape[i];
    return count;
  }

  const Format format;
  const float epsilon;

 private:
  template <typename Get>
  Weights take(const Get& input) const {
    Weights made;
    made.matrix = matrix(input, kWeight, format, "the weight");
    made.norm = gains(input(kNorm), made.matrix.length);
    const Tensor bias = input(kBias);
    GRAPHOPT_REQUIRE(bias.size() == 0 || bias.size() == made.matrix.rows,
                     "the bias has %lld numbers, and the weight %lld rows", (long long)bias.size(),
                     (long long)made.matrix.rows);
    if (bias.size() > 0) made.bias = bias.as<float>();
    return made;
  }

  bool constant_;
  Weights weights_;
};

// The operator with a kernel of class K.
template <typename K>
Operator linear_operator(const char* provider) {
  using T = ElementType;
  const std::vector<T> x = activation_types(), scales = scale_types();
  auto infer = [](Inference& inference) {
    Inference::Dims dims = inference.input(kX);
    if (dims.empty()) return;
    dims.back() = inference.input(kWeight).at(0);
    inference.output(0, inference.type(kX), dims);
  };
  return {"QuantizedLinear",
          {{x}, {{T::float32}}, {{T::uint8}}, {scales}, {{T::uint8}}, {scales}, {{T::float32}}, {x}},
          {{x}},
          make<K>,
          infer,
          provider};
}

}  // namespace graphopt::quantized_linear
