// The CPU kernel of QuantizedKVAttention: what is given is checked here, before anything is read.
#include <algorithm>
#include <cstring>
#include <vector>

#include "decode.h"
#include "layout.h"
#include "operator.h"
#include "prefill.h"

namespace graphopt::quantized_kv_attention {
namespace {

constexpr int64_t kMostTokens = 1 << 20, kMostDepth = 1 << 16;

class QuantizedKVAttention final : public Kernel {
 public:
  explicit QuantizedKVAttention(const Node& node)
      : heads_(node.integer("num_heads")),
        kv_heads_(node.integer("kv_num_heads")),
        width_(node.integer("block_size")),
        window_(node.integer("window")),
        key_bits_(node.integer("key_bits")),
        value_bits_(node.integer("value_bits")),
        group_(node.integer("group_size")),
        local_(node.integer("local_window_size")),
        per_channel_(node.integer("key_per_channel") != 0),
        at_read_(node.integer("rotate_at_read") != 0),
        interleaved_(node.integer("rotary_interleaved") != 0),
        scale_(node.number("scale")),
        softcap_(node.number("softcap")) {
    GRAPHOPT_REQUIRE(kv_heads_ > 0 && heads_ > 0 && heads_ % kv_heads_ == 0 && heads_ <= kMostTokens,
                     "num_heads %lld isn't a multiple of kv_num_heads %lld", (long long)heads_, (long long)kv_heads_);
    for (int64_t bits : {key_bits_, value_bits_}) {
      GRAPHOPT_REQUIRE(bits == 2 || bits == 3 || bits == 4 || bits == 8, "there are 2, 3, 4 or 8 bits, not %lld",
                       (long long)bits);
    }
    GRAPHOPT_REQUIRE(width_ > 0 && width_ % 4 == 0 && width_ <= kMostDepth,
                     "block_size is a positive multiple of 4, not %lld", (long long)width_);
    GRAPHOPT_REQUIRE(window_ >= 0 && window_ <= kMostTokens, "window is %lld", (long long)window_);
    GRAPHOPT_REQUIRE(group_ >= 0 && group_ % 4 == 0, "group_size is a multiple of 4, not %lld", (long long)group_);
  }

