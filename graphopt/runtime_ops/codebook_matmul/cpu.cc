// The CPU kernel of CodebookMatMul.
#include <algorithm>
#include <memory>
#include <vector>

#include "float16.h"
#include "kernels.h"
#include "operator.h"
#include "weights.h"

namespace graphopt::codebook_matmul {
namespace {

constexpr int64_t kDirectRows = 2;          // rows of x up to which indices are looked up anew for each row,
constexpr int64_t kByteRows = 4;            // and where x is in bytes
constexpr int64_t kAloneWeights = 1 << 16;  // products that one thread is faster with alone
constexpr int64_t kTaskWeights = 1 << 16;   // products that are worth a task
constexpr int64_t kMostTasks = 64;
constexpr int64_t kStrip = 16;          // rows of weights that are written out together,
constexpr int64_t kStripColumns = 384;  // and columns: what the first cache holds
constexpr int64_t kTogether = 192;      // rows of x that are multiplied with a strip

// Memory that begins with a line of the cache, kept by a thread from call to call.
class Scratch {
 public:
  float* floats(int64_t count) {
    memory_.resize(size_t(count) + 16);
    return memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64 / sizeof(float);
  }

 private:
  std::vector<float> memory_;
};

// One product; V is the type of x and y.
template <typename V>
class Product {
 public:
  Product(Call& call, const Weights& weights, const Attributes& attributes, const Tensor& x, V* y)
      : call_(call),
        weights_(weights),
        x_(x.as<V>()),
        y_(y),
        bias_(static_cast<const V*>(weights.bias())),
        m_(rows_of(x.shape)),
        n_(weights.rows()),
        columns_(weights.columns()),
        padded_(weights.padded()),
        block_(std::min(attributes.activation_block, std::max<int64_t>(weights.columns(), 1))) {}

  void run() {
    if (m_ == 0 || n_ == 0) return;
    if (weights_.takes_bytes() && m_ <= kByteRows) {
      by_bytes();
    } else if ((weights_.narrow() || weights_.takes_tiles()) && m_ <= kDirectRows) {
      by_numbers();
    } else {
      by_strips();
    }
  }

 private:
  // Row `row` of x as floats, rounded as the node wants it, in padded_ places. What is rounded together has one step
  // each.
  void take(int64_t row, float* to, float* steps, int8_t* bytes) const {
    for (int64_t i = 0; i < columns_; ++i) to[i] = to_float(x_[row * columns_ + i]);
    std::fill(to + columns_, to + padded_, 0.0f);
    if (block_ > 0) kernels().round_blocks(to, columns_, block_, steps, bytes);
  }
  size_t steps() const { return block_ > 0 ? size_t(columns_ / block_ + 1) : 0; }

  V finished(float total, int64_t column) const {
    return from_float<V>(bias_ != nullptr ? total + to_float(bias_[column]) : total);
  }

  // The products of each row of x: dot(row, first, count, found) without outliers.
  template <typename Dot>
  void each_row(const float* natural, const Dot& dot) {
    // Several tasks for each thread, so that all end together; but none that is over before another thread is awake.
    const int64_t weights = n_ * padded_ * m_;
    const int64_t tasks = weights <= kAloneWeights ? 1 : std::min(up(weights, kTaskWeights), kMostTasks);
    const int64_t together = std::max<int64_t>(4, weights_.tile_rows());
    const int64_t rows = up(up(n_, tasks), together) * together;
    call_.parallel(size_t((n_ + rows - 1) / rows), [&](size_t task) {
      thread_local std::vector<float> found;
      found.resize(size_t(rows));
      const int64_t first = int64_t(task) * rows, count = std::min(rows, n_ - first);
      for (int64_t row = 0; row < m_; ++row) {
        dot(row, first, count, found.data());
        for (int64_t i = 0; i < count; ++i) {
          const float total = found[i] + weights_.outlier_dot(first + i, natural + row * padded_);
          y_[row * n_ + first + i] = finished(total, first + i);
        }
      }
    });
  }

  void by_numbers() {
    thread_local std::vector<float> natural, ordered, steps_of;
    natural.resize(size_t(m_ * padded_));
    steps_of.resize(steps());
    for (int64_t row = 0; row < m_; ++row) take(row, natural.data() + row * padded_, steps_of.data(), nullptr);
    if (weights_.takes_tiles()) {
      const float* operand = natural.data();
      each_row(operand, [&](int64_t row, int64_t first, int64_t count, float* found) {
        weights_.tiles_dot(first, count, operand + row * padded_, found);
      });
      return;
    }
    ordered.resize(size_t(m_ * padded_));
    for (int64_t row = 0; row < m_; ++row) {
      kernels().interleave(natural.data() + row * padded_, columns_, ordered.data() + row * padded_);
    }
    const float* operand = ordered.data();
    each_row(natural.data(), [&](int64_t row, int64_t first, int64_t count, float* found) {
      weights_.dot(first, count, operand + row * padded_, found);
    });
  }

