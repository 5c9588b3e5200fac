// CUDA launchers of KroneckerTransform and KroneckerQuantize. Pointers are of the device; x and y may be the same.
//
// left is [a, a] and right [b, b] of float. A token of a · b floats, for the quantizing ones two, must fit into a block's
// shared memory: of about 41,000 numbers (20,000) on sm_80 and 58,000 (29,000) on sm_90; else cudaErrorInvalidValue.
#pragma once

#include "launcher.h"

// tokens × (a · b) numbers.
GRAPHOPT_LAUNCHER int graphopt_cuda_kronecker_transform_float(const void* x, const float* left, const float* right, void* y,
                                                              int64_t tokens, int64_t a, int64_t b, void* stream);
GRAPHOPT_LAUNCHER int graphopt_cuda_kronecker_transform_half(const void* x, const float* left, const float* right, void* y,
                                                             int64_t tokens, int64_t a, int64_t b, void* stream);

// y as many bytes, scales one number a token.
GRAPHOPT_LAUNCHER int graphopt_cuda_kronecker_quantize_float(const void* x, const float* left, const float* right,
                                                             uint8_t* y, float* scales, int64_t tokens, int64_t a,
                                                             int64_t b, float clip, float largest, void* stream);
GRAPHOPT_LAUNCHER int graphopt_cuda_kronecker_quantize_half(const void* x, const float* left, const float* right,
                                                            uint8_t* y, float* scales, int64_t tokens, int64_t a,
                                                            int64_t b, float clip, float largest, void* stream);
