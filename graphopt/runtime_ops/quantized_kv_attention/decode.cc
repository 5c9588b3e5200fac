// The cache's blocks are shared out among threads; each part has the largest score, the sum of weights and the weighted
// sum of values of its tokens for every head, and in the end the parts are put together.
#include "decode.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "read.h"
#include "write.h"

namespace graphopt::quantized_kv_attention {
namespace {

constexpr int64_t kSmall = 1 << 16;  // tokens times the queries' features, of some 10 µs
constexpr float kNone = -std::numeric_limits<float>::infinity();

// What tokens give for one head.
struct Partial {
  float* largest;
  float* total;
  float* values;  // [depth]

  void clear(int64_t depth) const {
    *largest = kNone;
    *total = 0;
    std::fill(values, values + depth, 0.0f);
  }
  // Turns scores into weights relative to the largest score so far.
  void weigh(float* scores, int64_t count, int64_t depth) const {
    const float here = kernels().largest(scores, count);
    if (!(here <= *largest)) {
      const float factor = std::exp(*largest - here);
      *largest = here;
      *total *= factor;
      kernels().scale(values, depth, factor);
    }
    *total += kernels().exponentials(scores, count, *largest);
  }
};

class Decode {
 public:
  Decode(const Work& work, Buffer& memory) : work_(work), l_(work.layout) {
    int64_t most = 0, tokens = 0;
    for (int64_t row = 0; row < work.batch; ++row) {
      most = std::max(most, l_.blocks(work.rows[row].total));
      tokens += work.rows[row].total;
    }
    is_small_ = tokens * l_.heads * l_.depth < kSmall;
    // Some 16 parts, of no fewer than two blocks.
    together_ = std::max<int64_t>(2, (most + 15) / 16);
    parts_ = (most + together_ - 1) / together_;
    stride_ = l_.depth + 2;
    const int64_t queries = work.batch * l_.heads * l_.depth;
    const int64_t partials = work.batch * (parts_ + 1) * l_.heads * stride_;
    queries_ = reinterpret_cast<float*>(memory.reserve(size_t(queries + partials) * sizeof(float)));
    partials_ = queries_ + queries;
  }

  // Whether it takes no longer than waking threads does.
  bool is_small() const { return is_small_; }
  size_t block_tasks() const { return size_t(work_.batch * parts_); }
  size_t head_tasks() const { return size_t(work_.batch * l_.kv_heads); }

  void start(size_t task) const {
    const int64_t row = int64_t(task) / l_.kv_heads, kv = int64_t(task) % l_.kv_heads;
    if (work_.rows[row].total == 0) return;
    if (!work_.shared) append(work_, row, kv);
    for (int64_t i = 0; i < l_.queries(); ++i) {
      const int64_t head = kv * l_.queries() + i;
      work_.query_of(row, 0, head, queries_of(row, head));
    }
  }

  // Window tasks first, since they are the longest.
  void attend(size_t task) const {
    if (task < head_tasks()) {
      recent(int64_t(task) / l_.kv_heads, int64_t(task) % l_.kv_heads);
    } else {
      task -= head_tasks();
      blocks(int64_t(task) / parts_, int64_t(task) % parts_);
    }
  }

  void finish(size_t task) const {
    thread_local std::vector<float> values;
    values.resize(size_t(l_.depth));
    const int64_t row = int64_t(task) / l_.kv_heads, kv = int64_t(task) % l_.kv_heads;
    for (int64_t head = kv * l_.queries(); head < (kv + 1) * l_.queries(); ++head) {
      if (work_.rows[row].total == 0) {
        work_.put(row, 0, head, nullptr, 0);
        continue;
      }
      // The newest token is never quantized, so the last part has a largest score.
      float largest = *partial(row, parts_, head).largest, total = 0;
      for (int64_t part = 0; part < parts_; ++part) largest = std::max(largest, *partial(row, part, head).largest);
      std::fill(values.begin(), values.end(), 0.0f);
      for (int64_t part = 0; part <= parts_; ++part) {
        const Partial from = partial(row, part, head);
        if (*from.largest == kNone) continue;
        const float factor = std::exp(*from.largest - largest);
        total += factor * *from.total;
        for (int64_t i = 0; i < l_.depth; ++i) values[i] += factor * from.values[i];
      }
      work_.put(row, 0, head, values.data(), 1.0f / total);
    }
  }

