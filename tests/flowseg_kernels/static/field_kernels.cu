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

}  // namespace flowseg::cuda
