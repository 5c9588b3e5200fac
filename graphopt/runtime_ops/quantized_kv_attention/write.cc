#include "write.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace graphopt::quantized_kv_attention {
namespace {

// Quantizes `count` numbers that share a scale: at(i) is one, code(i) where its code goes.
template <typename At, typename Code>
void quantize(int64_t count, int64_t bits, At at, Code code, uint16_t* scale, uint16_t* least) {
  float low = at(0), high = at(0);
  for (int64_t i = 1; i < count; ++i) {
    const float x = at(i);
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  const float levels = float((1 << bits) - 1);
  // A little less than the least number, so that rounding to half precision never ends above it.
  const Half minimum = from_float<Half>(low - std::fabs(low) * 0x1p-11f);
  low = to_float(minimum);
  const Half step = from_float<Half>((high - low) / levels);
  *least = minimum.bits;
  *scale = step.bits;
  const float size = to_float(step) == 0 ? 1.0f : to_float(step);
  for (int64_t i = 0; i < count; ++i) {
    float x = (at(i) - low) / size;
    x = x > 0 ? x : 0;  // what is no number, too
    x = x < levels ? x : levels;
    *code(i) = uint8_t(int32_t(x + 12582912.0f - 12582912.0f));  // to the nearest, half to even
  }
}

void pack(const uint8_t* codes, int64_t count, int64_t bits, uint8_t* packed) {
  const int64_t low_bits = bits == 3 ? 2 : bits, parts = 8 / low_bits, part = count / parts;
  const int mask = (1 << low_bits) - 1;
  for (int64_t i = 0; i < part; ++i) {
    int byte = 0;
    for (int64_t p = 0; p < parts; ++p) byte |= (codes[p * part + i] & mask) << (low_bits * p);
    packed[i] = uint8_t(byte);
  }
  if (bits != 3) return;
  for (int64_t i = 0; i < count / 8; ++i) {
    int byte = 0;
    for (int64_t p = 0; p < 8; ++p) byte |= (codes[p * (count / 8) + i] >> 2) << p;
    packed[part + i] = uint8_t(byte);
  }
}

}  // namespace

void narrowed(const Work& work, bool key, int64_t row, int64_t index, int64_t kv, uint16_t* to) {
  thread_local std::vector<float> features;
  const Layout& l = work.layout;
  features.resize(size_t(l.depth));
  work.features(key ? work.key : work.value, l.kv_heads, row, index, kv, features.data());
  if (key && work.rotation.half > 0 && !work.rotation.at_read) {
    work.rotation.turn(features.data(), work.rows[row].past + index);
  }
  kernels().narrow(features.data(), l.depth, to);
}

void write_block(const Work& work, int64_t row, int64_t block, int64_t kv, const float* keys, const float* values) {
  thread_local std::vector<uint8_t> codes;
  const Layout& l = work.layout;
  codes.resize(size_t(l.numbers()));
  uint8_t* const made = codes.data();
  uint8_t* const packed = work.cache.codes_of(l, row, block, kv);
  uint16_t* scales = work.cache.scales_of(l, row, block, kv);
  const auto key_code = [&](int64_t channel, int64_t token) {
    return made + (channel / 4 * l.width + token) * 4 + channel % 4;
  };
  if (l.per_channel) {
    for (int64_t channel = 0; channel < l.depth; ++channel) {
      quantize(
          l.width, l.key_bits, [&](int64_t i) { return keys[channel * l.width + i]; },
          [&](int64_t i) { return key_code(channel, i); }, scales + channel, scales + l.key_scales() + channel);
    }
  } else {
    for (int64_t n = 0; n < l.key_scales(); ++n) {
      const int64_t first = n / l.width * l.group, token = n % l.width;
      quantize(
          l.group, l.key_bits, [&](int64_t i) { return keys[(first + i) * l.width + token]; },
          [&](int64_t i) { return key_code(first + i, token); }, scales + n, scales + l.key_scales() + n);
    }
  }
  pack(made, l.numbers(), l.key_bits, packed);
  scales += 2 * l.key_scales();
  for (int64_t n = 0; n < l.value_scales(); ++n) {
    const int64_t first = n / l.width * l.group, token = n % l.width;
    quantize(
        l.group, l.value_bits, [&](int64_t i) { return values[token * l.depth + first + i]; },
        [&](int64_t i) { return made + (token / 4 * l.depth + first + i) * 4 + token % 4; }, scales + n,
        scales + l.value_scales() + n);
  }
  pack(made, l.numbers(), l.value_bits, packed + l.key_bytes());
}

void append(const Work& work, int64_t row, int64_t kv) {
  const Layout& l = work.layout;
  const Row& tokens = work.rows[row];
  if (tokens.fresh() == 0) return;
  narrowed(work, true, row, 0, kv, work.cache.recent_of(l, row, kv, 0, tokens.past));
  narrowed(work, false, row, 0, kv, work.cache.recent_of(l, row, kv, 1, tokens.past));
  const int64_t block = l.blocks(tokens.past);
  if (l.blocks(tokens.total) == block) return;
  thread_local std::vector<float> keys, values, features;
  keys.resize(size_t(l.numbers()));
  values.resize(size_t(l.numbers()));
  features.resize(size_t(l.depth));
  for (int64_t t = 0; t < l.width; ++t) {
    const int64_t token = block * l.width + t;
    kernels().widen(work.cache.recent_of(l, row, kv, 0, token), l.depth, features.data());
    for (int64_t i = 0; i < l.depth; ++i) keys[i * l.width + t] = features[i];
    kernels().widen(work.cache.recent_of(l, row, kv, 1, token), l.depth, values.data() + t * l.depth);
  }
  write_block(work, row, block, kv, keys.data(), values.data());
}

}  // namespace graphopt::quantized_kv_attention
