#include "turn_tables.h"

#include <map>
#include <mutex>
#include <tuple>

#include "kernels.h"

namespace graphopt::quantized_kv_attention {

void turn_table(const float* table, int64_t rows, int64_t half, int64_t width, int64_t block, float* to) {
  const int64_t begin = block * width;
  if (begin + width <= rows) {
    kernels().transpose(table + begin * half, width, half, to);
    return;
  }
  for (int64_t pair = 0; pair < half; ++pair) {
    for (int64_t t = 0; t < width; ++t) {
      to[pair * width + t] = begin + t < rows ? table[(begin + t) * half + pair] : 0;
    }
  }
}

std::shared_ptr<const TurnTables> TurnTables::of(const Node& node, size_t cos, size_t sin, int64_t width) {
  Tensor tables[2];
  if (!node.constant(cos, &tables[0]) || !node.constant(sin, &tables[1])) return nullptr;
  const Shape shape = tables[0].shape;
  if (shape.size() != 2 || tables[1].shape != shape || shape[0] == 0 || shape[1] == 0) return nullptr;
  const int64_t rows = shape[0], half = shape[1];
  auto made = std::make_shared<TurnTables>();
  made->size_ = half * width;
  const int64_t blocks = (rows + width - 1) / width;
  made->numbers_.resize(size_t(2 * blocks * made->size_));
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < 2; ++i) {
      turn_table(tables[i].as<float>(), rows, half, width, block, made->numbers_.data() + (2 * block + i) * made->size_);
    }
  }
  // What lies at an address may be another session's table by now, so the numbers count.
  using Key = std::tuple<const void*, const void*, int64_t>;
  static std::mutex mutex;
  static std::map<Key, std::weak_ptr<const TurnTables>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto it = known.begin(); it != known.end();) it = it->second.expired() ? known.erase(it) : std::next(it);
  std::weak_ptr<const TurnTables>& entry = known[{tables[0].data, tables[1].data, width}];
  std::shared_ptr<const TurnTables> found = entry.lock();
  if (found != nullptr && found->size_ == made->size_ && found->numbers_ == made->numbers_) return found;
  entry = made;
  return made;
}

}  // namespace graphopt::quantized_kv_attention
