// Picks the compiled instruction set at run time, so that a library built on one machine is right and fast on another.
#include <cstdlib>
#include <cstring>
#if defined(FLOWSEG_X86)
#include <cpuid.h>
#endif

#include "torch_arguments.h"

namespace flowseg::cpu {

namespace {

#if defined(FLOWSEG_X86)
// Not every compiler knows this feature by name. Whether the system saves its registers is part of asking for avx2.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
}
#endif

int detect() {
#if defined(FLOWSEG_X86)
  __builtin_cpu_init();
  int best = 0;
  // Each feature that ISA_FLAGS of setup.py names, or that follows from one: a virtual machine may hide any of them alone.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && has_f16c()) {
    best = 1;
  }
  if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    best = 2;
  }
  // Lets tests and bug hunts run the code of an older CPU; never more than this CPU has.
  if (const char* name = std::getenv("FLOWSEG_CPU_ISA")) {
    const int asked = !std::strcmp(name, "baseline") ? 0 : !std::strcmp(name, "avx2") ? 1 : 2;
    if (asked < best) best = asked;
  }
  return best;
#else
  return 0;
#endif
}

}  // namespace

int instruction_set() {
  static const int chosen = detect();
  return chosen;
}

const Kernels& kernels() {
#if defined(FLOWSEG_X86)
  static const Kernels* const tables[] = {&baseline::kernels, &avx2::kernels, &avx512::kernels};
  return *tables[instruction_set()];
#else
  return baseline::kernels;
#endif
}

int64_t instruction_set_op() { return instruction_set(); }

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set_op));
}

}  // namespace flowseg::cpu
