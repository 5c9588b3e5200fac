#include "kernels.h"
#include "simd_matmul.h"
#include "simd_quantize.h"

namespace graphopt::kronecker_transform::GRAPHOPT_ISA {
namespace {

using namespace graphopt::GRAPHOPT_ISA;

// What is read ahead of the numbers at hand, in bytes.
constexpr int64_t kAhead = 2048;

template <typename From, typename To>
GRAPHOPT_INLINE void convert(const From* from, To* to, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    prefetch((const char*)(from + i) + kAhead);
    store(to + i, load(from + i));
  }
  if (i < size) store_first(to + i, load_first(from + i, size - i), size - i);
}

void panels_of(const float* right, int64_t b, float* panels) { into_panels<false>(right, b, b, panels); }

template <typename V>
void first(const Plan& plan, const void* x, float* scratch, int64_t begin, int64_t end) {
  const int64_t a = plan.a, b = plan.b;
  const V* rows = static_cast<const V*>(x) + begin * b;
  const float* left;
  if constexpr (sizeof(V) == sizeof(float)) {
    left = rows;
  } else {
    float* floats = scratch + panels_size(a, b) + begin * b;
    convert(rows, floats, (end - begin) * b);
    left = floats;
  }
  multiply<false, true>(left, b, plan.right, end - begin, b, b, scratch, a, begin);
}

template <typename V>
void second(const Plan& plan, float* scratch, void* y, int64_t begin, int64_t end) {
  const int64_t a = plan.a, b = plan.b;
  V* rows = static_cast<V*>(y) + begin * b;
  if constexpr (sizeof(V) == sizeof(float)) {
    multiply<true, false>(plan.left + begin, a, scratch, end - begin, a, b, rows, b);
  } else {
    float* floats = scratch + panels_size(a, b) + begin * b;
    multiply<true, false>(plan.left + begin, a, scratch, end - begin, a, b, floats, b);
    convert(floats, rows, (end - begin) * b);
  }
}

float quantize(const float* values, int64_t size, float clip, float largest, uint8_t* bytes) {
  return quantize_symmetric(values, size, clip, largest, bytes);
}

}  // namespace

const Kernels variant = {panels_of, {first<float>, first<uint16_t>}, {second<float>, second<uint16_t>}, quantize};

}  // namespace graphopt::kronecker_transform::GRAPHOPT_ISA
