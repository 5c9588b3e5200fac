// The launcher of QuantizedLinear's CUDA kernels.
#pragma once

#include "launcher.h"

// Bytes of working memory that the launcher needs; negative: there is no such product.
GRAPHOPT_LAUNCHER int64_t graphopt_cuda_quantized_linear_scratch_bytes(int64_t tokens, int64_t length, int block_size,
                                                                       int activation_bits);

// y [tokens, rows] from x [tokens, length]; all pointers are of the device. x, residual and y are half-precision
// numbers where `half` isn't 0, scales and minimums where `half_scales` isn't. norm, zero_points, minimums, bias and
// residual may be nullptr. The weight's rows lie as in kernels.h, at a multiple of 4 bytes; the scratch memory at one of
// 256. y may be the residual.
GRAPHOPT_LAUNCHER int graphopt_cuda_quantized_linear(const void* x, const float* norm, const void* weight,
                                                     const void* scales, const void* zero_points, const void* minimums,
                                                     const float* bias, const void* residual, void* y, void* scratch,
                                                     int64_t tokens, int64_t rows, int64_t length, int bits,
                                                     int block_size, int activation_bits, int half, int half_scales,
                                                     float epsilon, void* stream);
