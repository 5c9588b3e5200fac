// Half-precision numbers, and sums, products and exponentials of floats. Only for simd.cc.
#pragma once

#include "four_vectors.h"
#include "kernels.h"
#include "simd_memory.h"

namespace graphopt::quantized_kv_attention::GRAPHOPT_ISA {
namespace {

using namespace graphopt::GRAPHOPT_ISA;

void widen(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load_first(from + i, count - i), count - i);
}

void narrow(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load_first(from + i, count - i), count - i);
}

void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  int64_t i = 0;
#if defined(__x86_64__)
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      const float* at = from + i * columns + j;
      __m128 a = _mm_loadu_ps(at), b = _mm_loadu_ps(at + columns);
      __m128 c = _mm_loadu_ps(at + 2 * columns), d = _mm_loadu_ps(at + 3 * columns);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(to + j * rows + i, a);
      _mm_storeu_ps(to + (j + 1) * rows + i, b);
      _mm_storeu_ps(to + (j + 2) * rows + i, c);
      _mm_storeu_ps(to + (j + 3) * rows + i, d);
    }
    for (; j < columns; ++j) {
      for (int64_t k = i; k < i + 4; ++k) to[j * rows + k] = from[k * columns + j];
    }
  }
#endif
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
  }
}

template <int kM, int kV>
GRAPHOPT_INLINE void multiply_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                                   int64_t ldc, bool add) {
  F sums[kM][kV];
  for (int i = 0; i < kM; ++i) {
    for (int v = 0; v < kV; ++v) sums[i][v] = add ? load(c + i * ldc + v * kLanes) : all(0);
  }
  for (int64_t p = 0; p < k; ++p) {
    F row[kV];
    for (int v = 0; v < kV; ++v) row[v] = load(b + p * ldb + v * kLanes);
    for (int i = 0; i < kM; ++i) {
      const F factor = all(a[i * lda + p]);
      for (int v = 0; v < kV; ++v) sums[i][v] = fma(factor, row[v], sums[i][v]);
    }
  }
  for (int i = 0; i < kM; ++i) {
    for (int v = 0; v < kV; ++v) store(c + i * ldc + v * kLanes, sums[i][v]);
  }
}

template <int kM>
GRAPHOPT_INLINE void multiply_rows(int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                                   float* c, int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) multiply_tile<kM, 2>(k, a, lda, b + j, ldb, c + j, ldc, add);
  for (; j + kLanes <= n; j += kLanes) multiply_tile<kM, 1>(k, a, lda, b + j, ldb, c + j, ldc, add);
  for (; j < n; ++j) {
    for (int i = 0; i < kM; ++i) {
      float total = add ? c[i * ldc + j] : 0;
      for (int64_t p = 0; p < k; ++p) total += a[i * lda + p] * b[p * ldb + j];
      c[i * ldc + j] = total;
    }
  }
}

void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
              int64_t ldc, bool add) {
  int64_t i = 0;
  if constexpr (kLanes >= 16) {  // with registers for so many
    for (; i + 8 <= m; i += 8) multiply_rows<8>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
  }
  for (; i + 4 <= m; i += 4) multiply_rows<4>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
  for (; i + 3 <= m; i += 3) multiply_rows<3>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
  for (; i < m; ++i) multiply_rows<1>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
}

void dot_rows(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* out, int64_t out_stride) {
  for (int64_t j = 0; j < n; ++j) {
    const float* row = b + j * k;
    for (int64_t first = 0; first < m; first += 4) {
      const float* rows[4];  // the last one again where there are fewer
      for (int64_t i = 0; i < 4; ++i) rows[i] = a + (first + i < m ? first + i : m - 1) * k;
      F sums[4] = {all(0), all(0), all(0), all(0)};
      int64_t p = 0;
      for (; p + kLanes <= k; p += kLanes) {
        const F x = load(row + p);
        for (int i = 0; i < 4; ++i) sums[i] = fma(load(rows[i] + p), x, sums[i]);
      }
      float made[4];
      four_sums(sums[0], sums[1], sums[2], sums[3], made);
      for (; p < k; ++p) {
        for (int i = 0; i < 4; ++i) made[i] += rows[i][p] * row[p];
      }
      for (int64_t i = 0; i < 4 && first + i < m; ++i) out[(first + i) * out_stride + j] = made[i];
    }
  }
}

float largest_of(const float* values, int64_t count) {
  if (count < kLanes) {
    float found = values[0];
    for (int64_t i = 1; i < count; ++i) found = values[i] > found ? values[i] : found;
    return found;
  }
  F found = load(values);
  for (int64_t i = kLanes; i + kLanes <= count; i += kLanes) found = larger(load(values + i), found);
  return largest(larger(load(values + count - kLanes), found));
}

// exp(x) for x <= 0; nothing at all where it is next to nothing.
GRAPHOPT_INLINE F weight_of(F x) { return x < -87.3f ? all(0) : exponential(x); }

float exponentials(float* values, int64_t count, float largest) {
  F total = all(0);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F made = weight_of(load(values + i) - largest);
    store(values + i, made);
    total += made;
  }
  float made = sum(total);
  if (i < count) {
    const F last = weight_of(load_first(values + i, count - i) - largest);
    store_first(values + i, last, count - i);
    for (int64_t j = i; j < count; ++j) made += values[j];
  }
  return made;
}

GRAPHOPT_INLINE F capped(F value, float cap) {
  const F x = value / cap;
  const F power = exponential((x < 0 ? x : -x) * 2.0f);
  const F made = (1.0f - power) / (1.0f + power) * cap;
  return x < 0 ? -made : made;
}

void cap(float* values, int64_t count, float cap) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(values + i, capped(load(values + i), cap));
  if (i < count) store_first(values + i, capped(load_first(values + i, count - i), cap), count - i);
}

void scale(float* values, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

}  // namespace
}  // namespace graphopt::quantized_kv_attention::GRAPHOPT_ISA
