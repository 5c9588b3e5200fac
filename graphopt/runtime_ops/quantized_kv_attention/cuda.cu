// CUDA kernels of QuantizedKVAttention.
//
// What some query sees unquantized, of the ring and of the new tokens, is gathered; full blocks are quantized from that,
// and the ring takes the newest. Then each block of threads attends to a range of blocks of tokens for up to kRows
// queries of one KV head, and in the end the ranges' results are put together. A query sees a block of tokens quantized
// or gathered, by its own place, so both kinds are gone through where new tokens of one run differ in that.
#include <algorithm>

#include "launchers.h"
#include "numbers.cuh"

namespace graphopt::quantized_kv_attention {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 16;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kGrid = 65535;

// What a launcher is given; see launchers.h.
struct Run {
  const void* query;
  const void* key;
  const void* value;
  const uint8_t* past_codes;
  const void* past_scales;
  const void* past_recent;
  const int32_t* totals;
  const float* cos;
  const float* sin;
  void* output;
  uint8_t* codes;
  void* scales;
  void* recent;
  void* scratch;
  int64_t batch;
  int64_t fresh;
  int64_t past_blocks;
  int64_t blocks;
  int64_t heads;
  int64_t kv_heads;
  int64_t depth;
  int64_t width;
  int64_t window;
  int64_t group;
  int64_t key_bits;
  int64_t value_bits;
  int64_t turned;
  int64_t local;
  int32_t per_channel;
  int32_t interleaved;
  int32_t at_read;
  int32_t half;
  int32_t shared;
  float scale;
  float softcap;
};

__host__ __device__ inline int64_t blocks_of(const Run& r, int64_t tokens) {
  return tokens > r.window ? (tokens - r.window) / r.width : 0;
}
__host__ __device__ inline int64_t past_of(const Run& r, int64_t total) {
  return total > r.fresh ? total - r.fresh : 0;
}
// The first block with tokens that some query sees unquantized. Of the past of a shared cache, which has the new tokens
// already, no more is known unquantized than what they left in the ring.
__host__ __device__ inline int64_t first_open(const Run& r, int64_t total) {
  const int64_t past = past_of(r, total), newest = total - r.window - r.width;
  const int64_t gone = r.shared == 0 ? 0 : past < newest ? past : newest;
  const int64_t full = blocks_of(r, past), left = gone > 0 ? (gone + r.width - 1) / r.width : 0;
  return full < left ? left : full;
}
// Blocks that are quantized to the query at place `at`.
__host__ __device__ inline int64_t quantized_to(const Run& r, int64_t total, int64_t at) {
  const int64_t full = blocks_of(r, at + 1), first = first_open(r, total);
  return full < first ? first : full;
}
__host__ __device__ inline int64_t key_scales(const Run& r) {
  return r.per_channel != 0 ? r.depth : r.depth / r.group * r.width;
}
__host__ __device__ inline int64_t value_scales(const Run& r) { return r.depth / r.group * r.width; }
__host__ __device__ inline int64_t scale_numbers(const Run& r) { return 2 * (key_scales(r) + value_scales(r)); }
__host__ __device__ inline int64_t code_bytes(const Run& r) {
  return r.width * r.depth * (r.key_bits + r.value_bits) / 8;
}
__host__ __device__ inline int64_t ring(const Run& r) { return r.window + r.width; }

// How the work is cut, and where it lies in the working memory.
struct Plan {
  int64_t tokens;   // gathered ones of a row, a multiple of width
  int64_t queries;  // heads of queries for one of keys
  int64_t heads;    // of those, in one block of threads
  int64_t places;   // new tokens in one block of threads
  int64_t chunks, tiles, splits;
  int64_t made;     // blocks of a row that are quantized now, at most
  int64_t newest;   // tokens of a row that go into the ring, at most
  int32_t* totals;
  __half* gathered;  // [batch, kv_heads, 2, tokens, depth]
  float* partials;   // [batch, kv_heads, chunks, tiles, splits, heads * places, depth + 2]
  int64_t bytes;

