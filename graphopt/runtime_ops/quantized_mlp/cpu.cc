// The CPU kernel of QuantizedMlp.
#include <cstring>

#include "inputs.h"

namespace graphopt::quantized_mlp {
namespace {

using namespace graphopt::quantized_linear;

class QuantizedMlp final : public Kernel {
 public:
  explicit QuantizedMlp(const Node& node) : inputs_(node) {}

  void compute(Call& call) override {
    const Inputs::Weights weights = inputs_.weights(call);
    const Matrix &up = weights.gate_up, &down = weights.down;
    const Tensor x = call.input(kX);
    const int64_t count = Inputs::tokens(weights, x), width = up.length, hidden = down.length;
    void* y = call.output(0, x.shape);
    if (count == 0) return;

    const Kernels& run = kernels();
    const Layout outer(up, inputs_.format.terms), inner(down, inputs_.format.terms);
    thread_local Buffer room_of_rows;
    uint8_t* rows = room_of_rows.reserve(size_t(count * (outer.row + inner.row)));
    uint8_t* inner_rows = rows + count * outer.row;
    // A task makes whole blocks of what the second product takes in, and quantizes them itself.
    const int64_t wide = rows_of_task(up, inputs_.format.block), narrow = rows_of_task(down, 4);
    const size_t hidden_tasks = size_t((hidden + wide - 1) / wide), tasks = size_t((width + narrow - 1) / narrow);
    const int64_t deep = 64;  // activation rows of a task: their numbers stay in the cache
    const size_t depths = size_t((count + deep - 1) / deep);

    call.phases({size_t(count), hidden_tasks * depths, tasks * depths}, [&](size_t part, size_t task) {
      if (part == 0) {
        float* room = numbers(2 * width);
        const float* from = as_floats(x, int64_t(task) * width, width, room);
        if (weights.norm != nullptr) {
          run.rms_norm(from, weights.norm, inputs_.epsilon, width, room + width);
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
          run.gate(inputs_.activation, gates + m * here, ups + m * here, here);
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
  Inputs inputs_;
};

const Registration registration{mlp_operator<QuantizedMlp>(nullptr)};

}  // namespace
}  // namespace graphopt::quantized_mlp
