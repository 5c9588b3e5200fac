// A transform of 2^k rows is k levels of sums and differences. As many of them as the registers have room for are done
// between one load and one store, in the order of the levels, so that every number comes out the same whatever the width
// of a vector.
#include "kernels.h"
#include "simd_matmul.h"
#include "simd_quantize.h"

namespace graphopt::hadamard_transform::GRAPHOPT_ISA {
namespace {

using namespace graphopt::GRAPHOPT_ISA;

#if defined(__AVX512F__)
constexpr int kLaneLevels = 4;
constexpr int kPassLevels = 4;
#elif defined(__AVX2__)
constexpr int kLaneLevels = 3;
constexpr int kPassLevels = 3;
#else
constexpr int kLaneLevels = 2;
constexpr int kPassLevels = 3;
#endif
static_assert(kLanes == 1 << kLaneLevels);

// What is read ahead of the rows at hand, in bytes.
constexpr int64_t kAhead = 2048;

// The levels within a vector. A product with 1 or -1 is exact, so that these are the sums and differences themselves.
#define GRAPHOPT_LEVEL(swapped, ...) value = fma(value, F{__VA_ARGS__}, (F)(swapped))
GRAPHOPT_INLINE F within(F value) {
#if defined(__AVX512F__)
  GRAPHOPT_LEVEL(_mm512_permute_ps((__m512)value, 0xb1), 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1);
  GRAPHOPT_LEVEL(_mm512_permute_ps((__m512)value, 0x4e), 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1);
  GRAPHOPT_LEVEL(_mm512_shuffle_f32x4((__m512)value, (__m512)value, 0xb1), 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1,
                 -1, -1, -1);
  GRAPHOPT_LEVEL(_mm512_shuffle_f32x4((__m512)value, (__m512)value, 0x4e), 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1,
                 -1, -1, -1);
#elif defined(__AVX2__)
  GRAPHOPT_LEVEL(_mm256_permute_ps((__m256)value, 0xb1), 1, -1, 1, -1, 1, -1, 1, -1);
  GRAPHOPT_LEVEL(_mm256_permute_ps((__m256)value, 0x4e), 1, 1, -1, -1, 1, 1, -1, -1);
  GRAPHOPT_LEVEL(_mm256_permute2f128_ps((__m256)value, (__m256)value, 0x01), 1, 1, 1, 1, -1, -1, -1, -1);
#else
  const F first = {value[0] + value[1], value[0] - value[1], value[2] + value[3], value[2] - value[3]};
  value = F{first[0] + first[2], first[1] + first[3], first[0] - first[2], first[1] - first[3]};
#endif
  return value;
}
#undef GRAPHOPT_LEVEL

// kLevels levels of the rows at `from`, each a vector, or the first `count` lanes of one where kPart.
template <int kLevels, bool kWithin, bool kScaled, bool kPart, typename From, typename To>
GRAPHOPT_INLINE void butterfly(const From* from, To* to, int64_t width, float scale, int64_t count) {
  constexpr int kRows = 1 << kLevels;
  F rows[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    rows[r] = kPart ? load_first(from + r * width, count) : load(from + r * width);
    if constexpr (kWithin) rows[r] = within(rows[r]);
  }
#pragma GCC unroll 4
  for (int level = 0; level < kLevels; ++level) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      if ((r >> level & 1) == 0) {
        const int other = r + (1 << level);
        const F sum = rows[r] + rows[other], difference = rows[r] - rows[other];
        rows[r] = sum;
        rows[other] = difference;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kScaled) rows[r] *= all(scale);
    if constexpr (kPart) {
      store_first(to + r * width, rows[r], count);
    } else {
      store(to + r * width, rows[r]);
    }
  }
}

// kLevels levels of `size` numbers, the rows of the first of them `width` numbers apart. kWithin: the levels within a
// vector before them, which is what a row then is.
template <int kLevels, bool kWithin, bool kScaled, typename From, typename To>
void pass(const From* from, To* to, int64_t size, int64_t width, float scale) {
  const int64_t block = width << kLevels;
  for (int64_t base = 0; base < size; base += block) {
    if constexpr (kWithin) {
      for (int64_t at = 0; at < block; at += 64 / int64_t(sizeof(From))) prefetch((const char*)(from + base + at) + kAhead);
      butterfly<kLevels, true, kScaled, false>(from + base, to + base, kLanes, scale, kLanes);
    } else {
      int64_t column = 0;
      for (; column + kLanes <= width; column += kLanes) {
        butterfly<kLevels, false, kScaled, false>(from + base + column, to + base + column, width, scale, kLanes);
      }
      if (column < width) {
        butterfly<kLevels, false, kScaled, true>(from + base + column, to + base + column, width, scale, width - column);
      }
    }
  }
}

template <bool kWithin, bool kScaled, typename From, typename To>
GRAPHOPT_INLINE void pass(int levels, const From* from, To* to, int64_t size, int64_t width, float scale) {
  switch (levels) {
    case 0: return pass<0, kWithin, kScaled>(from, to, size, width, scale);
    case 1: return pass<1, kWithin, kScaled>(from, to, size, width, scale);
    case 2: return pass<2, kWithin, kScaled>(from, to, size, width, scale);
#if defined(__AVX512F__)
    case 3: return pass<3, kWithin, kScaled>(from, to, size, width, scale);
    default: return pass<4, kWithin, kScaled>(from, to, size, width, scale);
#else
    default: return pass<3, kWithin, kScaled>(from, to, size, width, scale);
#endif
  }
}

// Levels of the next of so many passes.
GRAPHOPT_INLINE int share(int levels, int passes) { return (levels + passes - 1) / passes; }
GRAPHOPT_INLINE int passes_for(int levels) { return levels == 0 ? 1 : share(levels, kPassLevels); }

// The last `levels`, from `width` on: in place, and to y with the last pass.
template <typename To>
GRAPHOPT_INLINE void finish(int levels, float* values, To* y, int64_t size, int64_t width, float scale) {
  for (int passes = passes_for(levels); passes > 1; --passes) {
    const int now = share(levels, passes);
    pass<false, false>(now, values, values, size, width, 1);
    levels -= now;
    width <<= now;
  }
  pass<false, true>(levels, values, y, size, width, scale);
}

GRAPHOPT_INLINE float number(float value) { return value; }
GRAPHOPT_INLINE float number(uint16_t half) { return half_to_float(half); }
GRAPHOPT_INLINE void put(float* to, float value) { *to = value; }
GRAPHOPT_INLINE void put(uint16_t* to, float value) { *to = half_from_float(value); }

template <typename From>
GRAPHOPT_INLINE void widen(const From* from, float* to, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    prefetch((const char*)(from + i) + kAhead);
    store(to + i, load(from + i));
  }
  for (; i < size; ++i) to[i] = number(from[i]);
}

