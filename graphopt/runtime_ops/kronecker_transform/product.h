// What KroneckerTransform and KroneckerQuantize have in common on the CPU: tokens between the two matrices.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "kernels.h"
#include "operator.h"
#include "sizes.h"

namespace graphopt::kronecker_transform {

class Product {
 public:
  // Of inputs x, left and right.
  explicit Product(const Node& node) : inner_(kernels()) {
    Tensor right;
    if (node.constant(2, &right)) {
      require_square(right, "right");
      kept_ = into_panels(right, memory_);
    }
  }

  const Kernels& inner() const { return inner_; }

  // The plan for a call. A matrix B that is no constant of the model is laid out in `memory`.
  Plan plan(const Sizes& sizes, const Tensor& left, const Tensor& right, Buffer& memory) const {
    return {sizes.a, sizes.b, left.as<float>(), kept_ != nullptr ? kept_ : into_panels(right, memory)};
  }

  // Transforms the tokens of x, and calls finish(token, y) where a token's y is there, of as many numbers as its x has.
  // Where `y` is nullptr it is the token's own memory of floats instead of an output in the type of x.
  template <typename F>
  void run(Call& call, const Plan& plan, const Tensor& x, void* y, F&& finish) const {
    const bool half = x.type == ElementType::float16;
    const int64_t size = plan.a * plan.b, tokens = x.size() / size, work = size * (plan.a + plan.b);
    const int64_t bytes = half ? 2 : 4;
    const auto from = [&](int64_t token) { return x.as<char>() + token * size * bytes; };
    const auto to = [&](int64_t token, float* own) -> void* {
      return y == nullptr ? static_cast<void*>(own) : static_cast<char*>(y) + token * size * bytes;
    };
    const auto second = inner_.second[half && y != nullptr];
    if (tokens < kSplit && work >= 2 * kTaskWork) {
      // Threads share a token: parts of the one product, then parts of the other.
      const int64_t parts = std::min<int64_t>(plan.a, kParts);
      float* scratch = memory(plan);
      for (int64_t token = 0; token < tokens; ++token) {
        void* at = to(token, scratch + scratch_size(plan.a, plan.b));
        call.phases({size_t(parts), size_t(parts)}, [&](size_t phase, size_t part) {
          const int64_t begin = plan.a * int64_t(part) / parts, end = plan.a * int64_t(part + 1) / parts;
          if (phase == 0) {
            inner_.first[half](plan, from(token), scratch, begin, end);
          } else {
            second(plan, scratch, at, begin, end);
          }
        });
        finish(token, static_cast<float*>(at));
      }
      return;
    }
    const int64_t together = work >= kTaskWork ? 1 : kTaskWork / work;
    call.parallel(size_t((tokens + together - 1) / together), [&](size_t task) {
      float* scratch = memory(plan);
      const int64_t end = std::min(tokens, int64_t(task + 1) * together);
      for (int64_t token = int64_t(task) * together; token < end; ++token) {
        void* at = to(token, scratch + scratch_size(plan.a, plan.b));
        inner_.first[half](plan, from(token), scratch, 0, plan.a);
        second(plan, scratch, at, 0, plan.a);
        finish(token, static_cast<float*>(at));
      }
    });
  }

 private:
  static constexpr int64_t kTaskWork = 1 << 19;  // multiplications that are worth the call of a thread
  static constexpr int64_t kSplit = 2;           // from so many tokens on a thread takes a whole one
  static constexpr int64_t kParts = 2;

  const float* into_panels(const Tensor& right, Buffer& memory) const {
    const int64_t b = right.dim(0);
    float* panels = reinterpret_cast<float*>(memory.reserve(sizeof(float) * size_t(b * ((b + 15) / 16 * 16))));
    inner_.into_panels(right.as<float>(), b, panels);
    return panels;
  }

  // Of this thread: the scratch of a token, and its result.
  static float* memory(const Plan& plan) {
    thread_local Buffer memory;
    const int64_t numbers = scratch_size(plan.a, plan.b) + plan.a * plan.b;
    return reinterpret_cast<float*>(memory.reserve(sizeof(float) * size_t(numbers)));
  }

  const Kernels& inner_;  // as it was when B was laid out
  Buffer memory_;
  const float* kept_ = nullptr;  // B, where it is a constant of the model
};

}  // namespace graphopt::kronecker_transform
