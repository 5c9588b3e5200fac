// Holds ort_abi.h against an official header of ONNX Runtime: compiles where every slot is where it should be.
// Not part of the library; tests/runtime_ops/test_abi.py compiles it.
#include "onnxruntime_c_api.h"
#include "ort_abi.h"

#define SLOT(name)                                                                                  \
  static_assert(offsetof(graphopt::abi::Api, name) == offsetof(OrtApi, name), "slot of " #name);
GRAPHOPT_ORT_SLOTS(SLOT)

#define CALLBACK(name)                                                                              \
  static_assert(offsetof(graphopt::abi::CustomOp, name) == offsetof(OrtCustomOp, name), "callback " #name);
GRAPHOPT_ORT_CALLBACKS(CALLBACK)

// The number of arguments and the size of what comes back; the two headers name the types differently.
template <typename>
struct Arguments;
template <typename R, typename... A>
struct Arguments<R (*)(A...)> {
  static constexpr size_t count = sizeof...(A);
  static constexpr size_t result = sizeof(R);
};
template <typename... A>
struct Arguments<void (*)(A...)> {
  static constexpr size_t count = sizeof...(A);
  static constexpr size_t result = 0;
};
template <typename R, typename... A>
struct Arguments<R (*)(A...) noexcept> : Arguments<R (*)(A...)> {};
template <typename... A>
struct Arguments<void (*)(A...) noexcept> : Arguments<void (*)(A...)> {};

#define SIGNATURE(name)                                                                             \
  static_assert(Arguments<decltype(graphopt::abi::Api::name)>::count == Arguments<decltype(OrtApi::name)>::count && \
                    Arguments<decltype(graphopt::abi::Api::name)>::result == Arguments<decltype(OrtApi::name)>::result, \
                "signature of " #name);
GRAPHOPT_ORT_SLOTS(SIGNATURE)

using graphopt::abi::ElementType;
static_assert(int(ElementType::float32) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
static_assert(int(ElementType::uint8) == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
static_assert(int(ElementType::int8) == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
static_assert(int(ElementType::int32) == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
static_assert(int(ElementType::int64) == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
static_assert(int(ElementType::boolean) == ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL);
static_assert(int(ElementType::float16) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
#define SAME(ours, theirs) static_assert(int(graphopt::abi::ours) == int(theirs), #ours);
SAME(kFail, ORT_FAIL)
SAME(kInvalidArgument, ORT_INVALID_ARGUMENT)
SAME(kRuntimeException, ORT_RUNTIME_EXCEPTION)
SAME(kNotImplemented, ORT_NOT_IMPLEMENTED)
SAME(kOptional, INPUT_OUTPUT_OPTIONAL)
SAME(kRequired, INPUT_OUTPUT_REQUIRED)
SAME(kCpuInput, OrtMemTypeCPUInput)
SAME(kDefault, OrtMemTypeDefault)
SAME(kInt, ORT_OP_ATTR_INT)
SAME(kFloat, ORT_OP_ATTR_FLOAT)
static_assert(offsetof(graphopt::abi::ApiBase, GetApi) == offsetof(OrtApiBase, GetApi));
static_assert(offsetof(graphopt::abi::ApiBase, GetVersionString) == offsetof(OrtApiBase, GetVersionString));
