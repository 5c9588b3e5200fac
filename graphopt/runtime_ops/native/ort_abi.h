// What graphopt uses of ONNX Runtime's C interface, by its binary layout.
//
// The official header is in no Python package of ONNX Runtime. Its table of functions only ever grows at the end, so the
// few slots used here stay where they are; tests/runtime_ops/test_abi.py compiles native/abi_check.cc, which holds every
// slot against the official header. The library asks for version 17 of the table, which every ONNX Runtime from 1.17 on
// gives out.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtOpAttr;
struct OrtMemoryInfo;
struct OrtAllocator;

namespace graphopt::abi {

constexpr uint32_t kVersion = 17;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kRuntimeException = 6, kNotImplemented = 9 };

enum class ElementType : int {
  undefined = 0,
  float32 = 1,
  uint8 = 2,
  int8 = 3,
  int32 = 6,
  int64 = 7,
  boolean = 9,
  float16 = 10,
};

enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum MemoryType : int { kCpuInput = -2, kDefault = 0 };
enum AttributeType : int { kInt = 1, kFloat = 3 };

// A slot that isn't used.
using Slot = const void*;

struct Api {
  OrtStatus* (*CreateStatus)(ErrorCode, const char*);                                               // 0
  Slot unused_1;
  const char* (*GetErrorMessage)(const OrtStatus*);                                                 // 2
  Slot unused_3[23];
  OrtStatus* (*CreateCustomOpDomain)(const char*, OrtCustomOpDomain**);                             // 26
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain*, const struct CustomOp*);                     // 27
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions*, OrtCustomOpDomain*);                          // 28
  Slot unused_29[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);                                            // 51
  Slot unused_52[5];
  OrtStatus* (*CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo**);                          // 57
  OrtStatus* (*SetTensorElementType)(OrtTensorTypeAndShapeInfo*, ElementType);                      // 58
  OrtStatus* (*SetDimensions)(OrtTensorTypeAndShapeInfo*, const int64_t*, size_t);                  // 59
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo*, ElementType*);               // 60
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t*);                      // 61
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t);                  // 62
  OrtStatus* (*GetSymbolicDimensions)(const OrtTensorTypeAndShapeInfo*, const char*[], size_t);     // 63
  Slot unused_64;
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);                // 65
  Slot unused_66[19];
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo*, const char*, float*);            // 85
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo*, const char*, int64_t*);          // 86
  OrtStatus* (*KernelInfoGetAttribute_string)(const OrtKernelInfo*, const char*, char*, size_t*);   // 87
  OrtStatus* (*KernelContext_GetInputCount)(const OrtKernelContext*, size_t*);                      // 88
  OrtStatus* (*KernelContext_GetOutputCount)(const OrtKernelContext*, size_t*);                     // 89
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext*, size_t, const OrtValue**);          // 90
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**);  // 91
  Slot unused_92;
  void (*ReleaseStatus)(OrtStatus*);                                                                // 93
  Slot unused_94[5];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);                                // 99
  Slot unused_100;
  void (*ReleaseCustomOpDomain)(OrtCustomOpDomain*);                                                // 101
  Slot unused_102[28];
  OrtStatus* (*AddSessionConfigEntry)(OrtSessionOptions*, const char*, const char*);                // 130
  Slot unused_131[31];
  OrtStatus* (*KernelInfoGetAttributeArray_float)(const OrtKernelInfo*, const char*, float*, size_t*);    // 162
  OrtStatus* (*KernelInfoGetAttributeArray_int64)(const OrtKernelInfo*, const char*, int64_t*, size_t*);  // 163
  Slot unused_164[29];
  OrtStatus* (*KernelContext_GetGPUComputeStream)(const OrtKernelContext*, void**);                 // 193
  Slot unused_194[36];
  OrtStatus* (*KernelInfo_GetInputCount)(const OrtKernelInfo*, size_t*);                            // 230
  Slot unused_231[6];
  OrtStatus* (*HasSessionConfigEntry)(const OrtSessionOptions*, const char*, int*);                 // 237
  OrtStatus* (*GetSessionConfigEntry)(const OrtSessionOptions*, const char*, char*, size_t*);       // 238
  Slot unused_239[5];
  OrtStatus* (*KernelInfo_GetNodeName)(const OrtKernelInfo*, char*, size_t*);                       // 244
  Slot unused_245[4];
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo*, size_t, int*, const OrtValue**);  // 249
  Slot unused_250[17];
  OrtStatus* (*ShapeInferContext_GetInputCount)(const OrtShapeInferContext*, size_t*);              // 267
  OrtStatus* (*ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext*, size_t,
                                                    OrtTensorTypeAndShapeInfo**);                   // 268
  OrtStatus* (*ShapeInferContext_GetAttribute)(const OrtShapeInferContext*, const char*, const OrtOpAttr**);  // 269
  OrtStatus* (*ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext*, size_t,
                                                     const OrtTensorTypeAndShapeInfo*);             // 270
  OrtStatus* (*SetSymbolicDimensions)(OrtTensorTypeAndShapeInfo*, const char*[], size_t);           // 271
  OrtStatus* (*ReadOpAttr)(const OrtOpAttr*, AttributeType, void*, size_t, size_t*);                // 272
  Slot unused_273;
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t,
                                          void*);                                                   // 274
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// OrtCustomOp as of version 17.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const OrtKernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  OrtStatus* (*CreateKernelV2)(const CustomOp*, const Api*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const CustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

