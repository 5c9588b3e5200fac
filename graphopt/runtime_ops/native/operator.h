// What an operator is made of: a class with a kernel's state, and a `Registration` of it.
//
//   class Double final : public Kernel {
//    public:
//     explicit Double(const Node& node) : factor_(node.integer("factor")) {}
//     void compute(Call& call) override { ... call.input(0) ... call.output(0, shape) ... }
//   };
//   const Registration registration{{"Double", {{{T::float32}}}, {{{T::float32}}}, make<Double>, nullptr}};
//
// Whatever is thrown comes out of ONNX Runtime as an error that names the node.
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ort_abi.h"

namespace graphopt {

using abi::ElementType;
using Shape = std::vector<int64_t>;

// Something is wrong with the model or with what it was given; the message is one sentence without the node's name.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
[[noreturn]] void fail(const char* format, Parts... parts) {
  char text[512];
  std::snprintf(text, sizeof text, format, parts...);
  throw Error(text);
}
[[noreturn]] inline void fail(const char* text) { throw Error(text); }

#define GRAPHOPT_REQUIRE(condition, ...) \
  do {                                   \
    if (!(condition)) ::graphopt::fail(__VA_ARGS__); \
  } while (false)

std::string text(const Shape& shape);

struct Tensor {
  const void* data = nullptr;
  ElementType type = ElementType::undefined;
  Shape shape;

  template <typename V>
  const V* as() const {
    return static_cast<const V*>(data);
  }
  int64_t size() const;
  // The size of a dimension; negative: from the end.
  int64_t dim(int index) const { return shape[index < 0 ? shape.size() + index : index]; }
};

// A node of the model, while its kernel is made.
class Node {
 public:
  Node(const abi::Api& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  std::string name() const;
  int64_t integer(const char* attribute) const;
  // `otherwise` where the node hasn't the attribute: models are older than it.
  int64_t integer(const char* attribute, int64_t otherwise) const;
  float number(const char* attribute) const;
  std::vector<int64_t> integers(const char* attribute) const;
  // Whether input `index` is a constant of the model; then `tensor` is it.
  bool constant(size_t index, Tensor* tensor) const;

 private:
  const abi::Api& api_;
  const OrtKernelInfo* info_;
};

// One run of a node.
class Call {
 public:
  Call(const abi::Api& api, OrtKernelContext* context) : api_(api), context_(context) {}

  size_t inputs() const;
  // Whether an optional input is given.
  bool has(size_t index) const;
  Tensor input(size_t index) const;
  // The memory of an output. Where the caller bound a buffer, it is that one, which may be an input's too.
  void* output(size_t index, const Shape& shape);
  template <typename V>
  V* output(size_t index, const Shape& shape) {
    return static_cast<V*>(output(index, shape));
  }
  // Whether somebody reads an optional output.
  bool wants(size_t index) const;

  // Runs function(i) for all i < tasks on ONNX Runtime's threads.
  template <typename F>
  void parallel(size_t tasks, F&& function) {
    auto phase = [&](size_t, size_t task) { function(task); };
    run_phases({tasks}, phase);
  }
  // Several parts one behind the other in one dispatch: function(part, i) for all i < tasks[part], a part when the one
  // before it is through. Threads stay awake between the parts.
  template <typename F>
  void phases(const std::vector<size_t>& tasks, F&& function) {
    run_phases(tasks, function);
  }
  void* cuda_stream() const;

 private:
  void run_phases(const std::vector<size_t>& tasks, const std::function<void(size_t, size_t)>& function);

  const abi::Api& api_;
  OrtKernelContext* context_;
};

class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(Call& call) = 0;
};

// Dimensions while shapes are inferred; a negative number: unknown.
class Inference {
 public:
  Inference(const abi::Api& api, OrtShapeInferContext* context) : api_(api), context_(context) {}

  // A dimension by its size or its name; neither: unknown.
  struct Dim {
    int64_t size = -1;
    std::string name;
  };
  using Dims = std::vector<Dim>;

  size_t inputs() const;
  Dims input(size_t index) const;
  ElementType type(size_t index) const;
  int64_t integer(const char* attribute) const;
  int64_t integer(const char* attribute, int64_t otherwise) const;  // as of Node
  void output(size_t index, ElementType type, const Dims& dims);

 private:
  const abi::Api& api_;
  OrtShapeInferContext* context_;
};

// The types of one input or output, one for each variant of the operator.
struct Parameter {
  std::vector<ElementType> types;
  bool optional = false;
  bool on_host = false;  // of a CUDA kernel's input: kept in the host's memory
};

struct Operator {
  const char* name;
  std::vector<Parameter> inputs;
  std::vector<Parameter> outputs;
  std::unique_ptr<Kernel> (*make)(const Node&);
  void (*infer)(Inference&);             // nullptr: shapes aren't inferred
  const char* provider = nullptr;        // nullptr: the CPU
  size_t variants() const;
};

template <typename K>
std::unique_ptr<Kernel> make(const Node& node) {
  return std::make_unique<K>(node);
}

// Put one at namespace scope of an operator's .cc file, and the operator is in the library.
struct Registration {
  explicit Registration(Operator made);
};
const std::vector<Operator>& operators();

}  // namespace graphopt
