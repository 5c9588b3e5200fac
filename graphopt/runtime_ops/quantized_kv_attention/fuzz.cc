// What a valid node of QuantizedKVAttention looks like, for the fuzzer.
#include "fuzz/case.h"
#include "layout.h"

namespace graphopt::fuzz {
namespace {

const Maker maker{"QuantizedKVAttention", [](Random& random, Case& made) {
  quantized_kv_attention::Layout l{};
  l.kv_heads = random.between(1, 3);
  l.heads = l.kv_heads * random.between(1, 6);
  l.depth = 4 * random.between(1, 12);
  l.width = 4 * random.between(1, 9);
  l.window = random.below(30);
  l.key_bits = random.pick<int64_t>({2, 3, 4, 8});
  l.value_bits = random.pick<int64_t>({2, 3, 4, 8});
  const int64_t group = random.chance(50) ? 0 : 4;
  l.group = group == 0 ? l.depth : group;
  l.per_channel = random.chance(50);
  made.attribute("num_heads", l.heads);
  made.attribute("kv_num_heads", l.kv_heads);
  made.attribute("scale", random.number());
  made.attribute("softcap", random.chance(30) ? 3.0f : 0.0f);
  made.attribute("local_window_size", random.chance(30) ? random.between(1, 40) : int64_t(-1));
  made.attribute("key_bits", l.key_bits);
  made.attribute("value_bits", l.value_bits);
  made.attribute("key_per_channel", int64_t(l.per_channel));
  made.attribute("block_size", l.width);
  made.attribute("group_size", group);
  made.attribute("window", l.window);
  made.attribute("rotate_at_read", random.below(2));
  made.attribute("rotary_interleaved", random.below(2));
  const bool shared = random.chance(30);
  made.attribute("shared", int64_t(shared));
  const int64_t batch = random.below(4), fresh = random.chance(50) ? 1 : random.below(20);
  // In place there is no room for more blocks.
  const bool in_place = shared || random.chance(40);
  const int64_t blocks = random.below(5), room = blocks * l.width + l.ring() - 1, most = in_place ? room : room + fresh;
  const int64_t half = random.chance(30) ? 0 : random.between(1, l.depth / 2);
  made.input({batch, fresh, l.heads * l.depth});
  made.input({batch, fresh, l.kv_heads * l.depth});
  made.input({batch, fresh, l.kv_heads * l.depth});
  made.input({batch, blocks, l.kv_heads, l.code_bytes()});
  made.input({batch, blocks, l.kv_heads, l.scale_numbers()});
  made.input({batch, l.kv_heads, 2, l.ring(), l.depth});
  made.input({batch}, -1, most - 1);
  made.input({most, half});
  made.input({most, half});
  if (shared) {
    for (size_t i = 1; i < 4; ++i) made.outputs[i].wanted = false;
  } else if (in_place) {
    for (size_t i = 1; i < 4; ++i) made.share(i, i + 2);
  }
}};

}  // namespace
}  // namespace graphopt::fuzz
