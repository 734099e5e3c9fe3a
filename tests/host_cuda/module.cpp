// The ops of csrc/cuda on the CPU as a Python module, for pytest. Arrays are NumPy's; None stands for an absent one.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda_on_cpu.h"
#include "ops.h"

namespace py = pybind11;

template <>
struct py::detail::type_caster<flowseg::cuda::Array> {
  PYBIND11_TYPE_CASTER(flowseg::cuda::Array, const_name("numpy.ndarray | None"));

  bool load(handle from, bool) {
    if (from.is_none()) {
      value = {nullptr, 'f', 4, {}, {}};
      return true;
    }
    if (!isinstance<array>(from)) return false;
    const auto a = reinterpret_borrow<array>(from);
    value = {const_cast<void*>(a.data()), a.dtype().kind(), a.itemsize(), {}, {}};
    for (ssize_t i = 0; i < a.ndim(); ++i) {
      value.shape.push_back(a.shape(i));
      value.stride.push_back(a.strides(i) / a.itemsize());
    }
    return true;
  }
};

PYBIND11_MODULE(flowseg_emulated, m) {
  using namespace flowseg::cuda;
  const py::call_guard<py::gil_scoped_release> release;
  m.def("run_last_blocks", [](int64_t count) { flowseg::emu::last_blocks = count; });
  m.def("flow_interpolate", &emulate_flow_interpolate, release);
  m.def("flow_interpolate_bwd", &emulate_flow_interpolate_bwd, release);
  m.def("distance_correction", &emulate_distance_correction, release);
  m.def("flow_loss", &emulate_flow_loss, release);
  m.def("flow_loss_bwd", &emulate_flow_loss_bwd, release);
  m.def("nearest_centroid", &emulate_nearest_centroid, release);
  m.def("decode_confusion", &emulate_decode_confusion, release);
}
