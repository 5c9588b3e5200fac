// The CPU kernel of CachedAttention.
#include <cstring>
#include <limits>
#include <vector>

#include "buffer.h"
#include "float16.h"
#include "kernels.h"
#include "layout.h"

namespace graphopt::cached_attention {
namespace {

constexpr float kLow = -std::numeric_limits<float>::infinity();

// Room for a task's numbers, this thread's own; what it held is lost.
float* numbers(int64_t count) {
  thread_local Buffer room;
  return reinterpret_cast<float*>(room.reserve(size_t(count) * sizeof(float)));
}

void read(const Layout& at, const char* from, int64_t count, float* to) {
  if (at.half) {
    kernels().widen(reinterpret_cast<const uint16_t*>(from), count, to);
  } else {
    std::memcpy(to, from, size_t(count) * sizeof(float));
  }
}

void write(const Layout& at, const float* from, int64_t count, char* to) {
  if (at.half) {
    for (int64_t i = 0; i < count; ++i) reinterpret_cast<Half*>(to)[i] = from_float<Half>(from[i]);
  } else {
    std::memcpy(to, from, size_t(count) * sizeof(float));
  }
}

// One run of a node: what its tasks share, and the tasks.
class Run {
 public:
  Run(const Attributes& attributes, Call& call) : node_(attributes), at_(attributes, call), call_(call) {
    output_ = call.output<char>(0, {at_.batch, at_.tokens, node_.heads * at_.depth});
    const Shape present = {at_.batch, node_.kv_heads, at_.length, at_.depth};
    keys_ = call.output<char>(1, present);
    values_ = call.output<char>(2, present);
    // Bound to the past's memory, the present has all that the past has.
    copies_ = keys_ != at_.past_keys || values_ != at_.past_values;
  }

  void run() {
    if (at_.batch == 0) return;
    if (at_.tokens == 1) {
      one_token();
    } else {
      several_tokens();
    }
  }

 private:
  // ---- rows

  // Byte offset of a row of the present, or of the past.
  int64_t offset(int64_t row, int64_t kv_head, int64_t rows, int64_t place) const {
    return ((row * node_.kv_heads + kv_head) * rows + place) * at_.depth * at_.bytes;
  }

  // Turns the features of some heads at a place; `room` holds the tables' rows.
  void rotate(int64_t place, int64_t heads, float* x, float* room) const {
    if (at_.pairs == 0) return;
    float *cos = room, *sin = room + at_.pairs;
    read(at_, at_.cos + place * at_.pairs * at_.bytes, at_.pairs, cos);
    read(at_, at_.sin + place * at_.pairs * at_.bytes, at_.pairs, sin);
    for (int64_t head = 0; head < heads; ++head, x += at_.depth) {
      if (node_.interleaved) {
        for (int64_t i = 0; i < at_.pairs; ++i) {
          const float a = x[2 * i], b = x[2 * i + 1];
          x[2 * i] = a * cos[i] - b * sin[i];
          x[2 * i + 1] = b * cos[i] + a * sin[i];
        }
      } else {
        for (int64_t i = 0; i < at_.pairs; ++i) {
          const float a = x[i], b = x[i + at_.pairs];
          x[i] = a * cos[i] - b * sin[i];
          x[i + at_.pairs] = b * cos[i] + a * sin[i];
        }
      }
    }
  }

  // The queries of a token for one head of keys, turned and times the scale.
  void queries(int64_t row, int64_t kv_head, int64_t token, float* to, float* room) const {
    const int64_t count = at_.group * at_.depth;
    read(at_, at_.queries + ((row * at_.tokens + token) * at_.query_stride + kv_head * count) * at_.bytes, count, to);
    rotate(at_.start(row) + token, at_.group, to, room);
    for (int64_t i = 0; i < count; ++i) to[i] *= at_.scale;
  }

