// First the unquantized tokens that some query sees, those in the ring and the new ones, become floats, block by block,
// and full blocks are quantized from them. Then threads share out the queries; each reads a block for many at once.
#include "prefill.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "read.h"
#include "turn_tables.h"
#include "write.h"

namespace graphopt::quantized_kv_attention {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int64_t kRows = 64;  // queries times their heads for one of keys, at least

class Prefill {
 public:
  Prefill(const Work& work, Buffer& memory) : work_(work), l_(work.layout) {
    for (int64_t row = 0; row < work.batch; ++row) {
      const Row& r = work.rows[row];
      tiles_ = std::max(tiles_, (r.total + l_.width - 1) / l_.width - work.first_unquantized(r));
      tables_ = std::max(tables_, (r.total + l_.width - 1) / l_.width);
    }
    if (!work.rotation.reads() || work.tables != nullptr) tables_ = 0;
    together_ = std::max<int64_t>(1, kRows / l_.queries());
    parts_ = (work.fresh + together_ - 1) / together_;
    const int64_t table = tables_ * work.rotation.half * l_.width;
    const int64_t floats = work.batch * l_.kv_heads * tiles_ * l_.numbers();
    cos_ = reinterpret_cast<float*>(memory.reserve(size_t(2 * table + 2 * floats) * sizeof(float)));
    sin_ = cos_ + table;
    keys_ = sin_ + table;
    values_ = keys_ + floats;
  }

  size_t table_tasks() const { return size_t(tables_); }
  size_t head_tasks() const { return size_t(work_.batch * l_.kv_heads); }
  size_t query_tasks() const { return size_t(work_.batch * l_.kv_heads * parts_); }

  void table(size_t block) const {
    const Rotation& r = work_.rotation;
    turn_table(r.cos, r.rows, r.half, l_.width, int64_t(block), cos_ + int64_t(block) * r.half * l_.width);
    turn_table(r.sin, r.rows, r.half, l_.width, int64_t(block), sin_ + int64_t(block) * r.half * l_.width);
  }

  void write(size_t task) const {
    const int64_t row = int64_t(task) / l_.kv_heads, kv = int64_t(task) % l_.kv_heads;
    const Row& tokens = work_.rows[row];
    thread_local std::vector<uint16_t> fresh;
    fresh.resize(size_t(2 * tokens.fresh() * l_.depth));
    for (int64_t i = 0; i < tokens.fresh(); ++i) {
      narrowed(work_, true, row, i, kv, &fresh[2 * i * l_.depth]);
      narrowed(work_, false, row, i, kv, &fresh[(2 * i + 1) * l_.depth]);
    }
    const auto half = [&](int64_t part, int64_t token) -> const uint16_t* {
      if (token < tokens.past) return work_.cache.recent_of(l_, row, kv, part, token);
      return &fresh[(2 * (token - tokens.past) + part) * l_.depth];
    };
    thread_local std::vector<float> features;
    features.resize(size_t(l_.depth));
    const int64_t first = work_.first_unquantized(tokens), full = work_.shared ? 0 : l_.blocks(tokens.total);
    for (int64_t block = first; block * l_.width < tokens.total; ++block) {
      float* keys = keys_of(row, kv, block - first);
      float* values = values_of(row, kv, block - first);
      for (int64_t t = 0; t < l_.width; ++t) {
        const int64_t token = block * l_.width + t;
        if (token < tokens.total) {
          kernels().widen(half(0, token), l_.depth, features.data());
          kernels().widen(half(1, token), l_.depth, values + t * l_.depth);
        } else {
          std::fill(features.begin(), features.end(), 0.0f);
          std::fill(values + t * l_.depth, values + (t + 1) * l_.depth, 0.0f);
        }
        for (int64_t i = 0; i < l_.depth; ++i) keys[i * l_.width + t] = features[i];
      }
      if (block < full) write_block(work_, row, block, kv, keys, values);
      if (work_.rotation.reads()) turn(keys, block);
    }
    if (work_.shared) return;
    for (int64_t token = std::max(tokens.past, tokens.total - l_.ring()); token < tokens.total; ++token) {
      for (int64_t part = 0; part < 2; ++part) {
        const uint16_t* from = half(part, token);
        std::copy(from, from + l_.depth, work_.cache.recent_of(l_, row, kv, part, token));
      }
    }
  }

  void attend(size_t task) const {
    const int64_t part = int64_t(task) % parts_, kv = int64_t(task) / parts_ % l_.kv_heads;
    const int64_t row = int64_t(task) / parts_ / l_.kv_heads;
    const Row& tokens = work_.rows[row];
    const int64_t begin = part * together_, end = std::min(begin + together_, work_.fresh);
    const int64_t real = std::min(end, tokens.fresh());
    for (int64_t index = std::max(begin, real); index < end; ++index) {
      for (int64_t i = 0; i < l_.queries(); ++i) work_.put(row, index, kv * l_.queries() + i, nullptr, 0);
    }
    if (begin >= real) return;
    thread_local Queries q;
    q.start(*this, row, kv, begin, real);
    const int64_t first_at = tokens.past + begin, last_at = tokens.past + real - 1;
    const int64_t seen = work_.first_seen(first_at) / l_.width, first_tile = work_.first_unquantized(tokens);
    for (int64_t block = seen; block < work_.blocks(tokens, last_at); ++block) {
      const float* keys = q.reader.keys(row, block, kv, cos_of(block), sin_of(block));
      q.add(*this, block, true, keys, q.reader.values(row, block, kv));
    }
    for (int64_t block = std::max(seen, work_.blocks(tokens, first_at)); block * l_.width <= last_at; ++block) {
      q.add(*this, block, false, keys_of(row, kv, block - first_tile), values_of(row, kv, block - first_tile));
    }
    q.finish(*this, row, kv);
  }

