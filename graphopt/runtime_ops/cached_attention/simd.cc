#include "kernels.h"
#include "simd.h"
#include "sums.h"

namespace graphopt::cached_attention::GRAPHOPT_ISA {
namespace {

constexpr bool kWide = kLanes >= 16;  // 32 registers
constexpr float kLow = -__builtin_inff();

// ---- one token

constexpr int kHeads = kWide ? 4 : 2;     // heads that read a key together
constexpr int64_t kAhead = 2048;  // bytes that are fetched before they are read

// Fetches `bytes` from kAhead behind `at` on, and what lies behind `end` from `next` on instead.
GRAPHOPT_INLINE void fetch(const void* at, int64_t bytes, const void* end, const void* next) {
  const char* from = static_cast<const char*>(at) + kAhead;
  const int64_t behind = from - static_cast<const char*>(end);
  if (behind + bytes > 0) {
    if (next == nullptr) return;
    from = static_cast<const char*>(next) + (behind > 0 ? behind : 0);
  }
  for (int64_t i = 0; i < bytes; i += 64) prefetch(from + i);
}

// The products of kH queries with kK keys.
template <typename E, int kH, int kK>
GRAPHOPT_INLINE void products(const E* keys, const float* queries, int64_t depth, float* out, int64_t stride) {
  F found[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    F query[kH];
    for (int h = 0; h < kH; ++h) query[h] = load(queries + h * depth + d);
#pragma GCC unroll 16
    for (int k = 0; k < kK; ++k) {
      const F key = read(keys + k * depth + d);
#pragma GCC unroll 4
      for (int h = 0; h < kH; ++h) found[h * kK + k] = fma(key, query[h], found[h * kK + k]);
    }
  }
  float made[kLanes];
  store(made, sums(found));
  for (; d < depth; ++d) {
    for (int k = 0; k < kK; ++k) {
      for (int h = 0; h < kH; ++h) made[h * kK + k] += number(keys[k * depth + d]) * queries[h * depth + d];
    }
  }
  for (int h = 0; h < kH; ++h) std::memcpy(out + h * stride, made + h * kK, kK * sizeof(float));
}

// The sums of kV vectors of the values, weighted for kH queries.
template <typename E, int kH, int kV>
GRAPHOPT_INLINE void weighted(const E* values, const E* end, int64_t count, int64_t depth, const float* weights,
                              float* out, bool first) {
  F found[kH][kV] = {};
  for (int64_t k = 0; k < count; ++k) {
    if (first) fetch(values + k * depth, depth * int64_t(sizeof(E)), end, nullptr);
    F value[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) value[v] = read(values + k * depth + v * kLanes);
#pragma GCC unroll 4
    for (int h = 0; h < kH; ++h) {
      const F weight = spread(weights + h * count + k);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) found[h][v] = fma(weight, value[v], found[h][v]);
    }
  }
  for (int h = 0; h < kH; ++h) {
    for (int v = 0; v < kV; ++v) store(out + h * depth + v * kLanes, found[h][v]);
  }
}

// Scores become e^(score - most); most and their sum come back.
GRAPHOPT_INLINE void softmax(float* scores, int64_t count, float softcap, float* most, float* total) {
  const int64_t full = count / kLanes * kLanes;
  // The last few stand in a vector of their own, behind scores that weigh nothing.
  float rest[kLanes];
  for (int i = 0; i < kLanes; ++i) rest[i] = full + i < count ? scores[full + i] : kLow;
  F tail = load(rest), peak = tail;
  if (softcap > 0) {
    peak = tail = tail == kLow ? tail : capped(tail, softcap);
    for (int64_t i = 0; i < full; i += kLanes) {
      const F score = capped(load(scores + i), softcap);
      store(scores + i, score);
      peak = larger(score, peak);
    }
  } else {
    for (int64_t i = 0; i < full; i += kLanes) peak = larger(load(scores + i), peak);
  }
  const float found = largest(peak);
  const F shift = all(found == kLow ? 0.0f : found);
  F sum_of = {};
  for (int64_t i = 0; i < full; i += kLanes) {
    const F weight = exponential(load(scores + i) - shift);
    store(scores + i, weight);
    sum_of += weight;
  }
  tail = tail == kLow ? F{} : exponential(tail - shift);
  store(rest, tail);
  for (int64_t i = full; i < count; ++i) scores[i] = rest[i - full];
  *most = found;
  *total = sum(sum_of + tail);
}

template <typename E, int kH>
GRAPHOPT_INLINE void heads_of_piece(const Piece<E>& p, int64_t head, bool first) {
  constexpr int kK = kLanes / kH;
  const float* queries = p.queries + head * p.depth;
  float* weights = p.weights + head * p.count;
  const E* end = p.keys + p.count * p.depth;
  int64_t k = 0;
  for (; k + kK <= p.count; k += kK) {
    if (first) fetch(p.keys + k * p.depth, kK * p.depth * int64_t(sizeof(E)), end, p.values);
    products<E, kH, kK>(p.keys + k * p.depth, queries, p.depth, weights + k, p.count);
  }
  for (; k < p.count; ++k) products<E, kH, 1>(p.keys + k * p.depth, queries, p.depth, weights + k, p.count);
  const E* values_end = p.values + p.count * p.depth;
  for (int h = 0; h < kH; ++h) {
    softmax(weights + h * p.count, p.count, p.softcap, p.most + head + h, p.total + head + h);
  }
  float* out = p.sums + head * p.depth;
  int64_t d = 0;
  for (; d + 4 * kLanes <= p.depth; d += 4 * kLanes) {
    weighted<E, kH, 4>(p.values + d, values_end, p.count, p.depth, weights, out + d, first && d == 0);
  }
  for (; d + kLanes <= p.depth; d += kLanes) {
    weighted<E, kH, 1>(p.values + d, values_end, p.count, p.depth, weights, out + d, first && d == 0);
  }
  for (; d < p.depth; ++d) {
    for (int h = 0; h < kH; ++h) {
      float total = 0;
      for (k = 0; k < p.count; ++k) total += weights[h * p.count + k] * number(p.values[k * p.depth + d]);
      out[h * p.depth + d] = total;
    }
  }
}

template <typename E>
GRAPHOPT_INLINE void every_head(const Piece<E>& p) {
  for (int64_t head = 0; head < p.heads;) {
    const int64_t left = p.heads - head, now = left < kHeads ? left : kHeads;
    switch (now) {
#if defined(__AVX512F__)
      case 4: heads_of_piece<E, 4>(p, head, head == 0); break;
      case 3: heads_of_piece<E, 3>(p, head, head == 0); break;
#endif
      case 2: heads_of_piece<E, 2>(p, head, head == 0); break;
      default: heads_of_piece<E, 1>(p, head, head == 0); break;
    }
    head += now;
  }
}

void piece(const Piece<float>& p) { every_head(p); }
void piece_of_halves(const Piece<uint16_t>& p) { every_head(p); }

// ---- several tokens

#if defined(__AVX512F__)
constexpr int kRows = 8;
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif

// c [kRows, kV vectors] becomes a [kRows, length] times b [length, kV vectors], added to `factors` [kRows] times what it
// was; nullptr: to nothing.
template <int kV>
GRAPHOPT_INLINE void tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t length, float* c,
                          int64_t c_stride, const float* factors) {
  F found[kRows][kV];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kV; ++v) {
      found[r][v] = factors == nullptr ? F{} : load(c + r * c_stride + v * kLanes) * spread(factors + r);
    }
  }
  for (int64_t i = 0; i < length; ++i) {
    F row[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) row[v] = load(b + i * b_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F factor = spread(a + r * a_stride + i);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) found[r][v] = fma(factor, row[v], found[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kV; ++v) store(c + r * c_stride + v * kLanes, found[r][v]);
  }
}