  // Puts a token's key and value in their place.
  void append(int64_t row, int64_t kv_head, int64_t token, float* room) const {
    const int64_t place = at_.start(row) + token, to = offset(row, kv_head, at_.length, place);
    const int64_t from = ((row * at_.tokens + token) * at_.kv_stride + kv_head * at_.depth) * at_.bytes;
    if (at_.pairs > 0) {
      read(at_, at_.keys + from, at_.depth, room);
      rotate(place, 1, room, room + at_.depth);
      write(at_, room, at_.depth, keys_ + to);
    } else {
      std::memcpy(keys_ + to, at_.keys + from, size_t(at_.depth * at_.bytes));
    }
    std::memcpy(values_ + to, at_.values + from, size_t(at_.depth * at_.bytes));
  }

  // The past of one head into the present, and zeros beyond it.
  void copy(int64_t row, int64_t kv_head) const {
    const int64_t from = offset(row, kv_head, at_.capacity, 0), to = offset(row, kv_head, at_.length, 0);
    const int64_t bytes = at_.capacity * at_.depth * at_.bytes, all = at_.length * at_.depth * at_.bytes;
    for (const auto& [past, present] : {std::pair(at_.past_keys, keys_), std::pair(at_.past_values, values_)}) {
      if (present == past || all == 0) continue;
      if (bytes > 0) std::memcpy(present + to, past + from, size_t(bytes));
      std::memset(present + to + bytes, 0, size_t(all - bytes));
    }
  }

  // ---- one token

  // Keys [first, last) of a row for one head of keys.
  struct Part {
    int64_t row, kv_head, first, last;
  };

  // Pieces of the cache that take about as long as each other; `begins` says where those of each head begin.
  void divide(std::vector<Part>* parts, std::vector<size_t>* begins, int64_t* bytes) const {
    const int64_t of_key = 2 * at_.depth * at_.bytes;
    int64_t keys = 0;
    for (int64_t row = 0; row < at_.batch; ++row) {
      keys += std::min(at_.start(row) + 1, node_.window) * node_.kv_heads;
    }
    *bytes = keys * of_key;
    const int64_t wanted = std::clamp<int64_t>(*bytes / 64, 1 << 16, 1 << 18);
    const int64_t most = std::max<int64_t>(16, wanted / of_key);
    for (int64_t row = 0; row < at_.batch; ++row) {
      const int64_t last = at_.start(row) + 1, first = std::max<int64_t>(0, last - node_.window);
      const int64_t count = (last - first + most - 1) / most, size = (last - first + count - 1) / count;
      for (int64_t head = 0; head < node_.kv_heads; ++head) {
        begins->push_back(parts->size());
        for (int64_t i = first; i < last; i += size) parts->push_back({row, head, i, std::min(last, i + size)});
      }
    }
    begins->push_back(parts->size());
  }

  void one_token() {
    thread_local std::vector<Part> room_of_parts;
    thread_local std::vector<size_t> room_of_begins;
    thread_local Buffer room_of_found;
    std::vector<Part>& parts = room_of_parts;
    std::vector<size_t>& begins = room_of_begins;
    parts.clear();
    begins.clear();
    int64_t bytes = 0;
    divide(&parts, &begins, &bytes);
    const int64_t found_size = at_.group * (at_.depth + 2);
    float* found = reinterpret_cast<float*>(room_of_found.reserve(parts.size() * size_t(found_size) * sizeof(float)));
    const size_t heads = size_t(at_.batch * node_.kv_heads);
    const auto task = [&](size_t part, size_t i) {
      if (part == 0) {
        copy(int64_t(i) / node_.kv_heads, int64_t(i) % node_.kv_heads);
      } else if (part == 1) {
        attend(parts[i], found + int64_t(i) * found_size);
      } else {
        merge(int64_t(i), found + int64_t(begins[i]) * found_size, int64_t(begins[i + 1] - begins[i]));
      }
    };
    // What is soon done isn't worth waking threads for.
    if (!copies_ && bytes < 160 * 1024) {
      for (size_t i = 0; i < parts.size(); ++i) task(1, i);
      for (size_t i = 0; i < heads; ++i) task(2, i);
    } else {
      call_.phases({copies_ ? heads : 0, parts.size(), heads}, task);
    }
  }

