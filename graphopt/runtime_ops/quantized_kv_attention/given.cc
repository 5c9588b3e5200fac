#include "given.h"

#include <algorithm>

namespace graphopt::quantized_kv_attention {
namespace {

constexpr int64_t kMostTokens = 1 << 20, kMostDepth = 1 << 16;
constexpr size_t kRanks[kInputs] = {3, 3, 3, 4, 4, 5, 1, 2, 2};
constexpr const char* kNames[kInputs] = {"query",       "key",       "value",     "past_codes", "past_scales",
                                         "past_recent", "seqlens_k", "cos_cache", "sin_cache"};

void infer(Inference& inference) {
  inference.output(0, inference.type(kQuery), inference.input(kQuery));
  if (inference.integer("shared", 0) != 0) return;
  for (size_t i = 0; i < 3; ++i) {
    Inference::Dims dims = inference.input(kPastCodes + i);
    if (i < 2 && dims.size() == 4) dims[1] = {};  // longer where more blocks are needed
    inference.output(i + 1, inference.type(kPastCodes + i), dims);
  }
}

}  // namespace

int64_t Given::row_bytes(size_t i, int64_t blocks) const {
  const Layout& l = work.layout;
  if (i == 0) return blocks * l.kv_heads * l.code_bytes();
  if (i == 1) return blocks * l.kv_heads * l.scale_numbers() * 2;
  return l.kv_heads * 2 * l.ring() * l.depth * 2;
}

void* Given::present(size_t i) const {
  const Cache& c = work.cache;
  return i == 0 ? static_cast<void*>(c.codes) : i == 1 ? c.scales : c.recent;
}

bool Given::in_place() const {
  return past(0) == present(0) && past(1) == present(1) && past(2) == present(2) && past_blocks == work.cache.blocks;
}

Settings::Settings(const Node& node)
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
      shared_(node.integer("shared", 0) != 0),
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

void Settings::read(Call& call, Given& given) const {
  Tensor(&in)[kInputs] = given.in;
  for (size_t i = 0; i < kInputs; ++i) {
    in[i] = call.input(i);
    GRAPHOPT_REQUIRE(in[i].shape.size() == kRanks[i], "%s has %zu dimensions, not %zu", kNames[i], in[i].shape.size(),
                     kRanks[i]);
  }
  const int64_t batch = in[kQuery].dim(0), fresh = in[kQuery].dim(1), depth = in[kPastRecent].dim(4);
  GRAPHOPT_REQUIRE(depth > 0 && depth % 4 == 0 && depth <= kMostDepth,
                   "a head has a multiple of 4 features, not %lld as past_recent %s says", (long long)depth,
                   text(in[kPastRecent].shape).c_str());
  const int64_t group = group_ == 0 ? depth : group_;
  GRAPHOPT_REQUIRE(depth % group == 0, "group_size %lld doesn't divide the head's %lld features", (long long)group,
                   (long long)depth);
  Work& work = given.work;
  work = {};
  work.layout = {heads_, kv_heads_, depth, width_, window_, key_bits_, value_bits_, group, per_channel_};
  const Layout& l = work.layout;
  const auto require = [&](size_t i, const Shape& shape) {
    GRAPHOPT_REQUIRE(in[i].shape == shape, "%s is %s and must be %s", kNames[i], text(in[i].shape).c_str(),
                     text(shape).c_str());
  };
  const int64_t blocks = in[kPastCodes].dim(1), rows = in[kCosCache].dim(0), half = in[kCosCache].dim(1);
  require(kQuery, {batch, fresh, heads_ * depth});
  require(kKey, {batch, fresh, kv_heads_ * depth});
  require(kValue, {batch, fresh, kv_heads_ * depth});
  require(kPastCodes, {batch, blocks, kv_heads_, l.code_bytes()});
  require(kPastScales, {batch, blocks, kv_heads_, l.scale_numbers()});
  require(kPastRecent, {batch, kv_heads_, 2, l.ring(), depth});
  require(kSeqlensK, {batch});
  require(kSinCache, in[kCosCache].shape);
  GRAPHOPT_REQUIRE(half <= depth / 2, "the tables %s turn more than the head's %lld features",
                   text(in[kCosCache].shape).c_str(), (long long)depth);

  given.rows.resize(size_t(batch));
  int64_t needed = blocks;
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t total = int64_t(in[kSeqlensK].as<int32_t>()[row]) + 1, past = std::max<int64_t>(total - fresh, 0);
    GRAPHOPT_REQUIRE(total >= 0, "seqlens_k is %lld in row %lld", (long long)total - 1, (long long)row);
    GRAPHOPT_REQUIRE(l.blocks(past) <= blocks, "a past of %lld tokens (row %lld) is longer than the cache, %lld blocks",
                     (long long)past, (long long)row, (long long)blocks);
    GRAPHOPT_REQUIRE(half == 0 || total <= rows, "there are %lld tokens (row %lld), and the tables have %lld rows",
                     (long long)total, (long long)row, (long long)rows);
    given.rows[size_t(row)] = {total, past};
    if (shared_) {
      // The ring has the newest tokens alone; what was before them is in full blocks.
      const int64_t gone = std::min(past, total - l.ring());
      if (gone > 0) given.rows[size_t(row)].left = (gone + width_ - 1) / width_;
    }
    needed = std::max(needed, l.blocks(total));
  }
  given.past_blocks = blocks;
  GRAPHOPT_REQUIRE(!shared_ || needed == blocks, "the shared cache has %lld blocks, and its tokens take %lld",
                   (long long)blocks, (long long)needed);

