// Plain functions that launch CUDA kernels, `GRAPHOPT_LAUNCHER int graphopt_cuda_...(pointers, sizes, void* stream)`: they
// return a cudaError_t, need no ONNX Runtime, and can be called through ctypes.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define GRAPHOPT_LAUNCHER extern "C" __declspec(dllexport)
#else
#define GRAPHOPT_LAUNCHER extern "C" __attribute__((visibility("default")))
#endif

// What CUDA says of an error.
GRAPHOPT_LAUNCHER const char* graphopt_cuda_error(int code);