  void compute(Call& call) override {
    Tensor in[9];
    for (size_t i = 0; i < 9; ++i) in[i] = call.input(i);
    static constexpr size_t kRanks[9] = {3, 3, 3, 4, 4, 5, 1, 2, 2};
    static constexpr const char* kNames[9] = {"query",       "key",       "value",     "past_codes", "past_scales",
                                              "past_recent", "seqlens_k", "cos_cache", "sin_cache"};
    for (size_t i = 0; i < 9; ++i) {
      GRAPHOPT_REQUIRE(in[i].shape.size() == kRanks[i], "%s has %zu dimensions, not %zu", kNames[i], in[i].shape.size(),
                       kRanks[i]);
    }
    const int64_t batch = in[0].dim(0), fresh = in[0].dim(1), depth = in[5].dim(4);
    GRAPHOPT_REQUIRE(depth > 0 && depth % 4 == 0 && depth <= kMostDepth,
                     "a head has a multiple of 4 features, not %lld as past_recent %s says", (long long)depth,
                     text(in[5].shape).c_str());
    const int64_t group = group_ == 0 ? depth : group_;
    GRAPHOPT_REQUIRE(depth % group == 0, "group_size %lld doesn't divide the head's %lld features", (long long)group,
                     (long long)depth);
    Work work{};
    work.layout = {heads_, kv_heads_, depth, width_, window_, key_bits_, value_bits_, group, per_channel_};
    const Layout& l = work.layout;
    const auto require = [&](size_t i, const Shape& shape) {
      GRAPHOPT_REQUIRE(in[i].shape == shape, "%s is %s and must be %s", kNames[i], text(in[i].shape).c_str(),
                       text(shape).c_str());
    };
    const int64_t blocks = in[3].dim(1), rows = in[7].dim(0), half = in[7].dim(1);
    require(0, {batch, fresh, heads_ * depth});
    require(1, {batch, fresh, kv_heads_ * depth});
    require(2, {batch, fresh, kv_heads_ * depth});
    require(3, {batch, blocks, kv_heads_, l.code_bytes()});
    require(4, {batch, blocks, kv_heads_, l.scale_numbers()});
    require(5, {batch, kv_heads_, 2, l.ring(), depth});
    require(6, {batch});
    require(8, in[7].shape);
    GRAPHOPT_REQUIRE(2 * half <= depth, "the tables %s turn more than the head's %lld features",
                     text(in[7].shape).c_str(), (long long)depth);

    std::vector<Row> lengths(static_cast<size_t>(batch));
    int64_t needed = blocks;
    for (int64_t row = 0; row < batch; ++row) {
      const int64_t total = int64_t(in[6].as<int32_t>()[row]) + 1, past = std::max<int64_t>(total - fresh, 0);
      GRAPHOPT_REQUIRE(total >= 0, "seqlens_k is %lld in row %lld", (long long)total - 1, (long long)row);
      GRAPHOPT_REQUIRE(l.blocks(past) <= blocks, "a past of %lld tokens (row %lld) is longer than the cache, %lld blocks",
                       (long long)past, (long long)row, (long long)blocks);
      GRAPHOPT_REQUIRE(half == 0 || total <= rows, "there are %lld tokens (row %lld), and the tables have %lld rows",
                       (long long)total, (long long)row, (long long)rows);
      lengths[row] = {total, past};
      needed = std::max(needed, l.blocks(total));
    }

    work.rotation = {in[7].as<float>(), in[8].as<float>(), rows, half, interleaved_, at_read_};
    work.rows = lengths.data();
    work.batch = batch;
    work.fresh = fresh;
    work.half = in[0].type == ElementType::float16;
    work.query = in[0].data;
    work.key = in[1].data;
    work.value = in[2].data;
    work.scale = scale_;
    work.softcap = softcap_;
    work.local = local_;
    work.output = call.output(0, in[0].shape);
    work.cache = {call.output<uint8_t>(1, {batch, needed, kv_heads_, l.code_bytes()}),
                  call.output<uint16_t>(2, {batch, needed, kv_heads_, l.scale_numbers()}),
                  call.output<uint16_t>(3, in[5].shape), needed};
    // What isn't in place is copied, row by row; blocks that weren't there are 0.
    const auto copy = [&](size_t task) {
      const int64_t row = int64_t(task);
      copy_row(in[3].data, work.cache.codes, row, blocks * kv_heads_ * l.code_bytes(),
               needed * kv_heads_ * l.code_bytes());
      copy_row(in[4].data, work.cache.scales, row, 2 * blocks * kv_heads_ * l.scale_numbers(),
               2 * needed * kv_heads_ * l.scale_numbers());
      const int64_t recent = 4 * kv_heads_ * l.ring() * depth;
      copy_row(in[5].data, work.cache.recent, row, recent, recent);
    };
    const bool in_place = in[3].data == work.cache.codes && in[4].data == work.cache.scales &&
                          in[5].data == work.cache.recent && needed == blocks;
    (fresh == 1 ? decode : prefill)(call, work, in_place ? 0 : size_t(batch), copy);
  }

 private:
  static void copy_row(const void* from, void* to, int64_t row, int64_t bytes, int64_t room) {
    if (from == to) return;
    uint8_t* const at = static_cast<uint8_t*>(to) + row * room;
    if (bytes > 0) std::memcpy(at, static_cast<const uint8_t*>(from) + row * bytes, size_t(bytes));
    if (room > bytes) std::memset(at + bytes, 0, size_t(room - bytes));
  }

  int64_t heads_, kv_heads_, width_, window_, key_bits_, value_bits_, group_, local_;
  bool per_channel_, at_read_, interleaved_;
  float scale_, softcap_;
};

void infer(Inference& inference) {
  inference.output(0, inference.type(0), inference.input(0));
  for (size_t i = 1; i < 4; ++i) {
    Inference::Dims dims = inference.input(i + 2);
    if (i < 3 && dims.size() == 4) dims[1] = {};  // longer where more blocks are needed
    inference.output(i, inference.type(i + 2), dims);
  }
}

using T = ElementType;
const std::vector<T> kT = {T::float32, T::float16};
const Registration registration{{"QuantizedKVAttention",
                                 {{kT}, {kT}, {kT}, {{T::uint8}}, {{T::float16}}, {{T::float16}}, {{T::int32}},
                                  {{T::float32}}, {{T::float32}}},
                                 {{kT}, {{T::uint8}}, {{T::float16}}, {{T::float16}}},
                                 make<QuantizedKVAttention>,
                                 infer}};

}  // namespace
}  // namespace graphopt::quantized_kv_attention