// The slots that are used, for whatever goes through all of them.
#define GRAPHOPT_ORT_SLOTS(X)                                                                                         \
  X(CreateStatus) X(GetErrorMessage) X(CreateCustomOpDomain) X(CustomOpDomain_Add) X(AddCustomOpDomain)               \
  X(GetTensorMutableData) X(CreateTensorTypeAndShapeInfo) X(SetTensorElementType) X(SetDimensions)                    \
  X(GetTensorElementType) X(GetDimensionsCount) X(GetDimensions) X(GetSymbolicDimensions) X(GetTensorTypeAndShape)    \
  X(KernelInfoGetAttribute_float) X(KernelInfoGetAttribute_int64) X(KernelInfoGetAttribute_string)                    \
  X(KernelContext_GetInputCount) X(KernelContext_GetOutputCount) X(KernelContext_GetInput) X(KernelContext_GetOutput) \
  X(ReleaseStatus) X(ReleaseTensorTypeAndShapeInfo) X(ReleaseCustomOpDomain) X(KernelInfoGetAttributeArray_float)     \
  X(KernelInfoGetAttributeArray_int64) X(KernelContext_GetGPUComputeStream) X(KernelInfo_GetInputCount)               \
  X(AddSessionConfigEntry) X(HasSessionConfigEntry) X(GetSessionConfigEntry) X(KernelInfo_GetNodeName)                \
  X(KernelInfoGetConstantInput_tensor)                                                                                \
  X(ShapeInferContext_GetInputCount) X(ShapeInferContext_GetInputTypeShape) X(ShapeInferContext_GetAttribute)         \
  X(ShapeInferContext_SetOutputTypeShape) X(SetSymbolicDimensions) X(ReadOpAttr) X(KernelContext_ParallelFor)

#define GRAPHOPT_ORT_CALLBACKS(X)                                                                               \
  X(version) X(CreateKernel) X(GetName) X(GetExecutionProviderType) X(GetInputType) X(GetInputTypeCount)        \
  X(GetOutputType) X(GetOutputTypeCount) X(KernelCompute) X(KernelDestroy) X(GetInputCharacteristic)            \
  X(GetOutputCharacteristic) X(GetInputMemoryType) X(GetVariadicInputMinArity) X(GetVariadicInputHomogeneity)   \
  X(GetVariadicOutputMinArity) X(GetVariadicOutputHomogeneity) X(CreateKernelV2) X(KernelComputeV2)             \
  X(InferOutputShapeFn) X(GetStartVersion) X(GetEndVersion)

}  // namespace graphopt::abi
