// The CPU kernel of QuantizedMlp.
#include <cstring>

#include "../quantized_linear/matrix.h"

namespace graphopt::quantized_mlp {
namespace {

using namespace graphopt::quantized_linear;

enum Input : size_t { kX, kNorm, kGateUp, kDown = kGateUp + 4, kInputs = kDown + 4 };

class QuantizedMlp final : public Kernel {
 public:
  explicit QuantizedMlp(const Node& node)
      : format_(node), epsilon_(node.number("epsilon")), activation_(int(node.integer("activation"))) {
    GRAPHOPT_REQUIRE(activation_ >= 0 && activation_ <= 3, "activation is %d, and must be 0, 1, 2 or 3", activation_);
    Tensor found[kInputs];
    constant_ = true;
    for (size_t i = kNorm; i < kInputs; ++i) constant_ = node.constant(i, &found[i]) && constant_;
    if (constant_) weights_ = take([&](size_t i) { return found[i]; });
  }

  void compute(Call& call) override {
    const Weights weights = constant_ ? weights_ : take([&](size_t i) { return call.input(i); });
    const Matrix &up = weights.gate_up, &down = weights.down;
    const Tensor x = call.input(kX);
    GRAPHOPT_REQUIRE(!x.shape.empty() && x.dim(-1) == up.length, "x is %s, and the weights take rows of %lld numbers",
                     text(x.shape).c_str(), (long long)up.length);
    const int64_t width = x.dim(-1), hidden = down.length;
    const int64_t count = width == 0 ? 0 : x.size() / width;
    void* y = call.output(0, x.shape);
    if (count == 0 || hidden == 0) return;

    const Kernels& run = kernels();
    const Layout outer(up, format_.terms), inner(down, format_.terms);
    thread_local Buffer room_of_rows;
    uint8_t* rows = room_of_rows.reserve(size_t(count * (outer.row + inner.row)));
    uint8_t* inner_rows = rows + count * outer.row;
    // A task makes whole blocks of what the second product takes in, and quantizes them itself.
    const int64_t wide = rows_of_task(up, format_.block), narrow = rows_of_task(down, 4);
    const size_t hidden_tasks = size_t((hidden + wide - 1) / wide), tasks = size_t((width + narrow - 1) / narrow);
    const int64_t deep = 64;  // activation rows of a task: their numbers stay in the cache
    const size_t depths = size_t((count + deep - 1) / deep);

    call.phases({size_t(count), hidden_tasks * depths, tasks * depths}, [&](size_t part, size_t task) {
      if (part == 0) {
        float* room = numbers(2 * width);
        const float* from = as_floats(x, int64_t(task) * width, width, room);
        if (weights.norm != nullptr) {
          run.rms_norm(from, weights.norm, epsilon_, width, room + width);
          from = room + width;
        }
        run.quantize(outer, from, 0, width, rows + int64_t(task) * outer.row);
        return;
      }
      const size_t columns = part == 1 ? hidden_tasks : tasks;
      const int64_t begin = int64_t(task / columns) * deep, end = begin + deep < count ? begin + deep : count;
      const int64_t depth = end - begin;
      if (part == 1) {
        const int64_t first = int64_t(task % columns) * wide, last = first + wide < hidden ? first + wide : hidden;
        const int64_t here = last - first;
        float* gates = numbers(2 * depth * here + hidden);
        float* ups = gates + depth * here;
        float* row = ups + depth * here;
        run.multiply(up, outer, rows + begin * outer.row, depth, first, last, gates, here);
        run.multiply(up, outer, rows + begin * outer.row, depth, hidden + first, hidden + last, ups, here);
        for (int64_t m = 0; m < depth; ++m) {
          run.gate(activation_, gates + m * here, ups + m * here, here);
          std::memcpy(row + first, gates + m * here, size_t(here) * sizeof(float));
          run.quantize(inner, row, first, last, inner_rows + (begin + m) * inner.row);
        }
        return;
      }
      const int64_t first = int64_t(task % columns) * narrow, last = first + narrow < width ? first + narrow : width;
      const int64_t here = last - first;
      float* products = numbers(depth * here);
      run.multiply(down, inner, inner_rows + begin * inner.row, depth, first, last, products, here);
      for (int64_t m = 0; m < depth; ++m) {
        const float* from = products + m * here;
        const int64_t to = (begin + m) * width + first;
        if (x.type == ElementType::float16) {
          Half* into = static_cast<Half*>(y) + to;
          for (int64_t i = 0; i < here; ++i) into[i] = from_float<Half>(from[i] + to_float(x.as<Half>()[to + i]));
        } else {
          float* into = static_cast<float*>(y) + to;
          for (int64_t i = 0; i < here; ++i) into[i] = from[i] + x.as<float>()[to + i];
        }
      }
    });
  }

 private:
  struct Weights {
    const float* norm = nullptr;  // null: none
    Matrix gate_up, down;
  };

  template <typename Inputs>
  Weights take(const Inputs& input) const {
    Weights made;
    made.gate_up = matrix(input, kGateUp, format_, "gate_up");
    made.down = matrix(input, kDown, format_, "down");
    const Tensor norm = input(kNorm);
    GRAPHOPT_REQUIRE(made.gate_up.rows == 2 * made.down.length && made.gate_up.length == made.down.rows,
                     "gate_up is %lld × %lld and down %lld × %lld; they don't fit each other",
                     (long long)made.gate_up.rows, (long long)made.gate_up.length, (long long)made.down.rows,
                     (long long)made.down.length);
    GRAPHOPT_REQUIRE(norm.size() == 0 || norm.size() == made.gate_up.length,
                     "the norm has %lld gains, and rows %lld numbers", (long long)norm.size(),
                     (long long)made.gate_up.length);
    if (norm.size() > 0) made.norm = norm.as<float>();
    return made;
  }

  Format format_;
  float epsilon_;
  int activation_;
  bool constant_;
  Weights weights_;
};

using T = ElementType;
// x and scales may each be float32 or float16.
const std::vector<T> kX4 = {T::float32, T::float32, T::float16, T::float16};
const std::vector<T> kS4 = {T::float32, T::float16, T::float32, T::float16};

void infer(Inference& inference) { inference.output(0, inference.type(kX), inference.input(kX)); }

const Registration registration{{"QuantizedMlp",
                                 {{kX4},
                                  {{T::float32}},
                                  {{T::uint8}},
                                  {kS4},
                                  {{T::uint8}},
                                  {kS4},
                                  {{T::uint8}},
                                  {kS4},
                                  {{T::uint8}},
                                  {kS4}},
                                 {{kX4}},
                                 make<QuantizedMlp>,
                                 infer}};

}  // namespace
}  // namespace graphopt::quantized_mlp
