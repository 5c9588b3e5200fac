// How a valid node is broken.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>

#include "fuzz/case.h"

namespace graphopt::fuzz {
namespace {

constexpr int64_t kLeast = std::numeric_limits<int64_t>::min(), kMost = std::numeric_limits<int64_t>::max();

// A number near another one, or one at which arithmetic breaks.
int64_t near(int64_t value, Random& random) {
  switch (random.below(8)) {
    case 0: return value == kMost ? value : value + 1;
    case 1: return value == kLeast ? value : value - 1;
    case 2: return value / 2;
    case 3: return value > kMost / 2 || value < kLeast / 2 ? value : value * 2;
    case 4: return random.between(-2, 40);
    case 5: return int64_t(1) << random.below(63);
    case 6: return (int64_t(1) << random.below(62)) * 3 / 2;
    default:
      return random.pick<int64_t>({0, -1, kLeast, kMost, kMost / 2, int64_t(1) << 32, (int64_t(1) << 31) - 1,
                                   -(int64_t(1) << 31), (int64_t(1) << 32) - 1, kMost / 4 + 1});
  }
}

float strange(Random& random) {
  using Limits = std::numeric_limits<float>;
  return random.pick<float>({0.0f, -0.0f, Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(), Limits::max(),
                             Limits::lowest(), Limits::min(), Limits::denorm_min(), -1.0f, 1e20f, 65504.0f, 3e9f});
}

void mutate_attribute(Case& made, Random& random) {
  if (made.attributes.empty()) return;
  const auto found = std::next(made.attributes.begin(), random.below(int64_t(made.attributes.size())));
  if (random.chance(5)) {
    made.attributes.erase(found);
  } else if (random.chance(5)) {
    found->second = random.chance(50) ? Attribute(random.number()) : Attribute(random.between(-1, 3));
  } else if (auto* integer = std::get_if<int64_t>(&found->second)) {
    *integer = near(*integer, random);
  } else if (auto* number = std::get_if<float>(&found->second)) {
    *number = strange(random);
  } else {
    auto& integers = std::get<std::vector<int64_t>>(found->second);
    if (integers.empty() || random.chance(25)) {
      integers.resize(size_t(random.below(6)), random.between(-1, 3));
    } else {
      int64_t& one = integers[size_t(random.below(int64_t(integers.size())))];
      one = near(one, random);
    }
  }
}

Shape broken(Shape shape, Random& random) {
  const int64_t rank = int64_t(shape.size());
  const int64_t at = rank == 0 ? 0 : random.below(rank);
  switch (rank == 0 ? 1 : random.below(9)) {
    case 0: shape.erase(shape.begin() + at); break;
    case 1: shape.insert(shape.begin() + at, random.pick<int64_t>({0, 1, 2})); break;
    case 2: shape.clear(); break;
    case 3: shape[at] = 0; break;
    case 4: std::swap(shape[at], shape[random.below(rank)]); break;
    case 5:  // no elements, but of enormous width
      shape[at] = 0;
      shape[random.below(rank)] = near(shape[at], random);
      break;
    default: shape[at] = near(shape[at], random);
  }
  return shape;
}

void mutate_shape(Value& value, Random& random) {
  Shape shape = value.shape();
  for (int64_t i = random.between(1, 2); i > 0; --i) shape = broken(shape, random);
  if (!elements(shape)) return;
  Value made(value.type(), shape);
  made.fill(random);
  std::memcpy(made.data(), value.data(), std::min(made.bytes(), value.bytes()));
  value = made;
}

void mutate_data(Value& value, Random& random) {
  const size_t count = value.bytes() / width(value.type());
  if (count == 0) return;
  const bool number = value.type() == ElementType::float32 || value.type() == ElementType::float16;
  const int64_t changes = random.chance(10) ? int64_t(count) : random.between(1, 3);
  for (int64_t i = 0; i < changes; ++i) {
    const size_t at = size_t(random.below(int64_t(count)));
    std::byte* element = value.data() + at * width(value.type());
    if (number && random.chance(80)) {
      value.set(at, strange(random));
    } else if (value.type() == ElementType::boolean) {
      *element = std::byte(random.below(2));
    } else {
      int64_t old = 0;
      std::memcpy(&old, element, width(value.type()));
      const int64_t fresh = number ? int64_t(random.bits()) : near(old, random);
      std::memcpy(element, &fresh, width(value.type()));
    }
  }
}

void mutate_input(Case& made, Random& random, bool constants) {
  if (made.inputs.empty()) return;
  const size_t at = size_t(random.below(int64_t(made.inputs.size())));
  if (!constants && made.constant[at]) return;
  if (made.op->GetInputCharacteristic(made.op, at) == abi::kOptional && random.chance(20)) {
    made.inputs[at].reset();
    made.constant[at] = false;
  } else if (made.inputs[at]) {
    (random.chance(60) ? mutate_shape : mutate_data)(*made.inputs[at], random);
  }
}

void mutate_outputs(Case& made, Random& random) {
  Output& output = made.outputs[size_t(random.below(int64_t(made.outputs.size())))];
  const size_t at = size_t(&output - made.outputs.data());
  if (made.op->GetOutputCharacteristic(made.op, at) == abi::kOptional && random.chance(50)) {
    output.wanted = false;
  } else {
    output.shares = int(random.between(-1, int64_t(made.inputs.size()) - 1));
  }
}

}  // namespace

void mutate(Case& made, Random& random) {
  for (int64_t i = random.pick<int64_t>({1, 1, 1, 2, 3}); i > 0; --i) {
    const int64_t what = random.below(100);
    if (what < 35) {
      mutate_attribute(made, random);
    } else if (what < 95) {
      mutate_input(made, random, true);
    } else {
      mutate_outputs(made, random);
    }
  }
}

void mutate_inputs(Case& made, Random& random) { mutate_input(made, random, false); }

}  // namespace graphopt::fuzz
