#include "fuzz/fake_runtime.h"

#include <algorithm>
#include <cstring>
#include <thread>

using graphopt::Shape;
using graphopt::abi::ElementType;
using graphopt::fuzz::Attribute;
using graphopt::fuzz::Case;
using graphopt::fuzz::Random;

// What ONNX Runtime keeps to itself.
struct OrtStatus {
  std::string message;
};
struct OrtValue {
  ElementType type;
  Shape shape;
  std::byte* data;
};
struct OrtTensorTypeAndShapeInfo {
  ElementType type = ElementType::undefined;
  Shape shape;
  std::vector<std::string> names;
};
struct OrtSessionOptions {};
struct OrtCustomOpDomain {
  std::vector<const graphopt::abi::CustomOp*> operators;
};
struct OrtOpAttr {
  const Attribute* value;
};
struct OrtKernelInfo {
  Case* made;
  std::vector<OrtValue> values;  // of the inputs
  bool open;
  Random* random;
};
struct OrtKernelContext {
  Case* made;
  uint8_t blank;
  std::vector<OrtValue> values;
  struct Output {
    OrtValue value{};
    std::unique_ptr<std::byte[]> own;
    size_t bytes = 0;
    bool asked = false;
  };
  std::vector<Output> outputs;
};
struct OrtShapeInferContext {
  const Case* made;
  std::vector<OrtTensorTypeAndShapeInfo> inputs;
};