// Scores of kRows rows from `row` on become weights e^(score - most), 0 for what a row doesn't see and for e^-87 and
// less; `factors` are those by which what was found for earlier keys counts less now.
GRAPHOPT_INLINE void weigh(const Block& b, int64_t row, int64_t end, float* factors) {
  const int64_t width = (end + kLanes - 1) / kLanes * kLanes;
  float most[kRows + kLanes] = {};
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float* scores = b.scores + r * kBlock;
    if (b.softcap > 0) {
      for (int64_t i = 0; i < width; i += kLanes) store(scores + i, capped(load(scores + i), b.softcap));
    }
    const int64_t seen = b.last + 1 + (row + r) / b.heads, first = seen - b.window;
    for (int64_t i = 0; i < first && i < width; ++i) scores[i] = kLow;
    for (int64_t i = seen < 0 ? 0 : seen < end ? seen : end; i < width; ++i) scores[i] = kLow;
    F peak = load(scores);
    // What is no number isn't the largest; it comes out of the sum.
    peak = larger(peak, all(b.most[row + r]));
    for (int64_t i = kLanes; i < width; i += kLanes) peak = larger(load(scores + i), peak);
    most[r] = largest(peak);
  }
  // All rows at once, as far as a vector holds them.
  for (int r = 0; r < kRows; r += kLanes) {
    float before[kLanes] = {};
    for (int i = 0; i < kLanes && r + i < kRows; ++i) before[i] = b.most[row + r + i];
    const F now = load(most + r), shift = now == kLow ? F{} : now;
    store(most + r, shift);
    float factor[kLanes];
    store(factor, exponential(load(before) - shift));
    for (int i = 0; i < kLanes && r + i < kRows; ++i) {
      factors[r + i] = factor[i];
      b.most[row + r + i] = now[i];
    }
  }
  F totals[kLanes] = {};
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float* scores = b.scores + r * kBlock;
    const F shift = spread(most + r);
    F total = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      const F x = load(scores + i) - shift;
      const F weight = x < -87.3f ? F{} : exponential(x);
      store(scores + i, weight);
      total += weight;
    }
    if (kRows <= kLanes) {
      totals[r % kLanes] = total;
    } else {
      b.total[row + r] = b.total[row + r] * factors[r] + sum(total);
    }
  }
  if (kRows <= kLanes) {
    const F total = sums(totals);
    for (int r = 0; r < kRows; ++r) b.total[row + r] = b.total[row + r] * factors[r] + total[r % kLanes];
  }
}

