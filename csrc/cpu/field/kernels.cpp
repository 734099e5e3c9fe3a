// The neural field, compiled once per instruction set.
#include "cpu/field/backward.h"

namespace flowseg::cpu {
namespace {

#if defined(__AVX512BF16__)
using Operands = Bf16Pairs;
#else
using Operands = Floats;
#endif

}  // namespace

template <>
int64_t FieldKernels<kIsa>::scratch(const Field& a, bool backward) {
  Arena arena(nullptr);
  if (backward) {
    Backward<Operands>(FieldBackward{.field = a, .grad = {}, .grad_x = {}, .grad_weights = {}}, arena);
  } else {
    Layers<Operands>(a, false, arena);
  }
  return arena.used();
}

template <>
void FieldKernels<kIsa>::forward(const Field& a, int64_t begin, int64_t end, float* memory) {
  Arena arena(memory);
  Layers<Operands> layers(a, false, arena);
  for (int64_t patch = begin; patch < end; ++patch) layers.forward(patch);
}

template <>
void FieldKernels<kIsa>::backward(const FieldBackward& b, int64_t begin, int64_t end, float* memory, float* sums) {
  Arena arena(memory);
  Backward<Operands> backward(b, arena);
  backward.clear();
  for (int64_t patch = begin; patch < end; ++patch) backward.patch(patch);
  backward.finish(sums);
}

}  // namespace flowseg::cpu
