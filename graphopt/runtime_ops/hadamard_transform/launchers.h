// CUDA launchers of HadamardTransform and HadamardQuantize. Pointers are of the device; x and y may be the same.
//
// A group has halves · m numbers, halves a power of two; factor is [m, m] of float. A group, or for the quantizing ones a
// token, must fit into a block's shared memory beside 4 · m² bytes for a factor of up to 64 rows: of about 40,000 numbers
// on sm_80 and 56,000 on sm_90; else cudaErrorInvalidValue.
#pragma once

#include "launcher.h"

// groups × (halves · m) numbers.
GRAPHOPT_LAUNCHER int graphopt_cuda_hadamard_transform_float(const void* x, const float* factor, void* y, int64_t groups,
                                                             int64_t halves, int64_t m, float scale, void* stream);
GRAPHOPT_LAUNCHER int graphopt_cuda_hadamard_transform_half(const void* x, const float* factor, void* y, int64_t groups,
                                                            int64_t halves, int64_t m, float scale, void* stream);

// tokens × groups × (halves · m) numbers; y as many bytes, scales one number a token.
GRAPHOPT_LAUNCHER int graphopt_cuda_hadamard_quantize_float(const void* x, const float* factor, uint8_t* y, float* scales,
                                                            int64_t tokens, int64_t groups, int64_t halves, int64_t m,
                                                            float scale, float clip, float largest, void* stream);
GRAPHOPT_LAUNCHER int graphopt_cuda_hadamard_quantize_half(const void* x, const float* factor, uint8_t* y, float* scales,
                                                           int64_t tokens, int64_t groups, int64_t halves, int64_t m,
                                                           float scale, float clip, float largest, void* stream);
