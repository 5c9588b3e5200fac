// Sizes of a node and of its cache, and where things lie.
#pragma once

#include <cstdint>

#include "float16.h"

namespace graphopt::quantized_kv_attention {

struct Layout {
  int64_t heads, kv_heads, depth;
  int64_t width, window;  // tokens of a block, and the newest ones that are never quantized
  int64_t key_bits, value_bits;
  int64_t group;  // features with one scale where there is a scale for each token
  bool per_channel;

  int64_t queries() const { return heads / kv_heads; }  // heads of queries for one of keys
  int64_t ring() const { return window + width; }
  int64_t groups() const { return depth / group; }
  int64_t numbers() const { return depth * width; }
  int64_t key_bytes() const { return numbers() * key_bits / 8; }
  int64_t code_bytes() const { return numbers() * (key_bits + value_bits) / 8; }
  int64_t key_scales() const { return per_channel ? depth : groups() * width; }
  int64_t value_scales() const { return groups() * width; }
  int64_t scale_numbers() const { return 2 * (key_scales() + value_scales()); }
  // Blocks that are quantized once there are `tokens` tokens.
  int64_t blocks(int64_t tokens) const { return tokens > window ? (tokens - window) / width : 0; }
};

// One row's tokens.
struct Row {
  int64_t total, past;
  int64_t left = 0;  // of a shared cache: its first blocks, of which tokens before the new ones are quantized for all
  int64_t fresh() const { return total - past; }
};

// The rotation by position; half is 0 where there is none.
struct Rotation {
  const float* cos;
  const float* sin;
  int64_t rows, half;
  bool interleaved, at_read;

  bool reads() const { return at_read && half > 0; }
  int64_t first_step() const { return interleaved ? 2 : 1; }   // from one pair's first feature to the next one's
  int64_t second_at() const { return interleaved ? 1 : half; }  // from a pair's first feature to its second

  // Turns one head's features. Each product is rounded before the sum, so that keys become the same numbers everywhere.
  void turn(float* features, int64_t position) const {
    const float* c = cos + position * half;
    const float* s = sin + position * half;
    for (int64_t pair = 0; pair < half; ++pair) {
      float& first = features[pair * first_step()];
      float& second = features[pair * first_step() + second_at()];
      const float a = first, b = second;
      first = a * c[pair] - b * s[pair];
      second = b * c[pair] + a * s[pair];
    }
  }
};

class TurnTables;

struct Cache {
  uint8_t* codes;     // [B, blocks, KV, code_bytes]
  uint16_t* scales;   // [B, blocks, KV, scale_numbers]
  uint16_t* recent;   // [B, KV, 2, ring, D]
  int64_t blocks;

  uint8_t* codes_of(const Layout& l, int64_t row, int64_t block, int64_t kv) const {
    return codes + ((row * blocks + block) * l.kv_heads + kv) * l.code_bytes();
  }
  uint16_t* scales_of(const Layout& l, int64_t row, int64_t block, int64_t kv) const {
    return scales + ((row * blocks + block) * l.kv_heads + kv) * l.scale_numbers();
  }
  // Keys (0) or values (1) of a token.
  uint16_t* recent_of(const Layout& l, int64_t row, int64_t kv, int64_t part, int64_t token) const {
    return recent + (((row * l.kv_heads + kv) * 2 + part) * l.ring() + token % l.ring()) * l.depth;
  }
};

// Everything that one run works on. Queries, keys and values are [B, S, heads * depth] of float or Half.
struct Work {
  Layout layout;
  Rotation rotation;
  const TurnTables* tables;  // nullptr: not known before the run
  Cache cache;
  const Row* rows;
  int64_t batch, fresh;  // B, S
  bool half;
  bool shared;  // the cache holds the new tokens, and isn't written
  const void* query;
  const void* key;
  const void* value;
  void* output;
  float scale, softcap;
  int64_t local;  // tokens that a query sees, at most; negative: all

  // The features of one head of a new token as floats.
  void features(const void* from, int64_t heads, int64_t row, int64_t index, int64_t head, float* to) const {
    const int64_t at = ((row * fresh + index) * heads + head) * layout.depth;
    if (half) {
      for (int64_t i = 0; i < layout.depth; ++i) to[i] = to_float(static_cast<const Half*>(from)[at + i]);
    } else {
      for (int64_t i = 0; i < layout.depth; ++i) to[i] = static_cast<const float*>(from)[at + i];
    }
  }
  // The query of one head, turned, times the scale.
  void query_of(int64_t row, int64_t index, int64_t head, float* to) const {
    features(query, layout.heads, row, index, head, to);
    if (rotation.half > 0) rotation.turn(to, rows[row].past + index);
    for (int64_t i = 0; i < layout.depth; ++i) to[i] *= scale;
  }
  // The result of one head for a new token: `values` times `factor`.
  void put(int64_t row, int64_t index, int64_t head, const float* values, float factor) const {
    const int64_t at = ((row * fresh + index) * layout.heads + head) * layout.depth;
    if (half) {
      for (int64_t i = 0; i < layout.depth; ++i) {
        static_cast<Half*>(output)[at + i] = from_float<Half>(values == nullptr ? 0.0f : values[i] * factor);
      }
    } else {
      for (int64_t i = 0; i < layout.depth; ++i) {
        static_cast<float*>(output)[at + i] = values == nullptr ? 0.0f : values[i] * factor;
      }
    }
  }
  // Blocks that are quantized to the query at place `at`.
  int64_t blocks(const Row& row, int64_t at) const {
    const int64_t full = layout.blocks(at + 1);
    return full < row.left ? row.left : full;
  }
  // The first block with tokens that some query sees unquantized.
  int64_t first_unquantized(const Row& row) const {
    const int64_t full = layout.blocks(row.past);
    return full < row.left ? row.left : full;
  }
  // The first place that the query at place `at` sees.
  int64_t first_seen(int64_t at) const { return local >= 0 && at + 1 > local ? at + 1 - local : 0; }
};

}  // namespace graphopt::quantized_kv_attention
