// The CPU kernel of QuantizedLinear.
#include "inputs.h"

namespace graphopt::quantized_linear {
namespace {

class QuantizedLinear final : public Kernel {
 public:
  explicit QuantizedLinear(const Node& node) : inputs_(node) {}

  void compute(Call& call) override {
    const Inputs::Weights weights = inputs_.weights(call);
    const Matrix& matrix = weights.matrix;
    const Tensor x = call.input(kX), residual = call.input(kResidual);
    bool adds = false;
    const Shape shape = Inputs::product(matrix, x, residual, &adds);
    const int64_t length = matrix.length, width = matrix.rows;
    const int64_t count = Inputs::tokens(x);
    void* y = call.output(0, shape);
    if (count == 0 || width == 0) return;

    const Kernels& run = kernels();
    const Layout layout(matrix, inputs_.format.terms);
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
          run.rms_norm(from, weights.norm, inputs_.epsilon, length, room + length);
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
  Inputs inputs_;
};

const Registration registration{linear_operator<QuantizedLinear>(nullptr)};

}  // namespace
}  // namespace graphopt::quantized_linear
