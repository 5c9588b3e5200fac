// Inner loops of QuantizedKVAttention. Nothing reads or writes beyond the sizes given.
#pragma once

#include <cstdint>

#include "isa.h"

namespace graphopt::quantized_kv_attention {

// Sums of products of codes and integers, for up to kQueries vectors of integers at once:
//   sum[query][lane] = step[query] * (sum over rows and i < 4 of codes[row][lane][i] * integers[query][row][i])
//                      + offset[query]
// and out[query][lane] += sum, or sum * scale[lane] + total[query] * least[lane] where there is a scale.
struct Dot {
  const uint8_t* codes;
  int64_t rows, lanes;
  int64_t row_bytes;  // from one row of codes to the next
  int64_t queries;
  const uint8_t* words;  // of `integers`, `words_stride` bytes a query
  int64_t words_stride;
  const float* step;
  const float* offset;
  const float* scale;  // nullptr: none
  const float* least;
  const float* total;
  float* out;
  int64_t out_stride;
  const uint8_t* ahead;  // memory that is read soon, as much as the codes; nullptr: none
};
constexpr int64_t kQueries = 4;

struct Kernels {
  // Half-precision numbers as floats.
  void (*widen)(const uint16_t* from, int64_t count, float* to);
  // Floats as half-precision numbers, to nearest even.
  void (*narrow)(const float* from, int64_t count, uint16_t* to);
  // to [columns, rows] = from [rows, columns].
  void (*transpose)(const float* from, int64_t rows, int64_t columns, float* to);
  // `count` codes of 2, 3, 4 or 8 bits as bytes; count is a multiple of 8.
  void (*unpack)(const uint8_t* packed, int64_t count, int64_t bits, uint8_t* codes);
  // Of each of `queries` (at most kQueries) rows values[query * stride + i]: values[i] * factor[i] as integers of 16 bits
  // times a step, for `dot`, in 2 * count bytes of words a row. `offset` becomes the sum of values[i] * least[i], and of
  // what rounding left off times `middle`: so codes near `middle` cost least. Without factor and least (nullptr) they are
  // 1 and 0. count is a multiple of 4.
  void (*integers)(const float* values, int64_t stride, int64_t queries, const float* factor, const float* least,
                   int64_t count, float middle, uint8_t* words, float* step, float* offset);
  void (*dot)(const Dot& dot);
  // Keys [depth, width] of codes [depth / 4, width, 4], with scales per channel [depth] (group 0) or per token
  // [depth / group, width].
  void (*read_keys)(const uint8_t* codes, int64_t depth, int64_t width, int64_t group, const float* scale,
                    const float* least, float* keys);
  // Values [width, depth] of codes [width / 4, depth, 4], with scales per token [depth / group, width].
  void (*read_values)(const uint8_t* codes, int64_t depth, int64_t width, int64_t group, const float* scale,
                      const float* least, float* values);
  // Turns rows first[c] and second[c] of `keys` [depth, width] by cos and sin [pairs, width].
  void (*rotate)(float* keys, int64_t width, int64_t pairs, int64_t first_step, int64_t second_at, const float* cos,
                 const float* sin);
  // Turns features i and i + half of one head.
  void (*turn_row)(float* features, int64_t half, const float* cos, const float* sin);
  // The products of at most kQueries queries, [depth, kQueries], with what read_keys and rotate (of c and c + half) make:
  // out [queries, width]. Returns whether it could: half must be a multiple of 4, and width one of a vector's lanes.
  bool (*turned_scores)(const uint8_t* codes, int64_t depth, int64_t width, int64_t group, const float* scale,
                        const float* least, int64_t half, const float* cos, const float* sin, int64_t queries,
                        const float* of_queries, float* out);
  // c [m, n] = a [m, k] times b [k, n], added to what is there if `add`.
  void (*multiply)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                   int64_t ldc, bool add);
  // out[i * out_stride + j] = the dot product of a[i] [k] and b[j] [k], i < m, j < n; both with rows of k.
  void (*dot_rows)(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* out, int64_t out_stride);
  float (*largest)(const float* values, int64_t count);
  // values[i] becomes exp(values[i] - largest); returns their sum.
  float (*exponentials)(float* values, int64_t count, float largest);
  // values[i] becomes cap * tanh(values[i] / cap).
  void (*cap)(float* values, int64_t count, float cap);
  // values[i] *= factor.
  void (*scale)(float* values, int64_t count, float factor);
};

GRAPHOPT_ISA_VARIANTS(Kernels)

}  // namespace graphopt::quantized_kv_attention
