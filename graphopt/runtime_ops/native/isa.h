// Which instructions this machine has, and the variants of an operator's inner loops for each.
//
// An operator's `simd.cc` is compiled once for each set of instructions, with GRAPHOPT_ISA naming it:
//
//   // kernels.h
//   struct Kernels { float (*sum)(const float*, int64_t); };
//   GRAPHOPT_ISA_VARIANTS(Kernels)                                   // declares kernels(), the best for this machine
//   // simd.cc
//   namespace GRAPHOPT_ISA { const Kernels variant = {sum}; }
//
// A simd.cc uses no inline function of another header than simd.h, and nothing of the standard library: the linker keeps
// one copy of such a function, and that copy might have instructions which this machine lacks.
#pragma once

namespace graphopt {

// Ordered: each has what those before it have. On ARM `generic` is NEON and `fast` adds the dot product of bytes.
enum class Isa {
  generic,
#if defined(__x86_64__) || defined(_M_X64)
  avx2,    // AVX2, FMA, F16C
  avx512,  // AVX-512 F, BW, DQ, VL, VNNI
#elif defined(__aarch64__)
  dotprod,
#endif
};

// The best of this machine. The environment variable GRAPHOPT_ISA (generic, avx2) lowers it.
Isa isa();
// Lowers it from now on, for tests; anything else than a lower set's name brings the best back. Returns what is in force.
const char* limit_isa(const char* name);

#if defined(__x86_64__) || defined(_M_X64)
#define GRAPHOPT_ISA_VARIANTS(Type)                                    \
  namespace generic { extern const Type variant; }                     \
  namespace avx2 { extern const Type variant; }                        \
  namespace avx512 { extern const Type variant; }                      \
  inline const Type& kernels() {                                       \
    switch (isa()) {                                                   \
      case Isa::avx512: return avx512::variant;                        \
      case Isa::avx2: return avx2::variant;                            \
      default: return generic::variant;                                \
    }                                                                  \
  }
#elif defined(__aarch64__)
#define GRAPHOPT_ISA_VARIANTS(Type)                                    \
  namespace generic { extern const Type variant; }                     \
  namespace dotprod { extern const Type variant; }                     \
  inline const Type& kernels() {                                       \
    return isa() == Isa::dotprod ? dotprod::variant : generic::variant; \
  }
#else
#define GRAPHOPT_ISA_VARIANTS(Type)                                    \
  namespace generic { extern const Type variant; }                     \
  inline const Type& kernels() { return generic::variant; }
#endif

}  // namespace graphopt
