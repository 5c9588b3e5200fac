// What a valid node of CachedAttention looks like, for the fuzzer.
#include <algorithm>

#include "fuzz/case.h"

namespace graphopt::fuzz {
namespace {

const Maker maker{"CachedAttention", [](Random& random, Case& made) {
  const int64_t kv = random.between(1, 3), heads = kv * random.pick({1, 2, 3}), depth = random.pick({1, 4, 6, 16, 20});
  const int64_t batch = random.below(3), fresh = random.pick({1, 1, 1, 2, 7, 40}), capacity = random.below(80);
  const int64_t total = std::max<int64_t>(fresh, random.between(1, std::max<int64_t>(capacity, 1)));
  const int64_t half = random.chance(60) ? random.between(0, depth / 2) : 0;
  const bool packed = random.chance(30);
  made.attribute("num_heads", heads);
  made.attribute("kv_num_heads", kv);
  made.attribute("scale", 0.3f);
  made.attribute("softcap", random.pick({0.0f, 0.0f, 5.0f}));
  made.attribute("local_window_size", random.chance(70) ? int64_t(-1) : random.between(1, 20));
  made.attribute("rotary_interleaved", random.below(2));
  made.input({batch, fresh, packed ? (heads + 2 * kv) * depth : heads * depth});
  packed ? made.input({0}) : made.input({batch, fresh, kv * depth});
  packed ? made.input({0}) : made.input({batch, fresh, kv * depth});
  made.input({batch, kv, capacity, depth});
  made.input({batch, kv, capacity, depth});
  made.input({batch}, fresh - 1, total - 1);
  made.values({}, {double(total)});
  made.input({half > 0 ? total : 0, half});
  made.input({half > 0 ? total : 0, half});
  if (random.chance(50) && total <= capacity) {
    made.share(1, 3);
    made.share(2, 4);
  }
}};

}  // namespace
}  // namespace graphopt::fuzz