 private:
  float* queries_of(int64_t row, int64_t head) const { return queries_ + (row * l_.heads + head) * l_.depth; }
  Partial partial(int64_t row, int64_t part, int64_t head) const {
    float* at = partials_ + ((row * (parts_ + 1) + part) * l_.heads + head) * stride_;
    return {at + l_.depth, at + l_.depth + 1, at};
  }

  void turn(float* features, int64_t place) const {
    const Rotation& r = work_.rotation;
    if (r.interleaved) {
      r.turn(features, place);
    } else {
      kernels().turn_row(features, r.half, r.cos + place * r.half, r.sin + place * r.half);
    }
  }

  // What isn't quantized.
  void recent(int64_t row, int64_t kv) const {
    thread_local std::vector<float> keys, values, scores;
    const int64_t depth = l_.depth, total = work_.rows[row].total, first_head = kv * l_.queries();
    for (int64_t i = 0; i < l_.queries(); ++i) partial(row, parts_, first_head + i).clear(depth);
    const int64_t begin = std::max(l_.blocks(total) * l_.width, work_.first_seen(total - 1)), count = total - begin;
    if (count <= 0) return;
    keys.resize(size_t(count * depth));
    values.resize(size_t(count * depth));
    scores.resize(size_t(l_.queries() * count));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = begin + i;
      kernels().widen(work_.cache.recent_of(l_, row, kv, 0, token), depth, &keys[i * depth]);
      kernels().widen(work_.cache.recent_of(l_, row, kv, 1, token), depth, &values[i * depth]);
      if (work_.rotation.reads()) turn(&keys[i * depth], token);
    }
    kernels().dot_rows(l_.queries(), count, depth, queries_of(row, first_head), keys.data(), scores.data(), count);
    if (work_.softcap > 0) kernels().cap(scores.data(), l_.queries() * count, work_.softcap);
    for (int64_t i = 0; i < l_.queries(); ++i) {
      partial(row, parts_, first_head + i).weigh(&scores[i * count], count, depth);
    }
    kernels().multiply(l_.queries(), depth, count, scores.data(), count, values.data(), depth,
                       partial(row, parts_, first_head).values, stride_, true);
  }

  void blocks(int64_t row, int64_t part) const {
    for (int64_t head = 0; head < l_.heads; ++head) partial(row, part, head).clear(l_.depth);
    const int64_t total = work_.rows[row].total;
    const int64_t seen = work_.first_seen(total - 1);
    const int64_t begin = std::max(part * together_, seen / l_.width);
    const int64_t end = std::min((part + 1) * together_, l_.blocks(total));
    if (begin >= end) return;
    thread_local BlockReader reader;
    reader.prepare(work_, queries_of(row, 0));
    for (int64_t block = begin; block < end; ++block) {
      reader.turn_to(block);
      for (int64_t kv = 0; kv < l_.kv_heads; ++kv) {
        float* scores = reader.scores(row, block, kv);
        for (int64_t i = 0; i < l_.queries(); ++i) {
          float* of_head = scores + i * l_.width;
          if (work_.softcap > 0) kernels().cap(of_head, l_.width, work_.softcap);
          for (int64_t t = 0; block * l_.width + t < seen; ++t) of_head[t] = kNone;
          partial(row, part, kv * l_.queries() + i).weigh(of_head, l_.width, l_.depth);
        }
        reader.add_values(partial(row, part, kv * l_.queries()).values, stride_);
      }
    }
  }

  const Work& work_;
  const Layout& l_;
  bool is_small_;
  int64_t together_, parts_, stride_;
  float* queries_;   // [B, H, depth]
  float* partials_;  // [B, parts + 1, H, depth + 2]: the last part is that of the ring
};

}  // namespace

void decode(Call& call, const Work& work, size_t copies, const std::function<void(size_t)>& copy) {
  thread_local Buffer memory;
  const Decode run(work, memory);
  const auto step = [&](size_t part, size_t task) {
    if (part == 0) copy(task);
    if (part == 1) run.start(task);
    if (part == 2) run.attend(task);
    if (part == 3) run.finish(task);
  };
  const std::vector<size_t> tasks = {copies, run.head_tasks(), run.head_tasks() + run.block_tasks(), run.head_tasks()};
  if (!run.is_small()) return call.phases(tasks, step);
  for (size_t part = 0; part < tasks.size(); ++part) {
    for (size_t task = 0; task < tasks[part]; ++task) step(part, task);
  }
}

}  // namespace graphopt::quantized_kv_attention
