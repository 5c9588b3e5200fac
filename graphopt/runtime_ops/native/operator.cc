#include "operator.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define GRAPHOPT_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define GRAPHOPT_PAUSE() asm volatile("yield")
#else
#define GRAPHOPT_PAUSE() std::this_thread::yield()
#endif

namespace graphopt {
namespace {

std::vector<Operator>& registered() {
  static std::vector<Operator> all;
  return all;
}

// Turns a failed call of ONNX Runtime into an Error.
void check(const abi::Api& api, OrtStatus* status) {
  if (status == nullptr) return;
  Error error(api.GetErrorMessage(status));
  api.ReleaseStatus(status);
  throw error;
}

Shape dimensions(const abi::Api& api, const OrtTensorTypeAndShapeInfo* info) {
  size_t rank = 0;
  check(api, api.GetDimensionsCount(info, &rank));
  Shape shape(rank);
  check(api, api.GetDimensions(info, shape.data(), rank));
  return shape;
}

struct Info {
  const abi::Api& api;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ~Info() {
    if (info != nullptr) api.ReleaseTensorTypeAndShapeInfo(info);
  }
};

Tensor tensor(const abi::Api& api, const OrtValue* value) {
  Tensor made;
  Info info{api};
  check(api, api.GetTensorTypeAndShape(value, &info.info));
  check(api, api.GetTensorElementType(info.info, &made.type));
  made.shape = dimensions(api, info.info);
  void* data = nullptr;
  // Inputs are only read; the interface has one function for both.
  check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  made.data = data;
  return made;
}

// Work in parts. A thread takes the tasks of a part until none is left, waits for those that others took (they run, so
// the wait ends, however few threads there are), and goes on with the next part.
struct Phases {
  Phases(const std::vector<size_t>& tasks, const std::function<void(size_t, size_t)>& function)
      : tasks(tasks), function(function), parts(tasks.size()) {}

  struct alignas(64) Part {
    std::atomic<size_t> taken{0};
    alignas(64) std::atomic<size_t> done{0};
  };

  void work() {
    for (size_t part = 0; part < tasks.size(); ++part) {
      for (;;) {
        const size_t task = parts[part].taken.fetch_add(1, std::memory_order_relaxed);
        if (task >= tasks[part]) break;
        if (!failed.load(std::memory_order_relaxed)) {
          try {
            function(part, task);
          } catch (...) {
            std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
            failed.store(true, std::memory_order_relaxed);
          }
        }
        parts[part].done.fetch_add(1, std::memory_order_release);
      }
      // A thread that waits long lets others run: there may be more threads than cores.
      for (size_t round = 0; parts[part].done.load(std::memory_order_acquire) < tasks[part]; ++round) {
        if (round < 4096) {
          GRAPHOPT_PAUSE();
        } else {
          std::this_thread::yield();
        }
      }
    }
  }