template <typename From, typename To>
void transform(const Plan& plan, const From* x, To* y, float* scratch) {
  const int levels = __builtin_ctzll(uint64_t(plan.halves));
  const int64_t m = plan.m, size = plan.halves * m;
  if (m > 1) {
    constexpr int64_t kRows = kChunkRows;
    for (int64_t row = 0; row < plan.halves; row += kRows) {
      const int64_t rows = plan.halves - row < kRows ? plan.halves - row : kRows;
      const float* left;
      if constexpr (sizeof(From) == sizeof(float)) {
        for (int64_t at = 0; at < rows * m; at += 16) prefetch((const char*)(x + row * m + at) + kAhead);
        left = x + row * m;
      } else {
        widen(x + row * m, scratch + size, rows * m);
        left = scratch + size;
      }
      multiply<false, false>(left, m, plan.factor, rows, m, m, scratch + row * m, m);
    }
    return finish(levels, scratch, y, size, m, plan.scale);
  }
  if (levels < kLaneLevels) {
    float values[kLanes];
    for (int64_t i = 0; i < size; ++i) values[i] = number(x[i]) * plan.one;
    for (int64_t width = 1; width < size; width *= 2) {
      for (int64_t i = 0; i < size; ++i) {
        if ((i & width) != 0) continue;
        const float first = values[i], second = values[i + width];
        values[i] = first + second;
        values[i + width] = first - second;
      }
    }
    for (int64_t i = 0; i < size; ++i) put(y + i, values[i] * plan.scale);
    return;
  }
  const int passes = passes_for(levels - kLaneLevels), first = share(levels - kLaneLevels, passes);
  if (plan.one != 1) {
    widen(x, scratch, size);
    for (int64_t i = 0; i < size; i += kLanes) store(scratch + i, load(scratch + i) * plan.one);
    pass<true, false>(first, scratch, scratch, size, kLanes, 1);
  } else if (passes == 1) {
    return pass<true, true>(first, x, y, size, kLanes, plan.scale);
  } else {
    pass<true, false>(first, x, scratch, size, kLanes, 1);
  }
  finish(levels - kLaneLevels - first, scratch, y, size, int64_t(kLanes) << first, plan.scale);
}

void panels_of(const float* factor, int64_t m, float* panels) { into_panels<true>(factor, m, m, panels); }

float quantize(const float* values, int64_t size, float clip, float largest, uint8_t* bytes) {
  return quantize_symmetric(values, size, clip, largest, bytes);
}

}  // namespace

const Kernels variant = {panels_of, transform<float, float>, transform<uint16_t, uint16_t>, transform<uint16_t, float>,
                         quantize};

}  // namespace graphopt::hadamard_transform::GRAPHOPT_ISA
