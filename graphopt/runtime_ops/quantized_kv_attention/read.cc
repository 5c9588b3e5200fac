#include "read.h"

#include <algorithm>

#include "kernels.h"
#include "turn_tables.h"

namespace graphopt::quantized_kv_attention {
namespace {

// The codes of one block: where they lie, or unpacked.
const uint8_t* unpacked(const uint8_t* packed, int64_t count, int64_t bits, std::vector<uint8_t>& memory) {
  if (bits == 8) return packed;
  kernels().unpack(packed, count, bits, memory.data());
  return memory.data();
}

void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

float middle(int64_t bits) { return 0.5f * float((1 << bits) - 1); }

}  // namespace

void FloatReader::prepare(const Work& work) {
  work_ = &work;
  const Layout& l = work.layout;
  codes_.resize(size_t(l.numbers()));
  scales_.resize(size_t(l.scale_numbers()));
  keys_.resize(size_t(l.numbers()));
  values_.resize(size_t(l.numbers()));
}

const float* FloatReader::keys(int64_t row, int64_t block, int64_t kv, const float* cos, const float* sin) {
  const Layout& l = work_->layout;
  const Rotation& r = work_->rotation;
  const uint8_t* codes = unpacked(work_->cache.codes_of(l, row, block, kv), l.numbers(), l.key_bits, codes_);
  kernels().widen(work_->cache.scales_of(l, row, block, kv), l.scale_numbers(), scales_.data());
  kernels().read_keys(codes, l.depth, l.width, l.per_channel ? 0 : l.group, scales_.data(),
                      scales_.data() + l.key_scales(), keys_.data());
  if (r.reads()) kernels().rotate(keys_.data(), l.width, r.half, r.first_step(), r.second_at(), cos, sin);
  return keys_.data();
}

const float* FloatReader::values(int64_t row, int64_t block, int64_t kv) {
  const Layout& l = work_->layout;
  const uint8_t* packed = work_->cache.codes_of(l, row, block, kv) + l.key_bytes();
  const float* scales = scales_.data() + 2 * l.key_scales();
  kernels().read_values(unpacked(packed, l.numbers(), l.value_bits, codes_), l.depth, l.width, l.group, scales,
                        scales + l.value_scales(), values_.data());
  return values_.data();
}

void BlockReader::prepare(const Work& work, const float* queries) {
  work_ = &work;
  queries_ = queries;
  const Layout& l = work.layout;
  codes_.resize(size_t(l.numbers()));
  words_.resize(size_t(2 * kQueries * std::max(l.depth, l.width)));
  scales_.resize(size_t(l.scale_numbers()));
  scores_.resize(size_t(l.queries() * l.width));
  if (work.rotation.reads()) {
    keys_.resize(size_t(l.numbers()));
    if (work.tables == nullptr) {
      cos_.resize(size_t(work.rotation.half * l.width));
      sin_.resize(cos_.size());
    }
    // Queries side by side, of up to kQueries heads.
    side_by_side_.assign(size_t(l.kv_heads * chunks() * kQueries * l.depth), 0.0f);
    for (int64_t head = 0; head < l.heads; ++head) {
      const int64_t kv = head / l.queries(), i = head % l.queries();
      float* to = side_by_side(kv, i / kQueries * kQueries) + i % kQueries;
      for (int64_t channel = 0; channel < l.depth; ++channel) to[channel * kQueries] = queries[head * l.depth + channel];
    }
  } else if (!l.per_channel) {
    quantize_queries();
  }
}

void BlockReader::quantize_queries() {
  const Layout& l = work_->layout;
  const int64_t count = l.heads * l.groups();
  query_words_.resize(size_t(2 * l.heads * l.depth));
  query_steps_.resize(size_t(count));
  query_offsets_.resize(size_t(count));
  query_totals_.resize(size_t(count));
  for (int64_t n = 0; n < count; ++n) {
    const float* from = queries_ + n * l.group;
    kernels().integers(from, l.group, 1, nullptr, nullptr, l.group, middle(l.key_bits),
                       query_words_.data() + 2 * n * l.group, &query_steps_[n], &query_offsets_[n]);
    float total = 0;
    for (int64_t i = 0; i < l.group; ++i) total += from[i];
    query_totals_[n] = total;
  }
}

int64_t BlockReader::chunks() const { return (work_->layout.queries() + kQueries - 1) / kQueries; }

// The queries from `first` on of a KV head, [depth, kQueries].
float* BlockReader::side_by_side(int64_t kv, int64_t first) {
  return side_by_side_.data() + (kv * chunks() * kQueries + first) * work_->layout.depth;
}

void BlockReader::turn_to(int64_t block) {
  const Rotation& r = work_->rotation;
  if (!r.reads()) return;
  if (work_->tables != nullptr) {
    cos_at_ = work_->tables->cos(block);
    sin_at_ = work_->tables->sin(block);
    return;
  }
  turn_table(r.cos, r.rows, r.half, work_->layout.width, block, cos_.data());
  turn_table(r.sin, r.rows, r.half, work_->layout.width, block, sin_.data());
  cos_at_ = cos_.data();
  sin_at_ = sin_.data();
}

float* BlockReader::scores(int64_t row, int64_t block, int64_t kv) {
  const Layout& l = work_->layout;
  const Rotation& r = work_->rotation;
  packed_ = work_->cache.codes_of(l, row, block, kv);
  const uint16_t* scales = work_->cache.scales_of(l, row, block, kv);
  // The next KV head, or the next block, lies behind this one.
  prefetch(scales + l.scale_numbers(), 2 * l.scale_numbers());
  const bool as_is = l.key_bits == 8;
  if (!as_is) prefetch(packed_ + l.code_bytes(), l.key_bytes());
  kernels().widen(scales, l.scale_numbers(), scales_.data());
  const uint8_t* codes = unpacked(packed_, l.numbers(), l.key_bits, codes_);
  const float* scale = scales_.data();
  const float* least = scale + l.key_scales();
  const int64_t first_head = kv * l.queries();
  const float* queries = queries_ + first_head * l.depth;
  if (r.reads()) {
    if (as_is) prefetch(packed_ + l.code_bytes(), l.key_bytes());
    const int64_t group = l.per_channel ? 0 : l.group;
    bool done = !r.interleaved;
    for (int64_t first = 0; done && first < l.queries(); first += kQueries) {
      done = kernels().turned_scores(codes, l.depth, l.width, group, scale, least, r.half, cos_at_, sin_at_,
                                     std::min(kQueries, l.queries() - first), side_by_side(kv, first),
                                     scores_.data() + first * l.width);
    }
    if (done) return scores_.data();
    kernels().read_keys(codes, l.depth, l.width, group, scale, least, keys_.data());
    kernels().rotate(keys_.data(), l.width, r.half, r.first_step(), r.second_at(), cos_at_, sin_at_);
    kernels().multiply(l.queries(), l.width, l.depth, queries, l.depth, keys_.data(), l.width, scores_.data(), l.width,
                       false);
    return scores_.data();
  }
  std::fill(scores_.begin(), scores_.end(), 0.0f);
  const int64_t group = l.per_channel ? l.depth : l.group;
  float steps[kQueries], offsets[kQueries], totals[kQueries];
  for (int64_t first = 0; first < l.queries(); first += kQueries) {
    const int64_t count = std::min(kQueries, l.queries() - first);
    for (int64_t g = 0; g < l.depth / group; ++g) {
      Dot dot{codes + g * group * l.width, group / 4, l.width, 4 * l.width, count, words_.data(), 2 * group, steps,
              offsets, nullptr, nullptr, totals, scores_.data() + first * l.width, l.width, nullptr};
      if (l.per_channel) {
        kernels().integers(queries + first * l.depth, l.depth, count, scale, least, l.depth, middle(l.key_bits),
                           words_.data(), steps, offsets);
      }
      for (int64_t i = 0; i < count && !l.per_channel; ++i) {
        const int64_t n = (first_head + first + i) * l.groups() + g;
        steps[i] = query_steps_[n];
        offsets[i] = query_offsets_[n];
        totals[i] = query_totals_[n];
      }
      if (!l.per_channel) {
        dot.words = query_words_.data() + 2 * ((first_head + first) * l.depth + g * group);
        dot.words_stride = 2 * l.depth;
        dot.scale = scale + g * l.width;
        dot.least = least + g * l.width;
      }
      if (as_is && first == 0) dot.ahead = dot.codes + l.code_bytes();
      kernels().dot(dot);
    }
  }
  return scores_.data();
}

void BlockReader::add_values(float* out, int64_t stride) {
  const Layout& l = work_->layout;
  const uint8_t* packed = packed_ + l.key_bytes();
  const bool as_is = l.value_bits == 8;
  if (!as_is) prefetch(packed + l.code_bytes(), l.code_bytes() - l.key_bytes());
  const uint8_t* codes = unpacked(packed, l.numbers(), l.value_bits, codes_);
  const float* scale = scales_.data() + 2 * l.key_scales();
  const float* least = scale + l.value_scales();
  float steps[kQueries], offsets[kQueries];
  for (int64_t first = 0; first < l.queries(); first += kQueries) {
    const int64_t count = std::min(kQueries, l.queries() - first);
    for (int64_t g = 0; g < l.groups(); ++g) {
      kernels().integers(scores_.data() + first * l.width, l.width, count, scale + g * l.width, least + g * l.width,
                         l.width, middle(l.value_bits), words_.data(), steps, offsets);
      Dot dot{codes + 4 * g * l.group, l.width / 4, l.group, 4 * l.depth, count, words_.data(), 2 * l.width, steps,
              offsets, nullptr, nullptr, nullptr, out + first * stride + g * l.group, stride, nullptr};
      if (as_is && first == 0) dot.ahead = dot.codes + l.code_bytes();
      kernels().dot(dot);
    }
  }
}

}  // namespace graphopt::quantized_kv_attention
