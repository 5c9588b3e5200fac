#include "fuzz/case.h"

#include <cmath>
#include <cstring>

#include "float16.h"

namespace graphopt::fuzz {
namespace {

constexpr size_t kMostElements = size_t(1) << 20;

std::map<std::string, void (*)(Random&, Case&)>& makers() {
  static std::map<std::string, void (*)(Random&, Case&)> all;
  return all;
}

template <typename V>
void store(std::byte* data, size_t index, V value) {
  std::memcpy(data + index * sizeof value, &value, sizeof value);
}

}  // namespace

uint64_t Random::bits() {
  // splitmix64
  state_ += 0x9e3779b97f4a7c15;
  uint64_t made = state_;
  made = (made ^ (made >> 30)) * 0xbf58476d1ce4e5b9;
  made = (made ^ (made >> 27)) * 0x94d049bb133111eb;
  return made ^ (made >> 31);
}

size_t width(ElementType type) {
  switch (type) {
    case ElementType::float32:
    case ElementType::int32: return 4;
    case ElementType::int64: return 8;
    case ElementType::float16: return 2;
    default: return 1;
  }
}

std::optional<size_t> elements(const Shape& shape) {
  int64_t count = 1;
  for (int64_t dim : shape) {
    // ONNX Runtime makes no tensor whose size overflows on the way, even if it is 0 in the end.
    if (dim < 0 || __builtin_mul_overflow(count, dim, &count)) return std::nullopt;
  }
  if (size_t(count) > kMostElements) return std::nullopt;
  return size_t(count);
}

Value::Value(ElementType type, const Shape& shape)
    : type_(type), shape_(shape), bytes_(elements(shape).value() * width(type)), data_(new std::byte[bytes_]()) {}

Value::Value(const Value& other)
    : type_(other.type_), shape_(other.shape_), bytes_(other.bytes_), data_(new std::byte[other.bytes_]) {
  std::memcpy(data_.get(), other.data_.get(), bytes_);
}

Value& Value::operator=(const Value& other) {
  Value copy(other);
  type_ = copy.type_;
  shape_.swap(copy.shape_);
  bytes_ = copy.bytes_;
  data_.swap(copy.data_);
  return *this;
}

void Value::set(size_t index, double value) {
  switch (type_) {
    case ElementType::float32: store(data(), index, float(value)); break;
    case ElementType::float16: store(data(), index, from_float<Half>(float(value))); break;
    case ElementType::int64: store(data(), index, int64_t(value)); break;
    case ElementType::int32: store(data(), index, int32_t(value)); break;
    case ElementType::int8: store(data(), index, int8_t(value)); break;
    case ElementType::boolean: store(data(), index, uint8_t(value != 0)); break;
    default: store(data(), index, uint8_t(value)); break;
  }
}

void Value::fill(Random& random) {
  const size_t count = bytes_ / width(type_);
  if (type_ == ElementType::float32 || type_ == ElementType::float16) {
    for (size_t i = 0; i < count; ++i) set(i, random.number());
  } else if (type_ == ElementType::boolean) {
    for (size_t i = 0; i < count; ++i) set(i, double(random.below(2)));
  } else {
    for (size_t i = 0; i < bytes_; ++i) data()[i] = std::byte(random.below(256));
  }
}

Case::Case(const abi::CustomOp& op, Random& random)
    : op(&op), outputs(op.GetOutputTypeCount(&op)), random_(&random) {}

Value& Case::next(const Shape& shape) {
  inputs.emplace_back(std::in_place, type(inputs.size()), shape);
  constant.push_back(false);
  return *inputs.back();
}

void Case::input(const Shape& shape) { next(shape).fill(*random_); }

void Case::input(const Shape& shape, int64_t low, int64_t high) {
  Value& made = next(shape);
  for (size_t i = 0; i < made.bytes() / width(made.type()); ++i) made.set(i, double(random_->between(low, high)));
}

void Case::values(const Shape& shape, const std::vector<double>& numbers) {
  Value& made = next(shape);
  for (size_t i = 0; i < made.bytes() / width(made.type()); ++i) made.set(i, numbers.at(i));
}

void Case::missing() {
  inputs.push_back(std::nullopt);
  constant.push_back(false);
}

std::string Case::text() const {
  std::string made = op->GetName(op);
  for (const auto& [name, value] : attributes) {
    made += " " + name + "=";
    if (const auto* integer = std::get_if<int64_t>(&value)) made += std::to_string(*integer);
    if (const auto* number = std::get_if<float>(&value)) made += std::to_string(*number);
    if (const auto* integers = std::get_if<std::vector<int64_t>>(&value)) made += graphopt::text(*integers);
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    made += i ? ", " : " (";
    if (inputs[i]) made += std::to_string(int(inputs[i]->type())) + ":" + graphopt::text(inputs[i]->shape());
    if (constant[i]) made += " constant";
  }
  made += ") ->";
  for (const Output& output : outputs) {
    made += !output.wanted ? " -" : output.shares < 0 ? " own" : " in" + std::to_string(output.shares);
  }
  return made;
}

Maker::Maker(const char* name, void (*make)(Random&, Case&)) { makers()[name] = make; }

void (*maker(const std::string& name))(Random&, Case&) {
  const auto found = makers().find(name);
  return found == makers().end() ? nullptr : found->second;
}

}  // namespace graphopt::fuzz
