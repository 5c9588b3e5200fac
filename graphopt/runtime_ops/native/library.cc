// The library's entry point, and the operators as ONNX Runtime wants to see them.
#include <cstring>
#include <deque>
#include <exception>
#include <new>
#include <string>

#include "isa.h"
#include "operator.h"

#if defined(_WIN32)
#define GRAPHOPT_EXPORT extern "C" __declspec(dllexport)
#else
#define GRAPHOPT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace graphopt {
namespace {

constexpr const char* kDomain = "ai.graphopt";
constexpr const char* kCudaEntry = "graphopt.cuda";  // the session entry that asks for the CUDA kernels
constexpr const char* kRegisteredEntry = "graphopt.registered";  // the one that says that the library is there

// What a made kernel keeps beside itself.
struct Held {
  std::unique_ptr<Kernel> kernel;
  const abi::Api* api;
  std::string where;  // the node, for errors
};

// One operator with one choice of types. Inherits nothing, so that its address is that of its callbacks.
struct Variant {
  abi::CustomOp callbacks;
  const Operator* op;
  size_t index;

  static const Variant& of(const abi::CustomOp* callbacks) { return *reinterpret_cast<const Variant*>(callbacks); }

  ElementType type(const Parameter& parameter) const {
    return parameter.types.size() == 1 ? parameter.types[0] : parameter.types[index];
  }
};

std::string where(const Operator& op, const std::string& node) {
  return std::string(op.name) + " '" + node + "': ";
}

OrtStatus* status(const abi::Api& api, const std::string& where) {
  try {
    throw;
  } catch (const Error& error) {
    return api.CreateStatus(abi::kInvalidArgument, (where + error.what()).c_str());
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(abi::kRuntimeException, (where + "out of memory").c_str());
  } catch (const std::exception& error) {
    return api.CreateStatus(abi::kRuntimeException, (where + error.what()).c_str());
  } catch (...) {
    return api.CreateStatus(abi::kRuntimeException, (where + "unknown error").c_str());
  }
}

const abi::Api* api_in_use = nullptr;  // for shape inference, whose callback isn't given it

abi::CustomOp callbacks(const Operator& op) {
  abi::CustomOp made{};
  made.version = abi::kVersion;
  made.GetName = [](const abi::CustomOp* self) { return Variant::of(self).op->name; };
  made.GetExecutionProviderType = [](const abi::CustomOp* self) { return Variant::of(self).op->provider; };
  made.GetInputTypeCount = [](const abi::CustomOp* self) { return Variant::of(self).op->inputs.size(); };
  made.GetInputType = [](const abi::CustomOp* self, size_t i) {
    return Variant::of(self).type(Variant::of(self).op->inputs[i]);
  };
  made.GetOutputTypeCount = [](const abi::CustomOp* self) { return Variant::of(self).op->outputs.size(); };
  made.GetOutputType = [](const abi::CustomOp* self, size_t i) {
    return Variant::of(self).type(Variant::of(self).op->outputs[i]);
  };
  made.GetInputCharacteristic = [](const abi::CustomOp* self, size_t i) {
    return Variant::of(self).op->inputs[i].optional ? abi::kOptional : abi::kRequired;
  };
  made.GetOutputCharacteristic = [](const abi::CustomOp* self, size_t i) {
    return Variant::of(self).op->outputs[i].optional ? abi::kOptional : abi::kRequired;
  };
  made.GetInputMemoryType = [](const abi::CustomOp* self, size_t i) {
    const Operator& op = *Variant::of(self).op;
    return op.provider != nullptr && op.inputs[i].on_host ? abi::kCpuInput : abi::kDefault;
  };
  made.GetVariadicInputMinArity = [](const abi::CustomOp*) { return 0; };
  made.GetVariadicInputHomogeneity = [](const abi::CustomOp*) { return 0; };
  made.GetVariadicOutputMinArity = [](const abi::CustomOp*) { return 0; };
  made.GetVariadicOutputHomogeneity = [](const abi::CustomOp*) { return 0; };
  made.GetStartVersion = [](const abi::CustomOp*) { return 1; };
  made.GetEndVersion = [](const abi::CustomOp*) { return 0x7fffffff; };
  made.CreateKernelV2 = [](const abi::CustomOp* self, const abi::Api* api, const OrtKernelInfo* info,
                           void** kernel) -> OrtStatus* {
    const Operator& op = *Variant::of(self).op;
    std::string place = where(op, "");
    try {
      const Node node(*api, info);
      place = where(op, node.name());
      *kernel = new Held{op.make(node), api, place};
      return nullptr;
    } catch (...) {
      return status(*api, place);
    }
  };
  made.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
    Held& held = *static_cast<Held*>(kernel);
    try {
      Call call(*held.api, context);
      held.kernel->compute(call);
      return nullptr;
    } catch (...) {
      return status(*held.api, held.where);
    }
  };
  made.KernelDestroy = [](void* kernel) { delete static_cast<Held*>(kernel); };
  if (op.infer != nullptr) {
    made.InferOutputShapeFn = [](const abi::CustomOp* self, OrtShapeInferContext* context) -> OrtStatus* {
      try {
        Inference inference(*api_in_use, context);
        Variant::of(self).op->infer(inference);
      } catch (...) {
        // A shape that can't be inferred is left open: what is wrong with the node, its kernel says better.
      }
      return nullptr;
    };
  }
  return made;
}

