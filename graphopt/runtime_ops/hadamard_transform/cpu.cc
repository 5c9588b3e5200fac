// The CPU kernel of HadamardTransform.
#include <vector>

#include "float16.h"
#include "kernels.h"
#include "operator.h"

namespace graphopt::hadamard_transform {
namespace {

class HadamardTransform final : public Kernel {
 public:
  explicit HadamardTransform(const Node& node) : group_(node.integer("group_size")), scale_(node.number("scale")) {
    GRAPHOPT_REQUIRE(group_ > 0, "group_size is %lld, and must be positive", (long long)group_);
  }

  void compute(Call& call) override {
    const Tensor x = call.input(0), factor = call.input(1);
    GRAPHOPT_REQUIRE(factor.shape.size() == 2 && factor.dim(0) == factor.dim(1) && factor.dim(0) > 0,
                     "the factor must be a square matrix, not %s", text(factor.shape).c_str());
    const int64_t m = factor.dim(0), halves = group_ / m;
    GRAPHOPT_REQUIRE(halves > 0 && halves * m == group_ && (halves & (halves - 1)) == 0,
                     "group_size %lld isn't a power of two times the factor's %lld rows", (long long)group_, (long long)m);
    GRAPHOPT_REQUIRE(!x.shape.empty() && x.dim(-1) % group_ == 0,
                     "the last dimension of %s isn't a multiple of group_size %lld", text(x.shape).c_str(),
                     (long long)group_);
    void* y = call.output(0, x.shape);
    const float* f = factor.as<float>();
    const int64_t groups = x.size() / group_;
    // Groups of some 16 KiB together, so that a task is worth a thread.
    const int64_t together = group_ >= 4096 ? 1 : 4096 / group_;
    call.parallel(size_t((groups + together - 1) / together), [&](size_t task) {
      const int64_t end = groups < int64_t(task + 1) * together ? groups : int64_t(task + 1) * together;
      for (int64_t g = int64_t(task) * together; g < end; ++g) {
        if (x.type == ElementType::float16) {
          one(x.as<Half>() + g * group_, static_cast<Half*>(y) + g * group_, f, m);
        } else {
          one(x.as<float>() + g * group_, static_cast<float*>(y) + g * group_, f, m);
        }
      }
    });
  }

 private:
  template <typename V>
  void one(const V* x, V* y, const float* factor, int64_t m) const {
    thread_local std::vector<float> values;
    values.resize(size_t(group_));
    if (m == 1) {
      for (int64_t i = 0; i < group_; ++i) values[i] = to_float(x[i]) * factor[0];
    } else {
      for (int64_t block = 0; block < group_; block += m) {
        for (int64_t row = 0; row < m; ++row) {
          float total = 0;
          for (int64_t i = 0; i < m; ++i) total += factor[row * m + i] * to_float(x[block + i]);
          values[block + row] = total;
        }
      }
    }
    kernels().transform(values.data(), group_ / m, m);
    for (int64_t i = 0; i < group_; ++i) y[i] = from_float<V>(values[i] * scale_);
  }

  int64_t group_;
  float scale_;
};

void infer(Inference& inference) { inference.output(0, inference.type(0), inference.input(0)); }

const std::vector<ElementType> kT = {ElementType::float32, ElementType::float16};
const Registration registration{
    {"HadamardTransform", {{kT}, {{ElementType::float32}}}, {{kT}}, make<HadamardTransform>, infer}};

}  // namespace
}  // namespace graphopt::hadamard_transform
