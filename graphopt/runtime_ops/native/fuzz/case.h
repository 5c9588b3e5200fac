// What a fuzzed node is: its attributes, inputs and outputs, made at random from a seed.
//
// An operator's fuzz.cc says what a valid node looks like; the fuzzer makes broken ones of it:
//
//   const Maker maker{"Double", [](Random& random, Case& made) {
//     made.attribute("factor", random.between(1, 4));
//     made.input({random.below(3), 8});
//   }};
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "operator.h"

namespace graphopt::fuzz {

// Numbers that a seed determines, the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits();
  // 0 to n - 1.
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  // Both ends included.
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool chance(int percent) { return below(100) < percent; }
  // -2 to 2.
  float number() { return float(below(1 << 16)) / float(1 << 14) - 2.0f; }
  template <typename V>
  V pick(std::initializer_list<V> values) {
    return values.begin()[below(int64_t(values.size()))];
  }

 private:
  uint64_t state_;
};

size_t width(ElementType type);
// How many elements; nullopt: a negative dimension, or more than a tensor may have here.
std::optional<size_t> elements(const Shape& shape);

// A tensor in memory of exactly its size, so that AddressSanitizer sees the first byte too far.
class Value {
 public:
  Value(ElementType type, const Shape& shape);
  Value(const Value& other);
  Value& operator=(const Value& other);
  // What is moved stays where it lies: a kernel may have kept a constant's address.
  Value(Value&& other) = default;
  Value& operator=(Value&& other) = default;

  ElementType type() const { return type_; }
  const Shape& shape() const { return shape_; }
  size_t bytes() const { return bytes_; }
  std::byte* data() const { return data_.get(); }
  // One element, as its type holds it.
  void set(size_t index, double value);
  // Numbers from -2 to 2 where they are floating-point, all bits at random elsewhere.
  void fill(Random& random);

 private:
  ElementType type_;
  Shape shape_;
  size_t bytes_;
  std::unique_ptr<std::byte[]> data_;
};

using Attribute = std::variant<int64_t, float, std::vector<int64_t>>;

struct Output {
  bool wanted = true;
  int shares = -1;  // the input whose memory it has, where their shapes are the same; -1: its own
};

class Case {
 public:
  Case(const abi::CustomOp& op, Random& random);

  // The element type of an input, in the variant of the operator that is tried.
  ElementType type(size_t input) const { return op->GetInputType(op, input); }
  void attribute(const char* name, Attribute value) { attributes[name] = std::move(value); }
  // The next input, with numbers at random.
  void input(const Shape& shape);
  // The next input, with whole numbers from `low` to `high`.
  void input(const Shape& shape, int64_t low, int64_t high);
  // The next input, with these numbers.
  void values(const Shape& shape, const std::vector<double>& numbers);
  // The next input is left out.
  void missing();
  // An output lies in the memory of an input.
  void share(size_t output, size_t input) { outputs[output].shares = int(input); }

  std::string text() const;

  const abi::CustomOp* op;
  std::map<std::string, Attribute> attributes;
  std::vector<std::optional<Value>> inputs;
  std::vector<bool> constant;  // of each input
  std::vector<Output> outputs;
  bool threads = false;  // whether tasks run on two threads

 private:
  Value& next(const Shape& shape);

  Random* random_;
};

// Breaks one thing of a case, or more.
void mutate(Case& made, Random& random);
// Breaks an input that is no constant.
void mutate_inputs(Case& made, Random& random);

// What makes a valid node of an operator; put one at namespace scope of its fuzz.cc.
struct Maker {
  Maker(const char* name, void (*make)(Random&, Case&));
};
// nullptr: the operator has none.
void (*maker(const std::string& name))(Random&, Case&);

}  // namespace graphopt::fuzz