 private:
  // The queries of one task: rows of `index * queries() + head`.
  struct Queries {
    FloatReader reader;
    std::vector<float> queries, scores, values, largest, total;
    int64_t begin, rows, first_at;
    const Row* of;

    void start(const Prefill& p, int64_t row, int64_t kv, int64_t first, int64_t end) {
      const Layout& l = p.l_;
      reader.prepare(p.work_);
      begin = first;
      rows = (end - first) * l.queries();
      of = &p.work_.rows[row];
      first_at = of->past + first;
      queries.resize(size_t(rows * l.depth));
      scores.resize(size_t(rows * l.width));
      values.assign(size_t(rows * l.depth), 0.0f);
      largest.assign(size_t(rows), kNone);
      total.assign(size_t(rows), 0.0f);
      for (int64_t r = 0; r < rows; ++r) {
        p.work_.query_of(row, first + r / l.queries(), kv * l.queries() + r % l.queries(), &queries[r * l.depth]);
      }
    }

    // Attends to one block, by the queries to which it is quantized or isn't.
    void add(const Prefill& p, int64_t block, bool quantized, const float* keys, const float* of_values) {
      const Layout& l = p.l_;
      const int64_t width = l.width, depth = l.depth, from = block * width;
      kernels().multiply(rows, width, depth, queries.data(), depth, keys, width, scores.data(), width, false);
      if (p.work_.softcap > 0) kernels().cap(scores.data(), rows * width, p.work_.softcap);
      for (int64_t r = 0; r < rows; ++r) {
        float* of_row = &scores[r * width];
        const int64_t at = first_at + r / l.queries();
        const int64_t low = std::max(p.work_.first_seen(at) - from, int64_t(0));
        const int64_t high = std::min(at + 1 - from, width);
        if ((block < p.work_.blocks(*of, at)) != quantized || low >= high) {
          std::fill(of_row, of_row + width, 0.0f);
          continue;
        }
        std::fill(of_row, of_row + low, kNone);
        std::fill(of_row + high, of_row + width, kNone);
        const float here = kernels().largest(of_row, width);
        if (!(here <= largest[r])) {
          const float factor = std::exp(largest[r] - here);
          largest[r] = here;
          total[r] *= factor;
          kernels().scale(&values[r * depth], depth, factor);
        }
        total[r] += kernels().exponentials(of_row, width, largest[r]);
      }
      kernels().multiply(rows, depth, width, scores.data(), width, of_values, depth, values.data(), depth, true);
    }

    void finish(const Prefill& p, int64_t row, int64_t kv) {
      const Layout& l = p.l_;
      for (int64_t r = 0; r < rows; ++r) {
        p.work_.put(row, begin + r / l.queries(), kv * l.queries() + r % l.queries(), &values[r * l.depth],
                    1.0f / total[r]);
      }
    }
  };

  const float* cos_of(int64_t block) const {
    if (work_.tables != nullptr) return work_.tables->cos(block);
    return work_.rotation.reads() ? cos_ + block * work_.rotation.half * l_.width : nullptr;
  }
  const float* sin_of(int64_t block) const {
    if (work_.tables != nullptr) return work_.tables->sin(block);
    return work_.rotation.reads() ? sin_ + block * work_.rotation.half * l_.width : nullptr;
  }
  float* keys_of(int64_t row, int64_t kv, int64_t tile) const {
    return keys_ + ((row * l_.kv_heads + kv) * tiles_ + tile) * l_.numbers();
  }
  float* values_of(int64_t row, int64_t kv, int64_t tile) const {
    return values_ + ((row * l_.kv_heads + kv) * tiles_ + tile) * l_.numbers();
  }
  void turn(float* keys, int64_t block) const {
    const Rotation& r = work_.rotation;
    kernels().rotate(keys, l_.width, r.half, r.first_step(), r.second_at(), cos_of(block), sin_of(block));
  }

  const Work& work_;
  const Layout& l_;
  int64_t tiles_ = 0, tables_ = 0, together_, parts_;
  float *cos_, *sin_;       // [tables, half, width]
  float *keys_, *values_;   // [B, KV, tiles, depth, width] and [B, KV, tiles, width, depth]
};

}  // namespace

void prefill(Call& call, const Work& work, size_t copies, const std::function<void(size_t)>& copy) {
  Buffer memory;
  const Prefill run(work, memory);
  call.phases({copies + run.table_tasks(), run.head_tasks(), run.query_tasks()}, [&](size_t part, size_t task) {
    if (part == 0 && task < copies) copy(task);
    if (part == 0 && task >= copies) run.table(task - copies);
    if (part == 1) run.write(task);
    if (part == 2) run.attend(task);
  });
}

}  // namespace graphopt::quantized_kv_attention