  work.rotation = {in[kCosCache].as<float>(), in[kSinCache].as<float>(), rows, half, interleaved_, at_read_};
  work.rows = given.rows.data();
  work.batch = batch;
  work.fresh = fresh;
  work.half = in[kQuery].type == ElementType::float16;
  work.query = in[kQuery].data;
  work.key = in[kKey].data;
  work.value = in[kValue].data;
  work.scale = scale_;
  work.softcap = softcap_;
  work.local = local_;
  work.output = call.output(0, in[kQuery].shape);
  work.shared = shared_;
  if (shared_) {  // which nothing is written to
    work.cache = {const_cast<uint8_t*>(in[kPastCodes].as<uint8_t>()), const_cast<uint16_t*>(in[kPastScales].as<uint16_t>()),
                  const_cast<uint16_t*>(in[kPastRecent].as<uint16_t>()), blocks};
    return;
  }
  work.cache = {call.output<uint8_t>(1, {batch, needed, kv_heads_, l.code_bytes()}),
                call.output<uint16_t>(2, {batch, needed, kv_heads_, l.scale_numbers()}),
                call.output<uint16_t>(3, in[kPastRecent].shape), needed};
  for (size_t i = 0; i < 3; ++i) {  // what has no numbers may lie nowhere
    GRAPHOPT_REQUIRE(given.present(i) != nullptr || batch * given.row_bytes(i, needed) == 0,
                     "the present is left out, and only a shared cache has none");
  }
}

Operator described(std::unique_ptr<Kernel> (*make)(const Node&), const char* provider) {
  using E = ElementType;
  const std::vector<E> t = {E::float32, E::float16};
  Parameter lengths{{E::int32}}, codes{{E::uint8}}, halves{{E::float16}};
  lengths.on_host = true;
  codes.optional = halves.optional = true;
  return {"QuantizedKVAttention",
          {{t}, {t}, {t}, {{E::uint8}}, {{E::float16}}, {{E::float16}}, lengths, {{E::float32}}, {{E::float32}}},
          {{t}, codes, halves, halves},
          make,
          infer,
          provider};
}

}  // namespace graphopt::quantized_kv_attention
