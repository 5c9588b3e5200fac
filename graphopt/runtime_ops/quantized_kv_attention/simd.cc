#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // which GCC 12 finds in its own header of instructions
#endif
#include "code_dots.h"
#include "float_keys.h"
#include "floats.h"
#include "kernels.h"

namespace graphopt::quantized_kv_attention::GRAPHOPT_ISA {

const Kernels variant = {widen,  narrow,   transpose,     unpack,   integers, dot,        read_keys,    read_values,
                         rotate, turn_row, turned_scores, multiply, dot_rows, largest_of, exponentials, cap,
                         scale};

}  // namespace graphopt::quantized_kv_attention::GRAPHOPT_ISA
