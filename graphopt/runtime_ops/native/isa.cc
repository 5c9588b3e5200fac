#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace graphopt {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::generic;
#elif defined(__aarch64__) && defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 ? Isa::dotprod : Isa::generic;
#elif defined(__aarch64__) && defined(__APPLE__)
  return Isa::dotprod;
#else
  return Isa::generic;
#endif
}

Isa limited(const char* asked) {
  const Isa here = best();
  Isa limit = here;
  if (asked != nullptr && std::strcmp(asked, "generic") == 0) limit = Isa::generic;
#if defined(__x86_64__)
  if (asked != nullptr && std::strcmp(asked, "avx2") == 0) limit = Isa::avx2;
#endif
  return limit < here ? limit : here;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> here{limited(std::getenv("GRAPHOPT_ISA"))};
  return here;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

const char* limit_isa(const char* name) {
  current().store(limited(name));
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
#elif defined(__aarch64__)
    case Isa::dotprod: return "dotprod";
#endif
    default: return "generic";
  }
}

}  // namespace graphopt
