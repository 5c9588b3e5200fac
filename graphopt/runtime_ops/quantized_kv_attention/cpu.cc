// The CPU kernel of QuantizedKVAttention.
#include <cstring>

#include "decode.h"
#include "given.h"
#include "prefill.h"
#include "turn_tables.h"

namespace graphopt::quantized_kv_attention {
namespace {

class QuantizedKVAttention final : public Kernel {
 public:
  explicit QuantizedKVAttention(const Node& node) : settings_(node) {
    if (settings_.turns_at_read()) tables_ = TurnTables::of(node, kCosCache, kSinCache, settings_.width());
  }

  void compute(Call& call) override {
    Given given;
    settings_.read(call, given);
    given.work.tables = tables_.get();
    // A row of what isn't in place; blocks that weren't there are 0.
    const auto copy = [&](size_t row) {
      for (size_t i = 0; i < 3; ++i) {
        if (given.past(i) == given.present(i)) continue;
        const size_t bytes = size_t(given.row_bytes(i, given.past_blocks));
        const size_t room = size_t(given.row_bytes(i, given.work.cache.blocks));
        uint8_t* const to = static_cast<uint8_t*>(given.present(i)) + row * room;
        if (bytes > 0) std::memcpy(to, static_cast<const uint8_t*>(given.past(i)) + row * bytes, bytes);
        if (room > bytes) std::memset(to + bytes, 0, room - bytes);
      }
    };
    const size_t copies = given.in_place() ? 0 : size_t(given.work.batch);
    (given.work.fresh == 1 ? decode : prefill)(call, given.work, copies, copy);
  }

 private:
  Settings settings_;
  std::shared_ptr<const TurnTables> tables_;
};

const Registration registration{described(make<QuantizedKVAttention>, nullptr)};

}  // namespace
}  // namespace graphopt::quantized_kv_attention