  void attend(const Part& part, float* found) const {
    const int64_t place = at_.start(part.row), count = part.last - part.first, width = at_.group * at_.depth;
    float* query = numbers(width + at_.group * count + at_.depth + 2 * at_.pairs);
    float *weights = query + width, *room = weights + at_.group * count;
    const int64_t begin = offset(part.row, part.kv_head, at_.length, part.first);
    // The first keys are on their way while the queries are made ready.
    for (int64_t i = 0; i < std::min<int64_t>(2048, count * at_.depth * at_.bytes); i += 64) {
      __builtin_prefetch(keys_ + begin + i);
    }
    queries(part.row, part.kv_head, 0, query, room);
    // The new key is read here alone.
    if (part.last == place + 1) append(part.row, part.kv_head, 0, room);
    float *most = found + width, *total = most + at_.group;
    if (at_.half) {
      kernels().piece_of_halves(of<uint16_t>(begin, count, query, weights, found, most, total));
    } else {
      kernels().piece(of<float>(begin, count, query, weights, found, most, total));
    }
  }

  template <typename E>
  Piece<E> of(int64_t begin, int64_t count, const float* query, float* weights, float* sums, float* most,
              float* total) const {
    return {reinterpret_cast<const E*>(keys_ + begin), reinterpret_cast<const E*>(values_ + begin), count, at_.depth,
            query, at_.group, node_.softcap, weights, sums, most, total};
  }

  // What was found in the pieces of a head's cache, weighed against each other.
  void merge(int64_t head, float* found, int64_t pieces) const {
    const int64_t width = at_.group * at_.depth, stride = width + 2 * at_.group;
    for (int64_t query = 0; query < at_.group; ++query) {
      float *sums = found + query * at_.depth, *most = found + width + query, *total = most + at_.group;
      float peak = kLow;
      for (int64_t i = 0; i < pieces; ++i) peak = most[i * stride] > peak ? most[i * stride] : peak;
      float whole = 0;
      for (int64_t i = 0; i < pieces; ++i) {
        const float weight = most[i * stride] == peak ? 1.0f : std::exp(most[i * stride] - peak);
        whole += weight * total[i * stride];
        // The sums of the first piece become those of all.
        for (int64_t d = 0; d < at_.depth; ++d) {
          sums[d] = i == 0 ? weight * sums[d] : sums[d] + weight * sums[i * stride + d];
        }
      }
      for (int64_t d = 0; d < at_.depth; ++d) sums[d] /= whole;
    }
    // Heads of queries stand in the order of the heads of keys that they share.
    write(at_, found, width, output_ + head * width * at_.bytes);
  }

  // ---- several tokens

  void several_tokens() {
    const size_t heads = size_t(at_.batch * node_.kv_heads);
    // Some 192 rows share what is made ready of the keys; fewer, where else there would be too few tasks.
    int64_t together = std::clamp<int64_t>(192 / at_.group, 8, 64);
    while (together > 16 && int64_t(heads) * ((at_.tokens + together - 1) / together) < 16) together /= 2;
    const int64_t blocks = (at_.tokens + together - 1) / together;
    call_.phases({heads, heads * size_t(blocks)}, [&](size_t part, size_t task) {
      const int64_t head = part == 0 ? int64_t(task) : int64_t(task) % int64_t(heads);
      const int64_t row = head / node_.kv_heads, kv_head = head % node_.kv_heads;
      if (part == 0) {
        if (copies_) copy(row, kv_head);
        float* room = numbers(at_.depth + 2 * at_.pairs);
        for (int64_t token = 0; token < at_.tokens; ++token) append(row, kv_head, token, room);
      } else {
        // The last tokens see most, and come first.
        const int64_t block = blocks - 1 - int64_t(task) / int64_t(heads);
        const int64_t begin = block * together;
        attend(row, kv_head, begin, std::min(at_.tokens, begin + together));
      }
    });
  }

