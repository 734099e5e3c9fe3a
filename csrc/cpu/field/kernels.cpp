// The neural field, compiled once for each instruction set; with AVX512-BF16 only for products of bf16 pairs.
#include "backward.h"

#if defined(__AVX512BF16__)
#define FLOWSEG_FIELD_ISA avx512bf16
#else
#define FLOWSEG_FIELD_ISA FLOWSEG_ISA
#endif

namespace flowseg::cpu {
namespace {

#if defined(__AVX512BF16__)
using Operands = Pair;
#else
using Operands = Single;
#endif

int64_t scratch(const Field& a, bool backward) {
  Arena arena(nullptr);
  if (backward) {
    Backward<Operands>(FieldBackward{a, {}, {}, {}}, arena);
  } else {
    Chain<Operands>(a, false, arena);
  }
  return arena.used();
}

void forward(const Field& a, int64_t begin, int64_t end, float* memory) {
  Arena arena(memory);
  Chain<Operands> chain(a, false, arena);
  for (int64_t patch = begin; patch < end; ++patch) chain.forward(patch);
}

void backward(const FieldBackward& b, int64_t begin, int64_t end, float* memory, float* sums) {
  Arena arena(memory);
  Backward<Operands> backward(b, arena);
  backward.clear();
  for (int64_t patch = begin; patch < end; ++patch) backward.patch(patch);
  backward.finish(sums);
}

}  // namespace

namespace FLOWSEG_FIELD_ISA {
extern const FieldKernels field_kernels;
const FieldKernels field_kernels{scratch, forward, backward};
}  // namespace FLOWSEG_FIELD_ISA

}  // namespace flowseg::cpu
