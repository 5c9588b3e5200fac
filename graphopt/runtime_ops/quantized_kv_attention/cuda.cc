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
    GraphoptQuantizedKVAttention run{};
    run.query = work.query;
    run.key = work.key;
    run.value = work.value;
    run.past_codes = static_cast<const uint8_t*>(given.past(0));
    run.past_scales = given.past(1);
    run.past_recent = given.past(2);
    run.cos = work.rotation.cos;
    run.sin = work.rotation.sin;
    run.output = work.output;
    run.codes = work.cache.codes;
    run.scales = work.cache.scales;
    run.recent = work.cache.recent;
    run.totals = totals.data();
    run.batch = work.batch;
    run.fresh = work.fresh;
    run.past_blocks = given.past_blocks;
    run.blocks = work.cache.blocks;
    run.heads = l.heads;
    run.kv_heads = l.kv_heads;
    run.depth = l.depth;
    run.width = l.width;
    run.window = l.window;
    run.group = l.group;
    run.key_bits = l.key_bits;
    run.value_bits = l.value_bits;
    run.turned = work.rotation.half;
    run.local = work.local;
    run.per_channel = l.per_channel;
    run.interleaved = work.rotation.interleaved;
    run.at_read = work.rotation.at_read;
    run.half = work.half;
    run.scale = work.scale;
    run.softcap = work.softcap;
    const int64_t bytes = graphopt_cuda_quantized_kv_attention_scratch_bytes(&run);
    GRAPHOPT_REQUIRE(bytes >= 0, "query %s is more than fits a grid", text(given.in[kQuery].shape).c_str());
    const DeviceMemory scratch(size_t(bytes), call.cuda_stream());
    run.scratch = scratch.get();
    require_launched(graphopt_cuda_quantized_kv_attention(&run, call.cuda_stream()));
  }

 private:
  Settings settings_;
};

const Registration registration{described(make<QuantizedKVAttention>, "CUDAExecutionProvider")};

}  // namespace
}  // namespace graphopt::quantized_kv_attention
