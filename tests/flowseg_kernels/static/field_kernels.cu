// Instantiates the large kernels of the neural field, for sm_90a: for disassembly, register counts and ptxas's warnings.
#include "cuda/field/backward.cuh"
#include "cuda/field/forward.cuh"

namespace flowseg::cuda {

#define FLOWSEG_INSTANTIATE(T, tanh)                                                                     \
  template __global__ void forward::forward_blocks<T, tanh, false>(FLOWSEG_GRID_CONSTANT FieldParams f); \
  template __global__ void forward::forward_blocks<T, tanh, true>(FLOWSEG_GRID_CONSTANT FieldParams f);  \
  template __global__ void backward::backward_blocks<T, tanh>(FLOWSEG_GRID_CONSTANT FieldParams f);
FLOWSEG_INSTANTIATE(BFloatPair, true)
FLOWSEG_INSTANTIATE(BFloatPair, false)
FLOWSEG_INSTANTIATE(HalfPair, false)

}  // namespace flowseg::cuda
