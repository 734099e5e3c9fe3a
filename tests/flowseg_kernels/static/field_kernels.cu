// Instantiates the neural field's kernels for Hopper, without torch: for disassembly and register counts.
#include "cuda/field/launch.cuh"

namespace flowseg::cuda {

// The interface of Launch in cuda/launch.h.
struct Instantiate {
  template <class... Parameters, class... Arguments>
  void with_threads(int64_t threads, void (*kernel)(Parameters...), int64_t blocks, int64_t shared,
                    const Arguments&... arguments) const {
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared)>>>(arguments...);
  }
  Device device() const { return {}; }
  TensorMap tensor_map(const Matrices&) const { return {}; }
};

void instantiate(const FieldParams& f, Real type, void* scratch) {
  launch_field(f, type, scratch, Instantiate{});
  launch_field_backward(f, type, scratch, Instantiate{});
}

// A kernel whose name has the dynamic shared memory of the big kernels, in bytes: of the forward, of the backward's first pass, and
// of the backward, for one half of 64 hidden units each, then for two.
template <int... kBytes>
__global__ void shared_bytes() {}
template __global__ void shared_bytes<forward::kSharedBytes<false, 1>, forward::kSharedBytes<true, 1>, sizeof(backward::Shared) + 1024,
                                      forward::kSharedBytes<false, 2>, forward::kSharedBytes<true, 2>,
                                      sizeof(backward::WideShared) + 1024>();

}  // namespace flowseg::cuda
