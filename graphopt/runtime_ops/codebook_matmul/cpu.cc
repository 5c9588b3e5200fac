// The CPU kernel of CodebookMatMul.
#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

#include "float16.h"
#include "kernels.h"
#include "operator.h"
#include "weights.h"

namespace graphopt::codebook_matmul {
namespace {

constexpr int64_t kDirectRows = 2;       // rows of x up to which the indices are looked up for each row anew
constexpr int64_t kTaskWeights = 1 << 17;  // weights that are worth a thread
constexpr int64_t kStrip = 16;           // rows of weights that are written out together,
constexpr int64_t kStripColumns = 640;   // and columns: what the first cache holds
constexpr int64_t kTogether = 96;        // rows of x that are multiplied with a strip

// A row of x as floats, each `block` numbers rounded to 8 bits where block isn't 0.
template <typename V>
void take(const V* x, int64_t columns, int64_t block, float* to) {
  for (int64_t i = 0; i < columns; ++i) to[i] = to_float(x[i]);
  for (int64_t base = 0; block > 0 && base < columns; base += block) {
    const int64_t end = std::min(base + block, columns);
    float largest = 0, none = 0;
    for (int64_t i = base; i < end; ++i) {
      largest = std::max(largest, std::fabs(to[i]));
      none += to[i] * 0.0f;  // NaN where one isn't finite
    }
    const float step = largest / 127.0f + none, by = step == 0 ? 1.0f : step;
    for (int64_t i = base; i < end; ++i) to[i] = std::nearbyint(to[i] / by) * step;
  }
}

class CodebookMatMul final : public Kernel {
 public:
  explicit CodebookMatMul(const Node& node)
      : attributes_{node.integer("bits"), node.integer("group_size"), node.integer("activation_block")} {
    GRAPHOPT_REQUIRE(attributes_.bits >= 1 && attributes_.bits <= 16, "bits is %lld, and must be 1 to 16",
                     (long long)attributes_.bits);
    GRAPHOPT_REQUIRE(attributes_.group_size > 0, "group_size is %lld, and must be positive",
                     (long long)attributes_.group_size);
    GRAPHOPT_REQUIRE(attributes_.activation_block >= 0, "activation_block is %lld, and must not be negative",
                     (long long)attributes_.activation_block);
    Tensor tensor;
    constant_ = true;
    for (size_t i = kIndices; i < kInputs; ++i) constant_ = constant_ && node.constant(i, &tensor);
  }

  void compute(Call& call) override {
    std::vector<Tensor> inputs;
    for (size_t i = 0; i < kInputs; ++i) inputs.push_back(call.input(i));
    const std::shared_ptr<const Weights> weights = checked(inputs);
    Shape shape = inputs[kX].shape;
    shape.back() = inputs[kScales].dim(0);
    void* y = call.output(0, shape);
    if (inputs[kX].type == ElementType::float16) {
      product<Half>(call, *weights, inputs, static_cast<Half*>(y));
    } else {
      product<float>(call, *weights, inputs, static_cast<float*>(y));
    }
  }

 private:
  // The weights, checked once where they are constants.
  std::shared_ptr<const Weights> checked(const std::vector<Tensor>& inputs) {
    if (!constant_) return std::make_shared<const Weights>(attributes_, inputs);
    std::lock_guard<std::mutex> lock(mutex_);
    const Shape& x = inputs[kX].shape;
    if (!known_ || x.empty() || known_->columns() != x.back()) {
      known_ = std::make_shared<const Weights>(attributes_, inputs);
    }
    return known_;
  }

