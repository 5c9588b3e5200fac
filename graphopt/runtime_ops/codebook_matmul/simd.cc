#include "byte_dot.h"
#include "kernels.h"
#include "lookup.h"
#include "simd.h"
#include "spread.h"

namespace graphopt::codebook_matmul::GRAPHOPT_ISA {
namespace {

constexpr int64_t kBlock = 8 * kLanes;

void round_blocks(float* x, int64_t columns, int64_t size, float* steps, int8_t* q) {
  for (int64_t base = 0; base < columns; base += size, x += size, ++steps) {
    const int64_t here = columns - base < size ? columns - base : size;
    F most = {}, zeros = {};
    int64_t i = 0;
    for (; i + kLanes <= here; i += kLanes) {
      const F value = load(x + i);
      most = larger(larger(value, -value), most);
      zeros = fma(value, F{}, zeros);  // NaN where one isn't finite
    }
    float found = largest(most), none = sum(zeros);
    for (; i < here; ++i) {
      const float size_of = x[i] < 0 ? -x[i] : x[i];
      found = size_of > found ? size_of : found;
      none += x[i] * 0.0f;
    }
    const float step = found / 127.0f + none, by = step == 0 ? 1.0f : step;
    *steps = step;
    for (i = 0; i < here; ++i) {
      constexpr float kUnits = 12582912.0f;  // beside it, the last place of a float is 1: half to even
      const float whole = (x[i] / by + kUnits) - kUnits;
      x[i] = whole * step;
      if (q != nullptr) q[base + i] = step == step ? int8_t(int32_t(whole)) : int8_t(0);
    }
  }
}

void arrange(const int8_t* q, const float* block_steps, int64_t columns, int64_t size, int64_t blocks, int8_t* numbers,
             float* steps, float* sums) {
  int8_t whole[kBlock];
  for (int64_t block = 0; block < blocks; ++block, numbers += kBlock) {
    const int8_t* from = q + block * kBlock;
    if (const int64_t left = columns - block * kBlock; left < kBlock) {
      for (int64_t i = 0; i < kBlock; ++i) whole[i] = i < left ? from[i] : int8_t(0);
      from = whole;
    }
    for (int64_t i = 0; i < kBlock / 2; ++i) {
      numbers[i] = from[2 * i];
      numbers[kBlock / 2 + i] = from[2 * i + 1];
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      int32_t total = 0;
      for (int64_t i = 0; i < 8; ++i) total += from[8 * lane + i];
      const int64_t column = block * kBlock + 8 * lane;
      sums[block * kLanes + lane] = float(total);
      steps[block * kLanes + lane] = column < columns ? block_steps[column / size] : 0.0f;
    }
  }
}

void interleave(const float* from, int64_t columns, float* to) {
  for (; columns >= kBlock; columns -= kBlock, from += kBlock, to += kBlock) {
    for (int64_t place = 0; place < 8; ++place) {
#if defined(__AVX512F__)
      const __m512i at = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
      _mm512_storeu_ps(to + place * kLanes, _mm512_i32gather_ps(at, from + place, 4));
#else
      for (int64_t lane = 0; lane < kLanes; ++lane) to[place * kLanes + lane] = from[8 * lane + place];
#endif
    }
  }
  for (int64_t i = 0; columns > 0 && i < kBlock; ++i) {
    const int64_t column = i % kLanes * 8 + i / kLanes;
    to[i] = column < columns ? from[column] : 0.0f;
  }
}

template <int bits, int rows, typename S, bool several>
GRAPHOPT_INLINE void dot_rows(const Narrow& weights, int64_t first, const float* x, float* y) {
  const uint8_t* from[rows];
  const S* scales_of[rows];
  Table tables[rows];
  F totals[rows] = {};
  for (int r = 0; r < rows; ++r) {
    from[r] = weights.indices + (first + r) * weights.row_bytes;
    scales_of[r] = static_cast<const S*>(weights.scales) + (first + r) * weights.groups;
    tables[r] = table(weights.tables + kTable * (several ? 0 : book(weights, first + r, 0)));
  }
  for (int64_t block = 0; block < weights.blocks; ++block) {
    const float* at = x + block * kBlock;
    const int64_t group = weights.first_group[block];
    for (int r = 0; r < rows; ++r) {
      fetch(from[r] + kAhead);
      fetch(scales_of[r] + group + kScalesAhead / int64_t(sizeof(S)));
      I index = indices<bits>(from[r]);
      from[r] += kLanes * bits;
      if (several) tables[r] = table(weights.tables + kTable * book(weights, first + r, group));
      F even = numbers<bits>(tables[r], index) * load(at);
      F odd = numbers<bits>(tables[r], index >> bits) * load(at + kLanes);
#pragma GCC unroll 3
      for (int place = 2; place < 8; place += 2) {
        even = fma(numbers<bits>(tables[r], index >> bits * place), load(at + place * kLanes), even);
        odd = fma(numbers<bits>(tables[r], index >> bits * (place + 1)), load(at + (place + 1) * kLanes), odd);
      }
      totals[r] = fma(even + odd, scales(scales_of[r] + group, weights.lane_group + block * kLanes), totals[r]);
    }
  }
  for (int r = 0; r < rows; ++r) y[r] = sum(totals[r]);
}

template <int bits, typename S, bool several>
void dot(const Narrow& weights, int64_t first, int64_t count, const float* x, float* y) {
  constexpr int together = kLanes == 16 ? 4 : 2;
  int64_t row = 0;
  for (; row + together <= count; row += together) {
    dot_rows<bits, together, S, several>(weights, first + row, x, y + row);
  }
  for (; row < count; ++row) dot_rows<bits, 1, S, several>(weights, first + row, x, y + row);
}

template <int bits, typename S>
void write(const Narrow& weights, int64_t row, int64_t first_block, int64_t end_block, float* to) {
  const uint8_t* from = weights.indices + row * weights.row_bytes + first_block * kLanes * bits;
  for (int64_t block = first_block; block < end_block; ++block, from += kLanes * bits, to += kBlock) {
    fetch(from + kAhead);
    const int64_t group = weights.first_group[block];
    const Table numbers_of = table(weights.tables + kTable * book(weights, row, group));
    const F scale = scales(static_cast<const S*>(weights.scales) + row * weights.groups + group,
                           weights.lane_group + block * kLanes);
    const I index = indices<bits>(from);
#pragma GCC unroll 8
    for (int place = 0; place < 8; ++place) {
      store(to + place * kLanes, numbers<bits>(numbers_of, index >> bits * place) * scale);
    }
  }
}

template <typename S>
void narrow_dot_of(const Narrow& weights, int bits, int64_t first, int64_t count, const float* x, float* y) {
  const bool several = weights.selectors != nullptr;
  if (bits == 4) {
    (several ? dot<4, S, true> : dot<4, S, false>)(weights, first, count, x, y);
  } else if (bits == 3) {
    (several ? dot<3, S, true> : dot<3, S, false>)(weights, first, count, x, y);
  } else {
    (several ? dot<2, S, true> : dot<2, S, false>)(weights, first, count, x, y);
  }
}

void narrow_dot(const Narrow& weights, int bits, int64_t first, int64_t count, const float* x, float* y) {
  (weights.half_scales ? narrow_dot_of<uint16_t> : narrow_dot_of<float>)(weights, bits, first, count, x, y);
}

void narrow_write(const Narrow& weights, int bits, int64_t row, int64_t first_block, int64_t end_block, float* to) {
  const bool half = weights.half_scales;
  if (bits == 4) {
    (half ? write<4, uint16_t> : write<4, float>)(weights, row, first_block, end_block, to);
  } else if (bits == 3) {
    (half ? write<3, uint16_t> : write<3, float>)(weights, row, first_block, end_block, to);
  } else {
    (half ? write<2, uint16_t> : write<2, float>)(weights, row, first_block, end_block, to);
  }
}

// The sums of four vectors, added to y[0] to y[3].
GRAPHOPT_INLINE void add_sums(F a, F b, F c, F d, float* y) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  const __m128 whole = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  _mm_storeu_ps(y, _mm_add_ps(_mm_loadu_ps(y), whole));
#elif defined(__AVX2__)
  const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
  const __m256 halves = _mm256_hadd_ps(ab, cd);
  const __m128 whole = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  _mm_storeu_ps(y, _mm_add_ps(_mm_loadu_ps(y), whole));
#else
  y[0] += sum(a);
  y[1] += sum(b);
  y[2] += sum(c);
  y[3] += sum(d);
#endif
}

// A piece of the product: `height` rows of x with `width` rows of weights.
template <int height, int width>
GRAPHOPT_INLINE void piece(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t columns,
                           float* y, int64_t y_stride) {
  F totals[height][width] = {};
  for (int64_t k = 0; k < columns; k += kLanes) {
    F of_w[width];
    for (int n = 0; n < width; ++n) of_w[n] = load(w + n * w_stride + k);
    for (int m = 0; m < height; ++m) {
      const F of_x = load(x + m * x_stride + k);
      for (int n = 0; n < width; ++n) totals[m][n] = fma(of_x, of_w[n], totals[m][n]);
    }
  }
  for (int m = 0; m < height; ++m) {
    if constexpr (width == 4) {
      add_sums(totals[m][0], totals[m][1], totals[m][2], totals[m][3], y + m * y_stride);
    } else {
      for (int n = 0; n < width; ++n) y[m * y_stride + n] += sum(totals[m][n]);
    }
  }
}

// As many accumulators as there are registers for.
constexpr int kHeight = kLanes == 16 ? 6 : 2;

template <int height>
void strip(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t n, int64_t columns, float* y,
           int64_t y_stride) {
  int64_t row = 0;
  for (; row + 4 <= n; row += 4)
    piece<height, 4>(x, x_stride, w + row * w_stride, w_stride, columns, y + row, y_stride);
  for (; row < n; ++row) piece<height, 1>(x, x_stride, w + row * w_stride, w_stride, columns, y + row, y_stride);
}

void multiply(const float* x, int64_t x_stride, int64_t m, const float* w, int64_t w_stride, int64_t n, int64_t columns,
              float* y, int64_t y_stride) {
  int64_t row = 0;
  for (; row + kHeight <= m; row += kHeight) {
    strip<kHeight>(x + row * x_stride, x_stride, w, w_stride, n, columns, y + row * y_stride, y_stride);
  }
  for (; row + 2 <= m; row += 2) {
    strip<2>(x + row * x_stride, x_stride, w, w_stride, n, columns, y + row * y_stride, y_stride);
  }
  for (; row < m; ++row) strip<1>(x + row * x_stride, x_stride, w, w_stride, n, columns, y + row * y_stride, y_stride);
}

}  // namespace

const Kernels variant = {kLanes,   kBlock,       kLanes == 16, round_blocks, arrange,   interleave, narrow_dot,
                         byte_dot, narrow_write, unpack,       spread,       tiles_dot, multiply};

}  // namespace graphopt::codebook_matmul::GRAPHOPT_ISA
