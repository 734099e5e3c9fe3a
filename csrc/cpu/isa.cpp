// Chooses the instruction set at run time: one library serves every CPU, and uses the widest vectors that the CPU has.
#include <cstdlib>
#include <cstring>
#if defined(FLOWSEG_X86)
#include <cpuid.h>
#endif

#include "cpu/launch.h"

namespace flowseg::cpu {

namespace {

#if defined(FLOWSEG_X86)
// __builtin_cpu_supports does not know f16c on every compiler. The check for avx2 already includes whether the operating system
// saves its registers.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
}
#endif

Isa detect() {
#if defined(FLOWSEG_X86)
  __builtin_cpu_init();
  Isa best = Isa::baseline;
  // Every feature that ISA_FLAGS of build_backend/flowseg_ninja.py lets the compiler use: a virtual machine may hide a single one.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && has_f16c()) {
    best = Isa::avx2;
  }
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    best = Isa::avx512;
  }
  // FLOWSEG_CPU_ISA lowers the choice, for tests and for finding bugs; it never selects more than this CPU has.
  if (const char* name = std::getenv("FLOWSEG_CPU_ISA")) {
    const Isa asked = !std::strcmp(name, "baseline") ? Isa::baseline : !std::strcmp(name, "avx2") ? Isa::avx2 : Isa::avx512;
    if (asked < best) best = asked;
  }
  return best;
#else
  return Isa::baseline;
#endif
}

}  // namespace

Isa instruction_set() {
  static const Isa chosen = detect();
  return chosen;
}

int64_t instruction_set_op() { return static_cast<int64_t>(instruction_set()); }

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set_op));
}

}  // namespace flowseg::cpu