  template <typename V>
  void product(Call& call, const Weights& weights, const std::vector<Tensor>& inputs, V* y) const {
    const int64_t columns = weights.columns(), n = inputs[kScales].dim(0);
    int64_t m = 1;
    for (size_t i = 0; i + 1 < inputs[kX].shape.size(); ++i) m *= inputs[kX].dim(int(i));
    if (m == 0 || n == 0) return;
    const V* bias = inputs[kBias].size() > 0 ? inputs[kBias].as<V>() : nullptr;
    const V* x = inputs[kX].as<V>();
    const int64_t padded = weights.padded();
    // x as floats in its own order, and then in the weights' order.
    thread_local std::vector<float> natural, ordered;
    natural.resize(size_t(m * padded));
    if (weights.narrow()) ordered.resize(size_t(m * padded));
    float *const taken = natural.data(), *const operand = weights.narrow() ? ordered.data() : taken;
    auto prepare = [&](size_t row) {
      float* to = taken + row * padded;
      take(x + row * columns, columns, attributes_.activation_block, to);
      std::fill(to + columns, to + padded, 0.0f);
      if (weights.narrow()) kernels().interleave(to, columns, operand + row * padded);
    };

    if (weights.narrow() && m <= kDirectRows) {
      for (int64_t row = 0; row < m; ++row) prepare(size_t(row));
      const int64_t rows = std::max<int64_t>(4, kTaskWeights / std::max<int64_t>(padded, 1) / 4 * 4);
      call.parallel(size_t((n + rows - 1) / rows), [&](size_t task) {
        thread_local std::vector<float> found;
        found.resize(size_t(rows));
        const int64_t first = int64_t(task) * rows, count = std::min(rows, n - first);
        for (int64_t row = 0; row < m; ++row) {
          weights.dot(first, count, operand + row * padded, found.data());
          for (int64_t i = 0; i < count; ++i) {
            const float total = found[i] + weights.outlier_dot(first + i, taken + row * padded);
            y[row * n + first + i] = from_float<V>(bias != nullptr ? total + to_float(bias[first + i]) : total);
          }
        }
      });
      return;
    }

    const int64_t strip = (kStrip + weights.tile_rows() - 1) / weights.tile_rows() * weights.tile_rows();
    const int64_t wide = std::max(kStripColumns / weights.step(), int64_t(1)) * weights.step();
    call.phases({size_t(m), size_t((n + strip - 1) / strip)}, [&](size_t phase, size_t task) {
      if (phase == 0) return prepare(task);
      thread_local std::vector<float> tile, sums;
      tile.resize(size_t(strip * wide));
      const int64_t first = int64_t(task) * strip, count = std::min(strip, n - first);
      for (int64_t top = 0; top < m; top += kTogether) {
        const int64_t here = std::min(kTogether, m - top);
        sums.assign(size_t(here * strip), 0.0f);
        for (int64_t begin = 0; begin < padded; begin += wide) {
          const int64_t end = std::min(begin + wide, padded);
          weights.write(first, count, begin, end, tile.data());
          kernels().multiply(operand + top * padded + begin, padded, here, tile.data(), end - begin, count, end - begin,
                             sums.data(), strip);
        }
        for (int64_t row = 0; row < here; ++row) {
          for (int64_t i = 0; i < count; ++i) {
            const float total = sums[row * strip + i];
            y[(top + row) * n + first + i] = from_float<V>(bias != nullptr ? total + to_float(bias[first + i]) : total);
          }
        }
      }
    });
  }

  Attributes attributes_;
  bool constant_;
  std::mutex mutex_;
  std::shared_ptr<const Weights> known_;
};

void infer(Inference& inference) {
  Inference::Dims dims = inference.input(kX);
  if (dims.empty()) return;
  dims.back() = inference.input(kScales).front();
  inference.output(0, inference.type(kX), dims);
}

using T = ElementType;
const std::vector<T> kTypes = {T::float32, T::float16, T::float32, T::float16};
const std::vector<T> kScaleTypes = {T::float32, T::float32, T::float16, T::float16};
const Registration registration{{"CodebookMatMul",
                                 {{kTypes},
                                  {{T::uint8}},
                                  {{T::float32}},
                                  {kScaleTypes},
                                  {{T::uint8}},
                                  {{T::int32}},
                                  {{T::int32}},
                                  {{T::float32}},
                                  {kTypes}},
                                 {{kTypes}},
                                 make<CodebookMatMul>,
                                 infer}};

}  // namespace
}  // namespace graphopt::codebook_matmul
