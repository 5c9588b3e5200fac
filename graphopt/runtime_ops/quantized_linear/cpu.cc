// The CPU kernel of QuantizedLinear.
#include "matrix.h"

namespace graphopt::quantized_linear {
namespace {

enum Input : size_t { kX, kNorm, kWeight, kScales, kZeros, kMinimums, kBias, kResidual };

class QuantizedLinear final : public Kernel {
 public:
  explicit QuantizedLinear(const Node& node) : format_(node), epsilon_(node.number("epsilon")) {
    // Weights are checked once where they are constants, as they nearly always are.
    Tensor found[kResidual];
    constant_ = true;
    for (size_t i = kNorm; i < kResidual; ++i) constant_ = node.constant(i, &found[i]) && constant_;
    if (constant_) weights_ = take([&](size_t i) { return found[i]; });
  }

  void compute(Call& call) override {
    const Weights weights = constant_ ? weights_ : take([&](size_t i) { return call.input(i); });
    const Matrix& matrix = weights.matrix;
    const Tensor x = call.input(kX), residual = call.input(kResidual);
    GRAPHOPT_REQUIRE(!x.shape.empty() && x.dim(-1) == matrix.length, "x is %s, and the weight takes rows of %lld numbers",
                     text(x.shape).c_str(), (long long)matrix.length);
    Shape shape = x.shape;
    shape.back() = matrix.rows;
    const int64_t length = matrix.length, width = matrix.rows;
    int64_t count = 1;
    for (size_t i = 0; i + 1 < x.shape.size(); ++i) count *= x.shape[i];
    const bool adds = residual.shape == shape;
    GRAPHOPT_REQUIRE(adds || residual.size() == 0, "the residual is %s, and the product %s",
                     text(residual.shape).c_str(), text(shape).c_str());
    void* y = call.output(0, shape);
    if (count == 0 || width == 0) return;

    const Kernels& run = kernels();
    const Layout layout(matrix, format_.terms);
    thread_local Buffer room_of_rows;  // sessions may run one node on several threads at once
    uint8_t* rows = room_of_rows.reserve(size_t(count * layout.row));
    const int64_t together = rows_of_task(matrix, 4);
    const size_t columns = size_t((width + together - 1) / together);
    const int64_t deep = 64;  // activation rows of a task: their numbers stay in the cache
    const size_t depths = size_t((count + deep - 1) / deep);
    call.phases({size_t(count), columns * depths}, [&](size_t part, size_t task) {
      if (part == 0) {
        float* room = numbers(2 * length);
        const float* from = as_floats(x, int64_t(task) * length, length, room);
        if (weights.norm != nullptr) {
          run.rms_norm(from, weights.norm, epsilon_, length, room + length);
          from = room + length;
        }
        run.quantize(layout, from, 0, length, rows + int64_t(task) * layout.row);
        return;
      }
      const int64_t first = int64_t(task % columns) * together, last = first + together < width ? first + together : width;
      const int64_t begin = int64_t(task / columns) * deep, end = begin + deep < count ? begin + deep : count;
      const int64_t here = last - first;
      float* products = numbers((end - begin) * here);
      run.multiply(matrix, layout, rows + begin * layout.row, end - begin, first, last, products, here);
      for (int64_t m = begin; m < end; ++m) {
        float* from = products + (m - begin) * here;
        const int64_t to = m * width + first;
        if (weights.bias != nullptr) {
          for (int64_t i = 0; i < here; ++i) from[i] += weights.bias[first + i];
        }
        if (x.type == ElementType::float16) {
          Half* into = static_cast<Half*>(y) + to;
          for (int64_t i = 0; i < here; ++i) {
            into[i] = from_float<Half>(from[i] + (adds ? to_float(residual.as<Half>()[to + i]) : 0.0f));
          }
        } else {
          float* into = static_cast<float*>(y) + to;
          for (int64_t i = 0; i < here; ++i) into[i] = from[i] + (adds ? residual.as<float>()[to + i] : 0.0f);
        }
      }
    });
  }

 private:
  struct Weights {
    Matrix matrix;
    const float* norm = nullptr;  // null: none
    const float* bias = nullptr;
  };

  template <typename Inputs>
  Weights take(const Inputs& input) const {
    Weights made;
    made.matrix = matrix(input, kWeight, format_, "the weight");
    const Tensor norm = input(kNorm), bias = input(kBias);
    GRAPHOPT_REQUIRE(norm.size() == 0 || norm.size() == made.matrix.length,
                     "the norm has %lld gains, and rows %lld numbers", (long long)norm.size(),
                     (long long)made.matrix.length);
    GRAPHOPT_REQUIRE(bias.size() == 0 || bias.size() == made.matrix.rows,
                     "the bias has %lld numbers, and the weight %lld rows", (long long)bias.size(),
                     (long long)made.matrix.rows);
    if (norm.size() > 0) made.norm = norm.as<float>();
    if (bias.size() > 0) made.bias = bias.as<float>();
    return made;
  }

  Format format_;
  float epsilon_;
  bool constant_;
  Weights weights_;
};

void infer(Inference& inference) {
  Inference::Dims dims = inference.input(kX);
  if (dims.empty()) return;
  dims.back() = inference.input(kWeight).at(0);
  inference.output(0, inference.type(kX), dims);
}

using T = ElementType;
// x and scales may each be float32 or float16.
const std::vector<T> kX4 = {T::float32, T::float32, T::float16, T::float16};
const std::vector<T> kS4 = {T::float32, T::float16, T::float32, T::float16};
const Registration registration{{"QuantizedLinear",
                                 {{kX4}, {{T::float32}}, {{T::uint8}}, {kS4}, {{T::uint8}}, {kS4}, {{T::float32}}, {kX4}},
                                 {{kX4}},
                                 make<QuantizedLinear>,
                                 infer}};

}  // namespace
}  // namespace graphopt::quantized_linear