// Made once, kept for as long as the library is loaded: sessions point into it.
const std::deque<Variant>& variants() {
  static const std::deque<Variant> all = [] {
    std::deque<Variant> made;
    for (const Operator& op : operators()) {
      for (size_t i = 0; i < op.variants(); ++i) made.push_back({callbacks(op), &op, i});
    }
    return made;
  }();
  return all;
}

// Whether a session entry is "1".
bool is_set(const abi::Api& api, const OrtSessionOptions* options, const char* entry) {
  int has = 0;
  OrtStatus* failed = api.HasSessionConfigEntry(options, entry, &has);
  char value[8] = "";
  size_t size = sizeof value;
  if (failed == nullptr && has != 0) failed = api.GetSessionConfigEntry(options, entry, value, &size);
  if (failed != nullptr) {
    api.ReleaseStatus(failed);
    return false;
  }
  return std::strcmp(value, "1") == 0;
}

}  // namespace
}  // namespace graphopt

// Called by ONNX Runtime for each session that registers the library.
GRAPHOPT_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const graphopt::abi::ApiBase* base) {
  using namespace graphopt;
  const abi::Api* api = base->GetApi(abi::kVersion);
  if (api == nullptr) return nullptr;  // older than 1.17: the portable bodies serve
  api_in_use = api;
  // Options hold a domain once; whoever uses them for another session may register the library again.
  if (is_set(*api, options, kRegisteredEntry)) return nullptr;
  // Session options keep a bare pointer to the domain, so it outlives them all.
  static OrtCustomOpDomain* domains[2] = {nullptr, nullptr};
  const bool cuda = is_set(*api, options, kCudaEntry);
  OrtCustomOpDomain*& domain = domains[cuda];
  if (domain == nullptr) {
    if (OrtStatus* failed = api->CreateCustomOpDomain(kDomain, &domain)) return failed;
    for (const Variant& variant : variants()) {
      if (variant.op->provider != nullptr && !cuda) continue;
      if (OrtStatus* failed = api->CustomOpDomain_Add(domain, &variant.callbacks)) return failed;
    }
  }
  if (OrtStatus* failed = api->AddCustomOpDomain(options, domain)) return failed;
  return api->AddSessionConfigEntry(options, kRegisteredEntry, "1");
}

// The kernels of the library, a line each: operator, provider, the types of the inputs and of the outputs.
GRAPHOPT_EXPORT const char* graphopt_kernels() {
  using namespace graphopt;
  static const std::string lines = [] {
    std::string made;
    for (const Variant& variant : variants()) {
      made += std::string(variant.op->name) + " " + (variant.op->provider ? variant.op->provider : "CPUExecutionProvider");
      for (const Parameter& p : variant.op->inputs) made += " " + std::to_string(int(variant.type(p)));
      made += " >";
      for (const Parameter& p : variant.op->outputs) made += " " + std::to_string(int(variant.type(p)));
      made += "\n";
    }
    return made;
  }();
  return lines.c_str();
}

// For tests: see limit_isa.
GRAPHOPT_EXPORT const char* graphopt_limit_isa(const char* name) { return graphopt::limit_isa(name); }