  void by_bytes() {
    const int64_t lanes = padded_ / 8;
    thread_local std::vector<float> natural, steps_of, lane_steps, lane_sums;
    thread_local std::vector<int8_t> whole, numbers;
    natural.resize(size_t(m_ * padded_));
    steps_of.resize(steps());
    whole.resize(size_t(columns_));
    numbers.resize(size_t(m_ * padded_));
    lane_steps.resize(size_t(m_ * lanes));
    lane_sums.resize(size_t(m_ * lanes));
    for (int64_t row = 0; row < m_; ++row) {
      take(row, natural.data() + row * padded_, steps_of.data(), whole.data());
      kernels().arrange(whole.data(), steps_of.data(), columns_, block_, padded_ / kernels().block,
                        numbers.data() + row * padded_, lane_steps.data() + row * lanes,
                        lane_sums.data() + row * lanes);
    }
    const ByteRow operand{numbers.data(), lane_steps.data(), lane_sums.data()};
    each_row(natural.data(), [&](int64_t row, int64_t first, int64_t count, float* found) {
      weights_.dot(first, count,
                   {operand.numbers + row * padded_, operand.steps + row * lanes, operand.sums + row * lanes}, found);
    });
  }

  // Rows of weights are written out as numbers, a piece that fits the cache at a time, and multiplied with rows of x.
  // Of these, what meets one piece lies together: rows as far apart as x has columns might be in each other's way.
  void by_strips() {
    thread_local Scratch ordered;
    float* const operand = ordered.floats(m_ * padded_);
    const int64_t tile_rows = weights_.tile_rows(), step = weights_.step();
    const int64_t strip = (kStrip + tile_rows - 1) / tile_rows * tile_rows;
    const int64_t wide = std::max(kStripColumns / step, int64_t(1)) * step;
    call_.phases({size_t(m_), size_t((n_ + strip - 1) / strip)}, [&](size_t phase, size_t task) {
      if (phase == 0) {
        thread_local Scratch natural;
        thread_local std::vector<float> steps_of;
        steps_of.resize(steps());
        float* from = natural.floats(padded_);
        take(int64_t(task), from, steps_of.data(), nullptr);
        for (int64_t begin = 0; begin < padded_; begin += wide) {
          const int64_t size = std::min(wide, padded_ - begin);
          float* to = operand + begin * m_ + int64_t(task) * size;
          weights_.narrow() ? kernels().interleave(from + begin, size, to) : void(std::copy_n(from + begin, size, to));
        }
        return;
      }
      thread_local Scratch tile, sums;
      const int64_t first = int64_t(task) * strip, count = std::min(strip, n_ - first);
      for (int64_t top = 0; top < m_; top += kTogether) {
        const int64_t here = std::min(kTogether, m_ - top);
        float *const weights = tile.floats(strip * wide), *const totals = sums.floats(here * strip);
        std::fill(totals, totals + here * strip, 0.0f);
        for (int64_t begin = 0; begin < padded_; begin += wide) {
          const int64_t size = std::min(wide, padded_ - begin);
          weights_.write(first, count, begin, begin + size, weights);
          kernels().multiply(operand + begin * m_ + top * size, size, here, weights, size, count, size, totals, strip);
        }
        for (int64_t row = 0; row < here; ++row) {
          for (int64_t i = 0; i < count; ++i) {
            y_[(top + row) * n_ + first + i] = finished(totals[row * strip + i], first + i);
          }
        }
      }
    });
  }

  Call& call_;
  const Weights& weights_;
  const V* x_;
  V* y_;
  const V* bias_;
  int64_t m_, n_, columns_, padded_, block_;
};

class CodebookMatMul final : public Kernel {
 public:
  // Where the weights are constants they are checked once, here.
  explicit CodebookMatMul(const Node& node) : attributes_(node) {
    std::vector<Tensor> inputs(kInputs);
    for (size_t i = kIndices; i < kInputs; ++i) {
      if (!node.constant(i, &inputs[i])) return;
    }
    known_ = std::make_unique<const Weights>(attributes_, inputs);
  }

  void compute(Call& call) override {
    if (known_) return multiply(call, *known_);
    std::vector<Tensor> inputs;
    for (size_t i = 0; i < kInputs; ++i) inputs.push_back(call.input(i));
    multiply(call, Weights(attributes_, inputs));
  }

 private:
  void multiply(Call& call, const Weights& weights) const {
    const Tensor x = call.input(kX);
    void* y = call.output(0, product_shape(weights.sizes(), x));
    if (x.type == ElementType::float16) {
      Product<Half>(call, weights, attributes_, x, static_cast<Half*>(y)).run();
    } else {
      Product<float>(call, weights, attributes_, x, static_cast<float*>(y)).run();
    }
  }

  Attributes attributes_;
  std::unique_ptr<const Weights> known_;
};

const Registration registration{described(make<CodebookMatMul>, nullptr)};

}  // namespace
}  // namespace graphopt::codebook_matmul