  // Tokens [begin, end) of a row.
  void attend(int64_t row, int64_t kv_head, int64_t begin, int64_t end) const {
    const Kernels& run = kernels();
    const int64_t depth = at_.depth, width = at_.group * depth;
    const int64_t rows = ((end - begin) * at_.group + run.rows - 1) / run.rows * run.rows;
    float* query = numbers(2 * rows * depth + 2 * rows + run.rows * kBlock + 3 * kBlock * depth + 2 * at_.pairs);
    float *sums = query + rows * depth, *most = sums + rows * depth, *total = most + rows, *scores = total + rows;
    float *columns = scores + run.rows * kBlock, *keys = columns + kBlock * depth, *values = keys + kBlock * depth;
    float* room = values + kBlock * depth;
    std::fill(query + (end - begin) * width, most, 0.0f);
    std::fill(most, total, kLow);
    std::fill(total, scores, 0.0f);
    for (int64_t i = 0; i < end - begin; ++i) queries(row, kv_head, begin + i, query + i * width, room);
    const int64_t first = at_.start(row) + begin, last = at_.start(row) + end;
    for (int64_t key = std::max<int64_t>(0, first + 1 - node_.window); key < last; key += kBlock) {
      const int64_t count = std::min(kBlock, last - key), from = offset(row, kv_head, at_.length, key);
      const float* k = reinterpret_cast<const float*>(keys_ + from);
      const float* v = reinterpret_cast<const float*>(values_ + from);
      if (at_.half) {
        read(at_, keys_ + from, count * depth, keys);
        read(at_, values_ + from, count * depth, values);
        k = keys;
        v = values;
      }
      run.columns(k, count, depth, columns);
      run.block({query, rows, depth, columns, v, count, at_.group, first - key, node_.window, node_.softcap, scores,
                 sums, most, total});
    }
    for (int64_t token = begin; token < end; ++token) {
      float* made = sums + (token - begin) * width;
      for (int64_t head = 0; head < at_.group; ++head) {
        const float whole = total[(token - begin) * at_.group + head];
        for (int64_t d = 0; d < depth; ++d) made[head * depth + d] /= whole;
      }
      write(at_, made, width, output_ + ((row * at_.tokens + token) * node_.kv_heads + kv_head) * width * at_.bytes);
    }
  }

  const Attributes& node_;
  Layout at_;
  Call& call_;
  char *output_, *keys_, *values_;
  bool copies_;
};

class CachedAttention final : public Kernel {
 public:
  explicit CachedAttention(const Node& node) : attributes_(node) {}
  void compute(Call& call) override { Run(attributes_, call).run(); }

 private:
  Attributes attributes_;
};

void infer(Inference& inference) {
  const Inference::Dims query = inference.input(kQuery), past = inference.input(kPastKey);
  if (query.size() != 3 || past.size() != 4) return;
  Inference::Dim width;
  const int64_t heads = inference.integer("num_heads"), most = int64_t(1) << 31;  // whatever the model says
  if (past[3].size >= 0 && past[3].size < most && heads >= 0 && heads < most) width.size = heads * past[3].size;
  inference.output(0, inference.type(kQuery), {query[0], query[1], width});
  for (size_t i = 1; i < 3; ++i) inference.output(i, inference.type(kQuery), {past[0], past[1], {}, past[3]});
}

using T = ElementType;
const std::vector<T> kT = {T::float32, T::float16};
const Registration registration{{"CachedAttention",
                                 {{kT}, {kT}, {kT}, {kT}, {kT}, {{T::int32}}, {{T::int32}}, {kT}, {kT}},
                                 {{kT}, {kT}, {kT}},
                                 make<CachedAttention>,
                                 infer}};

}  // namespace
}  // namespace graphopt::cached_attention