namespace graphopt::fuzz {
namespace {

constexpr const char* kNode = "fuzzed";
constexpr size_t kMostOutputBytes = size_t(64) << 20;

OrtStatus* failed(const std::string& message) { return new OrtStatus{message}; }

std::vector<OrtValue> values(const Case& made) {
  std::vector<OrtValue> found;
  for (const auto& input : made.inputs) {
    found.push_back(input ? OrtValue{input->type(), input->shape(), input->data()}
                          : OrtValue{ElementType::undefined, {}, nullptr});
  }
  return found;
}

// An attribute of a node, made up where that is asked for.
template <typename V>
const V* attribute(const OrtKernelInfo* info, const char* name, V (*invented)(Random&)) {
  auto found = info->made->attributes.find(name);
  if (found == info->made->attributes.end()) {
    if (!info->open) return nullptr;
    found = info->made->attributes.emplace(name, invented(*info->random)).first;
  }
  return std::get_if<V>(&found->second);
}

int64_t some_integer(Random& random) {
  return random.chance(50) ? int64_t(1) << random.below(8) : random.between(-1, 9);
}

template <typename V>
OrtStatus* copied(const std::vector<V>* from, V* to, size_t* size) {
  if (from == nullptr) return failed("no such attribute");
  const size_t room = *size;
  *size = from->size();
  if (to == nullptr) return nullptr;
  if (room < from->size()) return failed("not enough room");
  std::copy(from->begin(), from->end(), to);
  return nullptr;
}

OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank, OrtValue** value) {
  *value = nullptr;
  if (index >= context->outputs.size()) return failed("no such output");
  if (!context->made->outputs[index].wanted) return nullptr;
  OrtKernelContext::Output& made = context->outputs[index];
  const Shape shape(dims, dims + rank);
  const ElementType type = context->made->op->GetOutputType(context->made->op, index);
  const auto count = elements(shape);
  if (!count || *count * width(type) > kMostOutputBytes) return failed("an output of shape " + graphopt::text(shape));
  if (made.asked && made.value.shape != shape) return failed("an output changes its shape");
  if (!made.asked) {
    const int shares = context->made->outputs[index].shares;
    if (shares >= 0 && context->values[size_t(shares)].data != nullptr) {
      const OrtValue& input = context->values[size_t(shares)];
      if (input.type != type || input.shape != shape) return failed("the buffer bound to an output has another shape");
      made.value = input;
    } else {
      made.own.reset(new std::byte[*count * width(type)]);
      std::memset(made.own.get(), context->blank, *count * width(type));
      made.value = {type, shape, made.own.get()};
    }
    made.asked = true;
    made.bytes = *count * width(type);
  }
  *value = &made.value;
  return nullptr;
}

OrtStatus* parallel(const OrtKernelContext* context, void (*work)(void*, size_t), size_t total, size_t, void* state) {
  auto run = [&](size_t start, size_t step) {
    for (size_t i = start; i < total; i += step) work(state, i);
  };
  if (context->made->threads) {
    std::thread other(run, 1, 2);
    run(0, 2);
    other.join();
  } else {
    run(0, 1);
  }
  return nullptr;
}

abi::Api table() {
  abi::Api api{};
  api.CreateStatus = [](abi::ErrorCode, const char* message) { return failed(message); };
  api.GetErrorMessage = [](const OrtStatus* status) { return status->message.c_str(); };
  api.ReleaseStatus = [](OrtStatus* status) { delete status; };
  api.CreateCustomOpDomain = [](const char*, OrtCustomOpDomain** domain) -> OrtStatus* {
    static OrtCustomOpDomain only;  // the library keeps it for good
    *domain = &only;
    return nullptr;
  };
  api.CustomOpDomain_Add = [](OrtCustomOpDomain* domain, const abi::CustomOp* op) -> OrtStatus* {
    domain->operators.push_back(op);
    return nullptr;
  };
  api.AddCustomOpDomain = [](OrtSessionOptions*, OrtCustomOpDomain*) -> OrtStatus* { return nullptr; };
  api.HasSessionConfigEntry = [](const OrtSessionOptions*, const char*, int* has) -> OrtStatus* {
    *has = 0;
    return nullptr;
  };
  api.AddSessionConfigEntry = [](OrtSessionOptions*, const char*, const char*) -> OrtStatus* { return nullptr; };

  api.GetTensorMutableData = [](OrtValue* value, void** data) -> OrtStatus* {
    *data = value->data;
    return nullptr;
  };
  api.GetTensorTypeAndShape = [](const OrtValue* value, OrtTensorTypeAndShapeInfo** info) -> OrtStatus* {
    *info = new OrtTensorTypeAndShapeInfo{value->type, value->shape, {}};
    return nullptr;
  };
  api.CreateTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo** info) -> OrtStatus* {
    *info = new OrtTensorTypeAndShapeInfo;
    return nullptr;
  };
  api.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo* info) { delete info; };
  api.SetTensorElementType = [](OrtTensorTypeAndShapeInfo* info, ElementType type) -> OrtStatus* {
    info->type = type;
    return nullptr;
  };
  api.GetTensorElementType = [](const OrtTensorTypeAndShapeInfo* info, ElementType* type) -> OrtStatus* {
    *type = info->type;
    return nullptr;
  };
  api.SetDimensions = [](OrtTensorTypeAndShapeInfo* info, const int64_t* dims, size_t rank) -> OrtStatus* {
    info->shape.assign(dims, dims + rank);
    return nullptr;
  };
  api.GetDimensionsCount = [](const OrtTensorTypeAndShapeInfo* info, size_t* rank) -> OrtStatus* {
    *rank = info->shape.size();
    return nullptr;
  };
  api.GetDimensions = [](const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t rank) -> OrtStatus* {
    std::copy_n(info->shape.begin(), std::min(rank, info->shape.size()), dims);
    return nullptr;
  };
  api.SetSymbolicDimensions = [](OrtTensorTypeAndShapeInfo* info, const char* names[], size_t rank) -> OrtStatus* {
    info->names.assign(names, names + rank);
    return nullptr;
  };
  api.GetSymbolicDimensions = [](const OrtTensorTypeAndShapeInfo* info, const char* names[],
                                 size_t rank) -> OrtStatus* {
    for (size_t i = 0; i < std::min(rank, info->names.size()); ++i) names[i] = info->names[i].c_str();
    return nullptr;
  };

  api.KernelInfo_GetNodeName = [](const OrtKernelInfo*, char* name, size_t* size) -> OrtStatus* {
    const size_t room = *size, needed = std::strlen(kNode) + 1;
    *size = needed;
    if (name == nullptr) return nullptr;
    if (room < needed) return failed("not enough room for a name");
    std::memcpy(name, kNode, needed);
    return nullptr;
  };
  api.KernelInfo_GetInputCount = [](const OrtKernelInfo* info, size_t* count) -> OrtStatus* {
    *count = info->values.size();
    return nullptr;
  };
  api.KernelInfoGetConstantInput_tensor = [](const OrtKernelInfo* info, size_t index, int* constant,
                                             const OrtValue** value) -> OrtStatus* {
    if (index >= info->values.size()) return failed("no such input");
    *constant = info->made->constant[index] && info->made->inputs[index];
    *value = *constant ? &info->values[index] : nullptr;
    return nullptr;
  };
  api.KernelInfoGetAttribute_int64 = [](const OrtKernelInfo* info, const char* name, int64_t* value) -> OrtStatus* {
    const auto* found = attribute<int64_t>(info, name, some_integer);
    if (found == nullptr) return failed(std::string("no integer ") + name);
    *value = *found;
    return nullptr;
  };
  api.KernelInfoGetAttribute_float = [](const OrtKernelInfo* info, const char* name, float* value) -> OrtStatus* {
    const auto* found = attribute<float>(info, name, [](Random& random) { return random.number(); });
    if (found == nullptr) return failed(std::string("no number ") + name);
    *value = *found;
    return nullptr;
  };
  api.KernelInfoGetAttributeArray_int64 = [](const OrtKernelInfo* info, const char* name, int64_t* to,
                                             size_t* size) -> OrtStatus* {
    auto invented = [](Random& random) { return std::vector<int64_t>(size_t(random.below(4)), some_integer(random)); };
    return copied(attribute<std::vector<int64_t>>(info, name, invented), to, size);
  };

  api.KernelContext_GetInputCount = [](const OrtKernelContext* context, size_t* count) -> OrtStatus* {
    *count = context->values.size();
    return nullptr;
  };
  api.KernelContext_GetOutputCount = [](const OrtKernelContext* context, size_t* count) -> OrtStatus* {
    *count = context->outputs.size();
    return nullptr;
  };
  api.KernelContext_GetInput = [](const OrtKernelContext* context, size_t index,
                                  const OrtValue** value) -> OrtStatus* {
    const bool given = index < context->values.size() && context->made->inputs[index];
    *value = given ? &context->values[index] : nullptr;
    return nullptr;
  };
  api.KernelContext_GetOutput = output;
  api.KernelContext_ParallelFor = parallel;

  api.ShapeInferContext_GetInputCount = [](const OrtShapeInferContext* context, size_t* count) -> OrtStatus* {
    *count = context->inputs.size();
    return nullptr;
  };
  api.ShapeInferContext_GetInputTypeShape = [](const OrtShapeInferContext* context, size_t index,
                                               OrtTensorTypeAndShapeInfo** info) -> OrtStatus* {
    if (index >= context->inputs.size()) return failed("no such input");
    *info = const_cast<OrtTensorTypeAndShapeInfo*>(&context->inputs[index]);  // the context's, as in ONNX Runtime
    return nullptr;
  };
  api.ShapeInferContext_GetAttribute = [](const OrtShapeInferContext* context, const char* name,
                                          const OrtOpAttr** found) -> OrtStatus* {
    const auto place = context->made->attributes.find(name);
    if (place == context->made->attributes.end()) return failed("no such attribute");
    // ONNX Runtime's attribute is itself what is asked for; this one points to it.
    *found = reinterpret_cast<const OrtOpAttr*>(&place->second);
    return nullptr;
  };
  api.ReadOpAttr = [](const OrtOpAttr* attribute, abi::AttributeType type, void* to, size_t room,
                      size_t* size) -> OrtStatus* {
    const auto& value = *reinterpret_cast<const Attribute*>(attribute);
    const auto* integer = std::get_if<int64_t>(&value);
    const auto* number = std::get_if<float>(&value);
    const void* from = type == abi::kInt ? static_cast<const void*>(integer) : static_cast<const void*>(number);
    *size = type == abi::kInt ? sizeof *integer : sizeof *number;
    if (from == nullptr) return failed("an attribute of another kind");
    if (room < *size) return failed("not enough room");
    std::memcpy(to, from, *size);
    return nullptr;
  };
  api.ShapeInferContext_SetOutputTypeShape = [](const OrtShapeInferContext* context, size_t index,
                                                const OrtTensorTypeAndShapeInfo*) -> OrtStatus* {
    return index < context->made->outputs.size() ? nullptr : failed("no such output");
  };
  return api;
}