void block(const Block& b) {
  for (int64_t row = 0; row < b.rows; row += kRows) {
    const int64_t seen = b.last + 1 + (row + kRows - 1) / b.heads, end = seen < b.count ? seen : b.count;
    if (end <= 0 || b.last + 1 + row / b.heads - b.window >= b.count) continue;
    const float* queries = b.queries + row * b.depth;
    for (int64_t k = 0; k < end; k += 2 * kLanes) {
      tile<2>(queries, b.depth, b.keys + k, kBlock, b.depth, b.scores + k, kBlock, nullptr);
    }
    float factors[kRows];
    weigh(b, row, end, factors);
    float* out = b.sums + row * b.depth;
    int64_t d = 0;
    for (; d + 2 * kLanes <= b.depth; d += 2 * kLanes) {
      tile<2>(b.scores, kBlock, b.values + d, b.depth, end, out + d, b.depth, factors);
    }
    for (; d + kLanes <= b.depth; d += kLanes) {
      tile<1>(b.scores, kBlock, b.values + d, b.depth, end, out + d, b.depth, factors);
    }
    for (; d < b.depth; ++d) {
      for (int r = 0; r < kRows; ++r) {
        float total = out[r * b.depth + d] * factors[r];
        for (int64_t k = 0; k < end; ++k) total += b.scores[r * kBlock + k] * b.values[k * b.depth + d];
        out[r * b.depth + d] = total;
      }
    }
  }
}

void columns(const float* rows, int64_t count, int64_t depth, float* to) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    int64_t d = 0;
    for (; d + kLanes <= depth; d += kLanes) {
      F values[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) values[i] = load(rows + (k + i) * depth + d);
      transpose(values);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (d + i) * kBlock + k, values[i]);
    }
    for (; d < depth; ++d) {
      for (int i = 0; i < kLanes; ++i) to[d * kBlock + k + i] = rows[(k + i) * depth + d];
    }
  }
  for (; k < kBlock; ++k) {
    for (int64_t d = 0; d < depth; ++d) to[d * kBlock + k] = k < count ? rows[k * depth + d] : 0.0f;
  }
}

void widen(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, read(from + i));
  for (; i < count; ++i) to[i] = number(from[i]);
}

}  // namespace

const Kernels variant = {kRows, piece, piece_of_halves, block, columns, widen};

}  // namespace graphopt::cached_attention::GRAPHOPT_ISA