  __host__ __device__ int64_t rows() const { return heads * places; }
};

Plan plan_of(const Run& r) {
  Plan p{};
  int64_t units = 1;
  for (int64_t row = 0; row < r.batch; ++row) {
    const int64_t total = r.totals[row], past = past_of(r, total), first = first_open(r, total);
    p.tokens = std::max(p.tokens, ((total + r.width - 1) / r.width - first) * r.width);
    if (r.shared == 0) {
      p.made = std::max(p.made, blocks_of(r, total) - first);
      p.newest = std::max(p.newest, std::min(total - past, ring(r)));
    }
    units = std::max(units, (total + r.width - 1) / r.width + 1);
  }
  p.queries = r.heads / r.kv_heads;
  p.heads = std::min<int64_t>(p.queries, kRows);
  p.chunks = (p.queries + p.heads - 1) / p.heads;
  p.places = std::max<int64_t>(1, std::min(r.fresh, kRows / p.heads));
  p.tiles = (r.fresh + p.places - 1) / p.places;
  // Some four blocks of threads for each of 132 multiprocessors, of no fewer than two blocks of tokens.
  const int64_t grid = std::max<int64_t>(1, r.batch * r.kv_heads * p.chunks * p.tiles);
  p.splits = std::max<int64_t>(1, std::min(units / 2, 528 / grid));
  const auto place = [&](int64_t bytes) {
    const int64_t at = p.bytes;
    p.bytes += (bytes + 255) / 256 * 256;
    return static_cast<char*>(r.scratch) + at;
  };
  p.totals = reinterpret_cast<int32_t*>(place(4 * r.batch));
  p.gathered = reinterpret_cast<__half*>(place(2 * r.batch * r.kv_heads * 2 * p.tokens * r.depth));
  p.partials = reinterpret_cast<float*>(
      place(4 * r.batch * r.kv_heads * p.chunks * p.tiles * p.splits * p.rows() * (r.depth + 2)));
  return p;
}

__device__ inline __half* gathered_at(const Run& r, const Plan& p, int64_t row, int64_t kv, int64_t part, int64_t token) {
  return p.gathered + (((row * r.kv_heads + kv) * 2 + part) * p.tokens + token) * r.depth;
}
__device__ inline int64_t recent_at(const Run& r, int64_t row, int64_t kv, int64_t part, int64_t token) {
  return (((row * r.kv_heads + kv) * 2 + part) * ring(r) + token % ring(r)) * r.depth;
}

// Feature i of a head, turned to its place. Each product is rounded before the sum, as in the portable body.
template <typename V>
__device__ float turned(const Run& r, const V* head, int64_t i, int64_t place) {
  const float x = number(head[i]);
  if (i >= 2 * r.turned) return x;
  const bool first = r.interleaved != 0 ? i % 2 == 0 : i < r.turned;
  const int64_t pair = r.interleaved != 0 ? i / 2 : i % r.turned;
  const int64_t step = r.interleaved != 0 ? 1 : r.turned;
  const float other = number(head[first ? i + step : i - step]);
  const float c = r.cos[place * r.turned + pair], s = r.sin[place * r.turned + pair];
  return first ? __fsub_rn(__fmul_rn(x, c), __fmul_rn(other, s)) : __fadd_rn(__fmul_rn(x, c), __fmul_rn(other, s));
}

// Tokens from the first unquantized one of the past to the last; grid: tokens, KV heads, rows.
template <typename V>
__global__ void gather(Run r, Plan p) {
  const int64_t kv = blockIdx.y;
  for (int64_t row = blockIdx.z; row < r.batch; row += gridDim.z) {
    const int64_t total = p.totals[row], past = past_of(r, total), first = first_open(r, total) * r.width;
    for (int64_t t = blockIdx.x; t < p.tokens; t += gridDim.x) {
      const int64_t token = first + t;
      __half* keys = gathered_at(r, p, row, kv, 0, t);
      __half* values = gathered_at(r, p, row, kv, 1, t);
      for (int64_t i = threadIdx.x; i < r.depth; i += blockDim.x) {
        if (token < past) {
          const __half* from = static_cast<const __half*>(r.recent);
          keys[i] = from[recent_at(r, row, kv, 0, token) + i];
          values[i] = from[recent_at(r, row, kv, 1, token) + i];
        } else if (token < total) {
          const int64_t at = ((row * r.fresh + token - past) * r.kv_heads + kv) * r.depth;
          const V* key = static_cast<const V*>(r.key) + at;
          keys[i] = __float2half_rn(r.at_read != 0 ? number(key[i]) : turned(r, key, i, token));
          values[i] = __float2half_rn(number(static_cast<const V*>(r.value)[at + i]));
        } else {
          keys[i] = values[i] = __float2half_rn(0.0f);
        }
      }
    }
  }
}

// What `count` numbers `stride` apart share: their scale and their minimum, rounded to half precision.
__device__ void measure(const __half* numbers, int64_t count, int64_t stride, int64_t bits, __half* scale,
                        __half* least) {
  float low = number(numbers[0]), high = low;
  for (int64_t i = 1; i < count; ++i) {
    const float x = number(numbers[i * stride]);
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  // A little less than the least number, so that rounding to half precision never ends above it.
  *least = __float2half_rn(__fsub_rn(low, fabsf(low) * 0x1p-11f));
  *scale = __float2half_rn(__fdiv_rn(__fsub_rn(high, number(*least)), float((1 << bits) - 1)));
}

__device__ unsigned code_of(float x, __half scale, __half least, int64_t bits) {
  const float step = number(scale), levels = float((1 << bits) - 1);
  const float code = __fdiv_rn(__fsub_rn(x, number(least)), step == 0.0f ? 1.0f : step);
  return unsigned(rintf(fminf(fmaxf(code, 0.0f), levels)));  // fmaxf makes 0 of what is no number
}

// Packs codes, code(n) for n < count, with all threads of the block.
template <typename Code>
__device__ void pack(int64_t count, int64_t bits, uint8_t* packed, Code code) {
  const int64_t low = bits == 3 ? 2 : bits, parts = 8 / low, part = count / parts;
  for (int64_t i = threadIdx.x; i < part; i += blockDim.x) {
    unsigned byte = 0;
    for (int64_t n = 0; n < parts; ++n) byte |= (code(n * part + i) & ((1u << low) - 1)) << (low * n);
    packed[i] = uint8_t(byte);
  }
  if (bits != 3) return;
  for (int64_t i = threadIdx.x; i < count / 8; i += blockDim.x) {
    unsigned byte = 0;
    for (int64_t n = 0; n < 8; ++n) byte |= (code(n * (count / 8) + i) >> 2) << n;
    packed[part + i] = uint8_t(byte);
  }
}

// Blocks that the new tokens make full; grid: blocks, KV heads, rows.
__global__ void quantize(Run r, Plan p) {
  const int64_t kv = blockIdx.y, width = r.width, depth = r.depth, count = width * depth;
  for (int64_t row = blockIdx.z; row < r.batch; row += gridDim.z) {
    const int64_t total = p.totals[row], first = blocks_of(r, past_of(r, total)), end = blocks_of(r, total);
    for (int64_t block = first + blockIdx.x; block < end; block += gridDim.x) {
      const __half* keys = gathered_at(r, p, row, kv, 0, (block - first) * width);
      const __half* values = gathered_at(r, p, row, kv, 1, (block - first) * width);
      const int64_t unit = (row * r.blocks + block) * r.kv_heads + kv;
      uint8_t* packed = r.codes + unit * code_bytes(r);
      __half* key_scale = static_cast<__half*>(r.scales) + unit * scale_numbers(r);
      __half* key_least = key_scale + key_scales(r);
      __half* value_scale = key_least + key_scales(r);
      __half* value_least = value_scale + value_scales(r);
      for (int64_t n = threadIdx.x; n < key_scales(r); n += blockDim.x) {
        if (r.per_channel != 0) {
          measure(keys + n, width, depth, r.key_bits, key_scale + n, key_least + n);
        } else {
          measure(keys + n % width * depth + n / width * r.group, r.group, 1, r.key_bits, key_scale + n, key_least + n);
        }
      }
      for (int64_t n = threadIdx.x; n < value_scales(r); n += blockDim.x) {
        measure(values + n % width * depth + n / width * r.group, r.group, 1, r.value_bits, value_scale + n,
                value_least + n);
      }
      __syncthreads();
      pack(count, r.key_bits, packed, [&](int64_t n) {
        const int64_t channel = n / (4 * width) * 4 + n % 4, token = n / 4 % width;
        const int64_t at = r.per_channel != 0 ? channel : channel / r.group * width + token;
        return code_of(number(keys[token * depth + channel]), key_scale[at], key_least[at], r.key_bits);
      });
      pack(count, r.value_bits, packed + count * r.key_bits / 8, [&](int64_t n) {
        const int64_t token = n / (4 * depth) * 4 + n % 4, channel = n / 4 % depth;
        const int64_t at = channel / r.group * width + token;
        return code_of(number(values[token * depth + channel]), value_scale[at], value_least[at], r.value_bits);
      });
    }
  }
}

// New tokens to their places in the ring; grid: tokens, KV heads, rows.
__global__ void keep(Run r, Plan p) {
  const int64_t kv = blockIdx.y;
  for (int64_t row = blockIdx.z; row < r.batch; row += gridDim.z) {
    const int64_t total = p.totals[row], past = past_of(r, total), first = blocks_of(r, past) * r.width;
    const int64_t begin = max(past, total - ring(r));
    for (int64_t token = begin + blockIdx.x; token < total; token += gridDim.x) {
      for (int64_t part = 0; part < 2; ++part) {
        const __half* from = gathered_at(r, p, row, kv, part, token - first);
        __half* to = static_cast<__half*>(r.recent) + recent_at(r, row, kv, part, token);
        for (int64_t i = threadIdx.x; i < r.depth; i += blockDim.x) to[i] = from[i];
      }
    }
  }
}

// Unpacks codes with all threads of the block: use(n, code) for n < count.
template <typename Use>
__device__ void unpack(const uint8_t* packed, int count, int bits, Use use) {
  const int low = bits == 3 ? 2 : bits, parts = 8 / low, part = count / parts, eighth = count / 8;
  for (int i = threadIdx.x; i < part; i += kThreads) {
    const unsigned byte = packed[i];
    for (int n = 0; n < parts; ++n) {
      const int at = n * part + i;
      unsigned code = byte >> (low * n) & ((1u << low) - 1);
      if (bits == 3) code |= (unsigned(packed[part + at % eighth]) >> (at / eighth) & 1u) << 2;
      use(at, float(code));
    }
  }
}

// The shared memory of `attend`, in floats.
__host__ __device__ inline int64_t shared_floats(const Run& r, int64_t rows) {
  return rows * r.depth * 2 + r.width * (r.depth + 1) + rows * r.width + 3 * rows;
}

// Grid: ranges of tokens and tiles of new ones, chunks of heads and KV heads, rows.
template <typename V>
__global__ void __launch_bounds__(kThreads) attend(Run r, Plan p) {
  extern __shared__ float shared[];
  const int rows = int(p.rows()), depth = int(r.depth), width = int(r.width), stride = depth + 1;
  float* const queries = shared;                  // [rows, depth]
  float* const sums = queries + rows * depth;     // [rows, depth]
  float* const tile = sums + rows * depth;        // [width, depth + 1]: keys, then values
  float* const weights = tile + width * stride;   // [rows, width]
  float* const largest = weights + rows * width;  // [rows]
  float* const totals = largest + rows;
  float* const factors = totals + rows;
  const int64_t split = blockIdx.x % p.splits, tile_index = blockIdx.x / p.splits;
  const int64_t chunk = blockIdx.y % p.chunks, kv = blockIdx.y / p.chunks;
  for (int64_t row = blockIdx.z; row < r.batch; row += gridDim.z) {
    const int64_t total = p.totals[row], past = past_of(r, total), fresh = total - past;
    const int64_t first_place = tile_index * p.places, end_place = min(first_place + p.places, fresh);
    const auto place_of = [&](int i) { return first_place + i / p.heads; };
    const auto head_of = [&](int i) { return chunk * p.heads + i % p.heads; };
    const auto is_real = [&](int i) { return place_of(i) < end_place && head_of(i) < p.queries; };
    for (int n = threadIdx.x; n < rows * depth; n += kThreads) {
      const int i = n / depth, feature = n % depth;
      float x = 0.0f;
      if (is_real(i)) {
        const int64_t head = kv * p.queries + head_of(i);
        const V* from = static_cast<const V*>(r.query) + ((row * r.fresh + place_of(i)) * r.heads + head) * depth;
        x = turned(r, from, feature, past + place_of(i)) * r.scale;
      }
      queries[n] = x;
      sums[n] = 0.0f;
    }
    for (int i = threadIdx.x; i < rows; i += kThreads) {
      largest[i] = -INFINITY;
      totals[i] = 0.0f;
    }
    __syncthreads();

    // Units: blocks of tokens that some query sees quantized, then those that some query sees unquantized.
    const int64_t first_at = past + first_place, last_at = past + end_place - 1;
    const int64_t seen = r.local >= 0 && first_at + 1 > r.local ? (first_at + 1 - r.local) / width : 0;
    const int64_t start = min(seen, quantized_to(r, total, last_at));
    const int64_t quantized = quantized_to(r, total, last_at) - start;
    const int64_t open = max(seen, quantized_to(r, total, first_at));
    const int64_t units = end_place > first_place ? quantized + last_at / width + 1 - open : 0;
    const int64_t together = (units + p.splits - 1) / p.splits;
    for (int64_t unit = split * together; unit < min((split + 1) * together, units); ++unit) {
      const bool is_quantized = unit < quantized;
      const int64_t block = is_quantized ? start + unit : open + unit - quantized;
      const int64_t at = (row * r.blocks + block) * r.kv_heads + kv;
      const uint8_t* packed = r.codes + at * code_bytes(r);
      const __half* scale = static_cast<const __half*>(r.scales) + at * scale_numbers(r);
      const int64_t token = (block - first_open(r, total)) * width;  // among the gathered ones
      const int group = int(r.group);

      // Keys.
      if (is_quantized) {
        const __half* least = scale + key_scales(r);
        unpack(packed, width * depth, int(r.key_bits), [&](int n, float code) {
          const int channel = n / (4 * width) * 4 + n % 4, t = n / 4 % width;
          const int s = r.per_channel != 0 ? channel : channel / group * width + t;
          tile[t * stride + channel] = fmaf(code, number(scale[s]), number(least[s]));
        });
      } else {
        const __half* from = gathered_at(r, p, row, kv, 0, token);
        for (int n = threadIdx.x; n < width * depth; n += kThreads) tile[n / depth * stride + n % depth] = number(from[n]);
      }
      __syncthreads();
      if (r.at_read != 0 && r.turned > 0) {
        const int pairs = int(r.turned), step = r.interleaved != 0 ? 1 : pairs;
        for (int n = threadIdx.x; n < width * pairs; n += kThreads) {
          const int t = n / pairs, pair = n % pairs;
          const int64_t place = block * width + t;
          if (place >= total) continue;
          float* a = tile + t * stride + (r.interleaved != 0 ? 2 * pair : pair);
          const float x = a[0], y = a[step], c = r.cos[place * pairs + pair], s = r.sin[place * pairs + pair];
          a[0] = x * c - y * s;
          a[step] = y * c + x * s;
        }
        __syncthreads();
      }

      // Scores, of what each query sees.
      for (int n = threadIdx.x; n < rows * width; n += kThreads) {
        const int i = n / width, t = n % width;
        const int64_t query = past + place_of(i), place = block * width + t;
        float score = -INFINITY;
        const bool sees = is_real(i) && place <= query && (block < quantized_to(r, total, query)) == is_quantized &&
                          (r.local < 0 || place > query - r.local);
        if (sees) {
          score = 0.0f;
          for (int d = 0; d < depth; ++d) score = fmaf(queries[i * depth + d], tile[t * stride + d], score);
          if (r.softcap > 0.0f) score = r.softcap * tanhf(score / r.softcap);
        }
        weights[n] = score;
      }
      __syncthreads();

      // Weights; values take the place of keys meanwhile.
      for (int i = threadIdx.x / 32; i < rows; i += kWarps) {
        const int lane = threadIdx.x % 32;
        float most = -INFINITY, sum = 0.0f;
        for (int t = lane; t < width; t += 32) most = fmaxf(most, weights[i * width + t]);
        for (int distance = 16; distance > 0; distance /= 2) {
          most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
        }
        const float before = largest[i], now = fmaxf(before, most);
        for (int t = lane; t < width; t += 32) {
          const float score = weights[i * width + t];
          // Where nothing is seen there is nothing to weigh; a score that is no number stays one.
          const float weight = score == -INFINITY ? 0.0f : expf(score - now);
          weights[i * width + t] = weight;
          sum += weight;
        }
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        __syncwarp();
        if (lane == 0) {
          const float factor = now == -INFINITY ? 1.0f : expf(before - now);
          factors[i] = factor;
          totals[i] = totals[i] * factor + sum;
          largest[i] = now;
        }
      }
      if (is_quantized) {
        const __half* value_scale = scale + 2 * key_scales(r);
        const __half* value_least = value_scale + value_scales(r);
        unpack(packed + int64_t(width) * depth * r.key_bits / 8, width * depth, int(r.value_bits), [&](int n, float code) {
          const int t = n / (4 * depth) * 4 + n % 4, channel = n / 4 % depth;
          const int s = channel / group * width + t;
          tile[t * stride + channel] = fmaf(code, number(value_scale[s]), number(value_least[s]));
        });
      } else {
        const __half* from = gathered_at(r, p, row, kv, 1, token);
        for (int n = threadIdx.x; n < width * depth; n += kThreads) tile[n / depth * stride + n % depth] = number(from[n]);
      }
      __syncthreads();

      for (int d = threadIdx.x; d < depth; d += kThreads) {
        for (int i = 0; i < rows; i += 4) {
          float made[4] = {};
          const int count = min(4, rows - i);
          for (int t = 0; t < width; ++t) {
            const float value = tile[t * stride + d];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if (j < count) made[j] = fmaf(weights[(i + j) * width + t], value, made[j]);
            }
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (j < count) sums[(i + j) * depth + d] = sums[(i + j) * depth + d] * factors[i + j] + made[j];
          }
        }
      }
      __syncthreads();
    }

    const int64_t task = ((row * r.kv_heads + kv) * p.chunks + chunk) * p.tiles + tile_index;
    float* to = p.partials + (task * p.splits + split) * rows * (depth + 2);
    for (int n = threadIdx.x; n < rows * depth; n += kThreads) to[n / depth * (depth + 2) + n % depth] = sums[n];
    for (int i = threadIdx.x; i < rows; i += kThreads) {
      to[i * (depth + 2) + depth] = largest[i];
      to[i * (depth + 2) + depth + 1] = totals[i];
    }
    __syncthreads();
  }
}

// The ranges' results together; grid: new tokens, heads, rows.
template <typename V>
__global__ void merge(Run r, Plan p) {
  const int64_t head = blockIdx.y, kv = head / p.queries, chunk = head % p.queries / p.heads;
  for (int64_t row = blockIdx.z; row < r.batch; row += gridDim.z) {
    const int64_t total = p.totals[row], fresh = total - past_of(r, total);
    for (int64_t index = blockIdx.x; index < r.fresh; index += gridDim.x) {
      const int64_t task = ((row * r.kv_heads + kv) * p.chunks + chunk) * p.tiles + index / p.places;
      const int64_t i = index % p.places * p.heads + head % p.queries % p.heads, width = r.depth + 2;
      const float* from = p.partials + (task * p.splits * p.rows() + i) * width;
      const int64_t next = p.rows() * width;
      float most = -INFINITY;
      for (int64_t split = 0; split < p.splits; ++split) most = fmaxf(most, from[split * next + r.depth]);
      float weight = 0.0f;
      for (int64_t split = 0; split < p.splits; ++split) {
        const float largest = from[split * next + r.depth], part = from[split * next + r.depth + 1];
        // A range that saw nothing has a sum of 0; one whose scores are no numbers has one that is none either.
        weight += part == 0.0f ? 0.0f : part * expf(largest - most);
      }
      V* to = static_cast<V*>(r.output) + ((row * r.fresh + index) * r.heads + head) * r.depth;
      for (int64_t d = threadIdx.x; d < r.depth; d += blockDim.x) {
        float sum = 0.0f;
        for (int64_t split = 0; split < p.splits; ++split) {
          if (from[split * next + r.depth + 1] != 0.0f) {
            sum += from[split * next + d] * expf(from[split * next + r.depth] - most);
          }
        }
        to[d] = rounded<V>(index < fresh ? sum / weight : 0.0f);
      }
    }
  }
}

cudaError_t copied(const Run& r, const void* from, void* to, int64_t past_bytes, int64_t bytes, cudaStream_t stream) {
  if (from == to || r.batch == 0 || bytes == 0) return cudaSuccess;
  // Blocks that weren't there are 0.
  if (past_bytes < bytes) {
    if (const cudaError_t error = cudaMemsetAsync(to, 0, size_t(r.batch * bytes), stream)) return error;
  }
  if (past_bytes == 0) return cudaSuccess;
  return cudaMemcpy2DAsync(to, size_t(bytes), from, size_t(past_bytes), size_t(past_bytes), size_t(r.batch),
                           cudaMemcpyDeviceToDevice, stream);
}

template <typename V>
cudaError_t launched(const Run& r, const Plan& p, cudaStream_t stream) {
  const auto some = [](int64_t count) { return unsigned(std::min(std::max<int64_t>(count, 1), kGrid)); };
  const unsigned kv = unsigned(r.kv_heads), batch = some(r.batch);
  if (p.tokens > 0) gather<V><<<dim3(some(p.tokens), kv, batch), kThreads, 0, stream>>>(r, p);
  if (p.made > 0) quantize<<<dim3(some(p.made), kv, batch), kThreads, 0, stream>>>(r, p);
  if (p.newest > 0) keep<<<dim3(some(p.newest), kv, batch), kThreads, 0, stream>>>(r, p);
  if (const cudaError_t error = cudaGetLastError()) return error;
  const size_t bytes = size_t(4 * shared_floats(r, p.rows()));
  if (const cudaError_t error = allow_shared_memory(attend<V>, bytes)) return error;
  attend<V><<<dim3(unsigned(p.splits * p.tiles), unsigned(r.kv_heads * p.chunks), batch), kThreads, bytes, stream>>>(r, p);
  if (const cudaError_t error = cudaGetLastError()) return error;
  merge<V><<<dim3(some(r.fresh), unsigned(r.heads), batch), kThreads, 0, stream>>>(r, p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace graphopt::quantized_kv_attention

int64_t graphopt_cuda_quantized_kv_attention_scratch_bytes(const int32_t* totals, int64_t batch, int64_t fresh,
                                                           int64_t heads, int64_t kv_heads, int64_t depth,
                                                           int64_t width, int64_t window) {
  using namespace graphopt::quantized_kv_attention;
  Run r{};
  r.totals = totals;
  r.batch = batch;
  r.fresh = fresh;
  r.heads = heads;
  r.kv_heads = kv_heads;
  r.depth = depth;
  r.width = width;
  r.window = window;
  if (batch == 0 || fresh == 0) return 0;
  const Plan p = plan_of(r);
  return heads <= kGrid && p.splits * p.tiles < INT32_MAX && width * depth < INT32_MAX / 8 ? p.bytes : -1;
}

int graphopt_cuda_quantized_kv_attention(
    const void* query, const void* key, const void* value, const uint8_t* past_codes, const void* past_scales,
    const void* past_recent, const int32_t* totals, const float* cos, const float* sin, void* output, uint8_t* codes,
    void* scales, void* recent, void* scratch, int64_t batch, int64_t fresh, int64_t past_blocks, int64_t blocks,
    int64_t heads, int64_t kv_heads, int64_t depth, int64_t width, int64_t window, int64_t group, int64_t key_bits,
    int64_t value_bits, int64_t turned, int64_t local, int32_t per_channel, int32_t interleaved, int32_t at_read,
    int32_t half, int32_t shared, float scale, float softcap, void* stream) {
  using namespace graphopt::quantized_kv_attention;
  const Run r{query, key, value, past_codes, past_scales, past_recent, totals, cos, sin, output, codes, scales, recent,
              scratch, batch, fresh, past_blocks, blocks, heads, kv_heads, depth, width, window, group, key_bits,
              value_bits, turned, local, per_channel, interleaved, at_read, half, shared, scale, softcap};
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const int64_t unit = kv_heads * code_bytes(r), numbers = 2 * kv_heads * scale_numbers(r);
  const int64_t kept = 4 * kv_heads * ring(r) * depth;
  if (const auto error = copied(r, past_codes, codes, past_blocks * unit, blocks * unit, on)) return error;
  if (const auto error = copied(r, past_scales, scales, past_blocks * numbers, blocks * numbers, on)) return error;
  if (const auto error = copied(r, past_recent, recent, kept, kept, on)) return error;
  if (batch == 0 || fresh == 0) return cudaSuccess;
  const Plan p = plan_of(r);
  // From memory that may be paged out: it is read before the call returns.
  if (const auto error = cudaMemcpyAsync(p.totals, totals, size_t(4 * batch), cudaMemcpyHostToDevice, on)) {
    return error;
  }
  return half != 0 ? launched<__half>(r, p, on) : launched<float>(r, p, on);
}
