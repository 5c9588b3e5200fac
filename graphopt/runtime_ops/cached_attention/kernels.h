// Inner loops of CachedAttention. Nothing reads or writes beyond the sizes given.
#pragma once

#include <cstdint>

#include "isa.h"

namespace graphopt::cached_attention {

// Queries of one token over some keys that all of them see.
template <typename E>
struct Piece {
  const E* keys;         // [count, depth]
  const E* values;       // [count, depth]
  int64_t count, depth;
  const float* queries;  // [heads, depth], times the scale
  int64_t heads;
  float softcap;    // 0: none
  float* weights;   // room for [heads, count]
  float* sums;      // [heads, depth]: the values, weighted with e^(score - most)
  float* most;      // [heads]: the largest score
  float* total;     // [heads]: the sum of e^(score - most)
};

// Queries of several tokens over some keys, added to what was found for the keys before them. A row is a query head of
// a token; the rows of a token stand together. There are a multiple of `Kernels::rows`, the last ones anything finite.
struct Block {
  const float* queries;  // [rows, depth], times the scale
  int64_t rows, depth;
  const float* keys;     // [depth, kBlock]: each key a column; zeros beyond the last
  const float* values;   // [keys, depth]
  int64_t count;         // keys
  int64_t heads;         // rows of a token
  int64_t last;          // the first token sees the keys up to this one, the next token one more
  int64_t window;        // how many of them it sees at most
  float softcap;
  float* scores;  // room for [Kernels::rows, kBlock]
  float* sums;    // [rows, depth]
  float* most;    // [rows]
  float* total;   // [rows]
};
constexpr int64_t kBlock = 64;

struct Kernels {
  int64_t rows;  // rows that are computed together
  void (*piece)(const Piece<float>& piece);
  void (*piece_of_halves)(const Piece<uint16_t>& piece);
  void (*block)(const Block& block);
  // Rows [count, depth] as columns [depth, kBlock], with zeros beyond the last.
  void (*columns)(const float* rows, int64_t count, int64_t depth, float* to);
  // Half-precision numbers as floats.
  void (*widen)(const uint16_t* from, int64_t count, float* to);
};

GRAPHOPT_ISA_VARIANTS(Kernels)

}  // namespace graphopt::cached_attention
