// Launches of single kernels of the neural field on the host, for tests of each by itself.
#pragma once

#include <cstdint>

#include "cuda/field/launch.cuh"

namespace flowseg::host {

// The interface of Launch in cuda/launch.h that the field's kernels use.
struct FieldLaunch {
  struct Device {
    int64_t multiprocessors;
  };
  int64_t multiprocessors;

  Device device() const { return {multiprocessors}; }
  cuda::TensorMap tensor_map(const cuda::Matrices& matrices) const { return cuda::checked_tensor_map(matrices); }
  void with_threads(int64_t threads, void (*kernel)(cuda::FieldParams), int64_t blocks, int64_t shared,
                    const cuda::FieldParams& f) const {
    run(kernel, threads, blocks, static_cast<size_t>(shared), f);
  }
};

}  // namespace flowseg::host

// Plants a fault in the kernels; "" for none.
extern "C" void plant_fault(const char* name) { flowseg::host::planted = flowseg::host::fault_named(name); }
