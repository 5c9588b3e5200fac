// What a node of CachedAttention is given, checked, and where its rows lie.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "operator.h"

namespace graphopt::cached_attention {

enum Input : size_t { kQuery, kKey, kValue, kPastKey, kPastValue, kLengths, kTotal, kCos, kSin };

struct Attributes {
  explicit Attributes(const Node& node)
      : heads(node.integer("num_heads")),
        kv_heads(node.integer("kv_num_heads")),
        scale(node.number("scale")),
        softcap(node.number("softcap")),
        window(node.integer("local_window_size")),
        interleaved(node.integer("rotary_interleaved") != 0) {
    GRAPHOPT_REQUIRE(heads > 0 && kv_heads > 0 && heads <= 65536 && heads % kv_heads == 0,
                     "num_heads is %lld, and must be a multiple of kv_num_heads, %lld", (long long)heads,
                     (long long)kv_heads);
    // A window that is longer than any cache is none.
    if (window <= 0 || window > kEndless) window = kEndless;
  }

  static constexpr int64_t kEndless = int64_t(1) << 40;
  int64_t heads, kv_heads;
  float scale, softcap;
  int64_t window;
  bool interleaved;
};

// The sizes of one run, and its inputs where they lie.
struct Layout {
  Layout(const Attributes& a, Call& call) {
    const Tensor query = call.input(kQuery), key = call.input(kKey), value = call.input(kValue);
    const Tensor past = call.input(kPastKey), past_value = call.input(kPastValue);
    GRAPHOPT_REQUIRE(past.shape.size() == 4 && past_value.shape == past.shape,
                     "the past must be [B, KV, C, D] twice, not %s and %s", text(past.shape).c_str(),
                     text(past_value.shape).c_str());
    batch = past.dim(0);
    capacity = past.dim(2);
    depth = past.dim(3);
    GRAPHOPT_REQUIRE(past.dim(1) == a.kv_heads && depth > 0 && depth <= 65536,
                     "the past is %s, and there are %lld heads of keys", text(past.shape).c_str(),
                     (long long)a.kv_heads);
    GRAPHOPT_REQUIRE(query.shape.size() == 3 && query.dim(0) == batch, "the query is %s, and the past %s",
                     text(query.shape).c_str(), text(past.shape).c_str());
    tokens = query.dim(1);
    const int64_t width = a.heads * depth, kv_width = a.kv_heads * depth;
    const bool packed = query.dim(2) == width + 2 * kv_width;
    const Shape apart = {batch, tokens, kv_width};
    GRAPHOPT_REQUIRE(packed ? key.size() == 0 && value.size() == 0
                            : query.dim(2) == width && key.shape == apart && value.shape == apart,
                     "query, key and value are %s, %s and %s, and the heads have %lld numbers",
                     text(query.shape).c_str(), text(key.shape).c_str(), text(value.shape).c_str(), (long long)depth);
    half = query.type == ElementType::float16;
    bytes = half ? 2 : 4;
    queries = query.as<char>();
    query_stride = query.dim(2);
    keys = packed ? queries + width * bytes : key.as<char>();
    values = packed ? keys + kv_width * bytes : value.as<char>();
    kv_stride = packed ? query_stride : kv_width;
    past_keys = past.as<char>();
    past_values = past_value.as<char>();
    places(call);
    rotation(call);
    group = a.heads / a.kv_heads;
    scale = a.scale == 0 ? 1.0f / std::sqrt(float(depth)) : a.scale;
  }

  // The place of the first new token of a row.
  int64_t start(int64_t row) const { return std::max<int64_t>(0, int64_t(lengths[row]) + 1 - tokens); }

  int64_t batch, tokens, depth, group;
  int64_t capacity;  // rows of the past
  int64_t length;    // rows of the present
  int64_t pairs;     // of features that are turned
  bool half;
  int64_t bytes;  // of a number
  float scale;
  const char *queries, *keys, *values, *past_keys, *past_values;
  int64_t query_stride, kv_stride;  // numbers from one token to the next
  const int32_t* lengths;
  const char *cos, *sin;

 private:
  void places(Call& call) {
    const Tensor given = call.input(kLengths), total = call.input(kTotal);
    GRAPHOPT_REQUIRE(given.size() == batch, "seqlens_k is %s, and the batch has %lld rows", text(given.shape).c_str(),
                     (long long)batch);
    GRAPHOPT_REQUIRE(total.size() == 1, "total_sequence_length must be one number, not %s", text(total.shape).c_str());
    const int64_t most = *total.as<int32_t>();
    GRAPHOPT_REQUIRE(most >= 0 && most <= capacity + tokens,
                     "total_sequence_length is %lld, more than a past of %lld and %lld new tokens make",
                     (long long)most, (long long)capacity, (long long)tokens);
    length = std::max(capacity, most);
    lengths = given.as<int32_t>();
    for (int64_t row = 0; row < batch; ++row) {
      GRAPHOPT_REQUIRE(lengths[row] >= 0, "seqlens_k of row %lld is %d", (long long)row, lengths[row]);
      GRAPHOPT_REQUIRE(start(row) <= capacity && start(row) + tokens <= length,
                       "row %lld has %lld tokens before %lld new ones, in a past of %lld and a present of %lld",
                       (long long)row, (long long)start(row), (long long)tokens, (long long)capacity,
                       (long long)length);
    }
  }

  void rotation(Call& call) {
    const Tensor c = call.input(kCos), s = call.input(kSin);
    pairs = 0;
    if (c.size() == 0 && s.size() == 0) return;
    GRAPHOPT_REQUIRE(c.shape.size() == 2 && s.shape == c.shape && 2 * c.dim(1) <= depth,
                     "the tables are %s and %s, and the heads have %lld numbers", text(c.shape).c_str(),
                     text(s.shape).c_str(), (long long)depth);
    for (int64_t row = 0; row < batch; ++row) {
      GRAPHOPT_REQUIRE(start(row) + tokens <= c.dim(0), "the tables have %lld rows, and row %lld has %lld tokens",
                       (long long)c.dim(0), (long long)row, (long long)(start(row) + tokens));
    }
    pairs = c.dim(1);
    cos = c.as<char>();
    sin = s.as<char>();
  }
};

}  // namespace graphopt::cached_attention
