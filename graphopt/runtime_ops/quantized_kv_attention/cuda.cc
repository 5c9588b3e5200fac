// The CUDA kernel of QuantizedKVAttention.
#include "device_memory.h"
#include "given.h"
#include "launchers.h"

namespace graphopt::quantized_kv_attention {
namespace {

class QuantizedKVAttention final : public Kernel {
 public:
  explicit QuantizedKVAttention(const Node& node) : settings_(node) {}

  void compute(Call& call) override {
    Given given;
    settings_.read(call, given);
    const Work& work = given.work;
    const Layout& l = work.layout;
    std::vector<int32_t> totals;
    for (const Row& row : given.rows) totals.push_back(int32_t(row.total));
    const int64_t bytes = graphopt_cuda_quantized_kv_attention_scratch_bytes(
        totals.data(), work.batch, work.fresh, l.heads, l.kv_heads, l.depth, l.width, l.window);
    GRAPHOPT_REQUIRE(bytes >= 0, "query %s is more than fits a grid", text(given.in[kQuery].shape).c_str());
    void* stream = call.cuda_stream();
    const DeviceMemory scratch(size_t(bytes), stream);
    const Rotation& r = work.rotation;
    require_launched(graphopt_cuda_quantized_kv_attention(
        work.query, work.key, work.value, static_cast<const uint8_t*>(given.past(0)), given.past(1), given.past(2),
        totals.data(), r.cos, r.sin, work.output, work.cache.codes, work.cache.scales, work.cache.recent, scratch.get(),
        work.batch, work.fresh, given.past_blocks, work.cache.blocks, l.heads, l.kv_heads, l.depth, l.width, l.window,
        l.group, l.key_bits, l.value_bits, r.half, work.local, l.per_channel, r.interleaved, r.at_read, work.half,
        work.shared, work.scale, work.softcap, stream));
  }

 private:
  Settings settings_;
};

const Registration registration{described(make<QuantizedKVAttention>, "CUDAExecutionProvider")};

}  // namespace
}  // namespace graphopt::quantized_kv_attention