const abi::Api& api() {
  static const abi::Api only = table();
  return only;
}

Outcome outcome(OrtStatus* status) {
  if (status == nullptr) return {};
  Outcome made{false, status->message};
  delete status;
  return made;
}

}  // namespace

}  // namespace graphopt::fuzz

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const graphopt::abi::ApiBase* base);

namespace graphopt::fuzz {

const std::vector<const abi::CustomOp*>& registered_operators() {
  static const std::vector<const abi::CustomOp*>& all = []() -> const std::vector<const abi::CustomOp*>& {
    OrtSessionOptions options;
    const abi::ApiBase base{[](uint32_t) { return &api(); }, [] { return "fuzz"; }};
    outcome(RegisterCustomOps(&options, &base));
    OrtCustomOpDomain* domain = nullptr;
    api().CreateCustomOpDomain("", &domain);
    return domain->operators;
  }();
  return all;
}

Outcome infer(const Case& made, Random& random) {
  if (made.op->InferOutputShapeFn == nullptr) return {};
  OrtShapeInferContext context{&made, {}};
  for (const auto& input : made.inputs) {
    OrtTensorTypeAndShapeInfo info;
    if (input) {
      info.type = input->type();
      info.shape = input->shape();
    }
    info.names.resize(info.shape.size());
    for (size_t i = 0; i < info.shape.size(); ++i) {
      if (!random.chance(30)) continue;
      info.shape[i] = -1;
      if (random.chance(50)) info.names[i] = "n";
    }
    context.inputs.push_back(std::move(info));
  }
  return outcome(made.op->InferOutputShapeFn(made.op, &context));
}

FakeKernel::FakeKernel(Case& made, bool open, Random& random) : op_(*made.op) {
  OrtKernelInfo info{&made, values(made), open, &random};
  outcome_ = outcome(op_.CreateKernelV2(&op_, &api(), &info, &kernel_));
}

FakeKernel::~FakeKernel() {
  if (kernel_ != nullptr) op_.KernelDestroy(kernel_);
}

Outcome FakeKernel::run(Case& made, uint8_t blank) {
  OrtKernelContext context{&made, blank, values(made), std::vector<OrtKernelContext::Output>(made.outputs.size())};
  const Outcome ended = outcome(op_.KernelComputeV2(kernel_, &context));
  outputs_.clear();
  for (const OrtKernelContext::Output& output : context.outputs) {
    outputs_.emplace_back(output.value.data, output.value.data + output.bytes);
  }
  return ended;
}

}  // namespace graphopt::fuzz
