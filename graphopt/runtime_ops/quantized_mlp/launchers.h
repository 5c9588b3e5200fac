// The launcher of QuantizedMlp's CUDA kernels.
#pragma once

#include "launcher.h"

// Bytes of working memory that the launcher needs; negative: there are no such products.
GRAPHOPT_LAUNCHER int64_t graphopt_cuda_quantized_mlp_scratch_bytes(int64_t tokens, int64_t width, int64_t hidden,
                                                                    int block_size, int activation_bits);

// y [tokens, width] from x [tokens, width], with weights gate_up [2 · hidden, width] and down [width, hidden]; all
// pointers are of the device. x and y are half-precision numbers where `half` isn't 0, scales and minimums where
// `half_scales` isn't. norm, zero points and minimums may be nullptr. The weights' rows lie as in QuantizedLinear's
// kernels.h, at a multiple of 4 bytes; the scratch memory at one of 256. y may be x. `activation`: 0 SiLU, 1 GELU, 2 GELU
// by tanh, 3 ReLU.
GRAPHOPT_LAUNCHER int graphopt_cuda_quantized_mlp(
    const void* x, const float* norm, const void* gate_up, const void* gate_up_scales, const void* gate_up_zero_points,
    const void* gate_up_minimums, const void* down, const void* down_scales, const void* down_zero_points,
    const void* down_minimums, void* y, void* scratch, int64_t tokens, int64_t width, int64_t hidden, int bits,
    int block_size, int activation_bits, int activation, int half, int half_scales, float epsilon, void* stream);