  const std::vector<size_t>& tasks;
  const std::function<void(size_t, size_t)>& function;
  std::vector<Part> parts;
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::exception_ptr error;
};

size_t cores() {
  static const size_t count = std::max(1u, std::thread::hardware_concurrency());
  return count;
}

}  // namespace

std::string text(const Shape& shape) {
  std::string made = "[";
  for (size_t i = 0; i < shape.size(); ++i) made += (i ? ", " : "") + std::to_string(shape[i]);
  return made + "]";
}

int64_t Tensor::size() const {
  int64_t count = 1;
  for (int64_t dim : shape) count *= dim;
  return count;
}

std::string Node::name() const {
  size_t size = 0;
  OrtStatus* status = api_.KernelInfo_GetNodeName(info_, nullptr, &size);
  if (status != nullptr) api_.ReleaseStatus(status);  // it says that a buffer of no bytes is too small
  std::string made(size, '\0');
  if (size == 0) return made;
  check(api_, api_.KernelInfo_GetNodeName(info_, made.data(), &size));
  made.resize(size - 1);
  return made;
}

int64_t Node::integer(const char* attribute) const {
  int64_t value = 0;
  check(api_, api_.KernelInfoGetAttribute_int64(info_, attribute, &value));
  return value;
}

int64_t Node::integer(const char* attribute, int64_t otherwise) const {
  int64_t value = 0;
  OrtStatus* status = api_.KernelInfoGetAttribute_int64(info_, attribute, &value);
  if (status == nullptr) return value;
  api_.ReleaseStatus(status);
  return otherwise;
}

float Node::number(const char* attribute) const {
  float value = 0;
  check(api_, api_.KernelInfoGetAttribute_float(info_, attribute, &value));
  return value;
}

std::vector<int64_t> Node::integers(const char* attribute) const {
  size_t size = 0;
  check(api_, api_.KernelInfoGetAttributeArray_int64(info_, attribute, nullptr, &size));
  std::vector<int64_t> values(size);
  if (size > 0) check(api_, api_.KernelInfoGetAttributeArray_int64(info_, attribute, values.data(), &size));
  return values;
}

bool Node::constant(size_t index, Tensor* found) const {
  size_t count = 0;
  check(api_, api_.KernelInfo_GetInputCount(info_, &count));
  if (index >= count) return false;
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(api_, api_.KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
  if (is_constant == 0 || value == nullptr) return false;
  *found = tensor(api_, value);
  return true;
}

size_t Call::inputs() const {
  size_t count = 0;
  check(api_, api_.KernelContext_GetInputCount(context_, &count));
  return count;
}

bool Call::has(size_t index) const {
  if (index >= inputs()) return false;
  const OrtValue* value = nullptr;
  check(api_, api_.KernelContext_GetInput(context_, index, &value));
  return value != nullptr;
}

Tensor Call::input(size_t index) const {
  const OrtValue* value = nullptr;
  check(api_, api_.KernelContext_GetInput(context_, index, &value));
  GRAPHOPT_REQUIRE(value != nullptr, "input %zu is missing", index);
  return tensor(api_, value);
}

void* Call::output(size_t index, const Shape& shape) {
  OrtValue* value = nullptr;
  check(api_, api_.KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
  if (value == nullptr) return nullptr;
  void* data = nullptr;
  check(api_, api_.GetTensorMutableData(value, &data));
  return data;
}

bool Call::wants(size_t index) const {
  size_t count = 0;
  check(api_, api_.KernelContext_GetOutputCount(context_, &count));
  return index < count;
}

void* Call::cuda_stream() const {
  void* stream = nullptr;
  check(api_, api_.KernelContext_GetGPUComputeStream(context_, &stream));
  return stream;
}

void Call::run_phases(const std::vector<size_t>& tasks, const std::function<void(size_t, size_t)>& function) {
  size_t widest = 0;
  for (size_t count : tasks) widest = std::max(widest, count);
  if (widest == 0) return;
  Phases phases(tasks, function);
  const size_t workers = std::min(widest, cores());
  if (workers == 1) {
    phases.work();
  } else {
    // One call for each thread that there could be; those beyond ONNX Runtime's own find nothing left to do.
    auto work = [](void* state, size_t) { static_cast<Phases*>(state)->work(); };
    check(api_, api_.KernelContext_ParallelFor(context_, work, workers, 0, &phases));
  }
  if (phases.error) std::rethrow_exception(phases.error);
}

size_t Inference::inputs() const {
  size_t count = 0;
  check(api_, api_.ShapeInferContext_GetInputCount(context_, &count));
  return count;
}

Inference::Dims Inference::input(size_t index) const {
  // The context owns what it gives out.
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api_, api_.ShapeInferContext_GetInputTypeShape(context_, index, &info));
  const Shape shape = dimensions(api_, info);
  std::vector<const char*> names(shape.size(), nullptr);
  check(api_, api_.GetSymbolicDimensions(info, names.data(), names.size()));
  Dims dims(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) {
    dims[i].size = shape[i];
    if (shape[i] < 0 && names[i] != nullptr) dims[i].name = names[i];
  }
  return dims;
}

ElementType Inference::type(size_t index) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api_, api_.ShapeInferContext_GetInputTypeShape(context_, index, &info));
  ElementType type = ElementType::undefined;
  check(api_, api_.GetTensorElementType(info, &type));
  return type;
}

int64_t Inference::integer(const char* attribute) const {
  const OrtOpAttr* found = nullptr;
  check(api_, api_.ShapeInferContext_GetAttribute(context_, attribute, &found));
  int64_t value = 0;
  size_t size = 0;
  check(api_, api_.ReadOpAttr(found, abi::kInt, &value, sizeof value, &size));
  return value;
}

int64_t Inference::integer(const char* attribute, int64_t otherwise) const {
  const OrtOpAttr* found = nullptr;
  int64_t value = 0;
  size_t size = 0;
  OrtStatus* status = api_.ShapeInferContext_GetAttribute(context_, attribute, &found);
  if (status == nullptr) status = api_.ReadOpAttr(found, abi::kInt, &value, sizeof value, &size);
  if (status == nullptr) return value;
  api_.ReleaseStatus(status);
  return otherwise;
}

void Inference::output(size_t index, ElementType type, const Dims& dims) {
  Info info{api_};
  check(api_, api_.CreateTensorTypeAndShapeInfo(&info.info));
  check(api_, api_.SetTensorElementType(info.info, type));
  // ONNX Runtime takes a size of -1 without a name for a fixed size, so a dimension that isn't known gets a new name.
  static std::atomic<int64_t> unknown{0};
  Shape sizes;
  Dims named = dims;
  std::vector<const char*> names;
  for (Dim& dim : named) {
    if (dim.size < 0 && dim.name.empty()) dim.name = "graphopt_dim_" + std::to_string(unknown.fetch_add(1));
    sizes.push_back(dim.size);
    names.push_back(dim.name.c_str());
  }
  check(api_, api_.SetDimensions(info.info, sizes.data(), sizes.size()));
  check(api_, api_.SetSymbolicDimensions(info.info, names.data(), names.size()));
  check(api_, api_.ShapeInferContext_SetOutputTypeShape(context_, index, info.info));
}

size_t Operator::variants() const {
  size_t count = 1;
  for (const Parameter& p : inputs) count = std::max(count, p.types.size());
  for (const Parameter& p : outputs) count = std::max(count, p.types.size());
  return count;
}

Registration::Registration(Operator made) { registered().push_back(std::move(made)); }

const std::vector<Operator>& operators() { return registered(); }

}  // namespace graphopt
