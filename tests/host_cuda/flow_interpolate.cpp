// flow_interpolate of csrc/cuda on the CPU.
#include "cuda/flow_interpolate.cuh"

#include "arrays.h"

namespace flowseg::cuda {

void emulate_flow_interpolate(const Array& x, const Array& y, const Array& t, const Array& mu, int64_t ignore, const Array& out) {
  launch_interpolate({source(x), labels(y, ignore), times(t), codes(mu), target(out), 0}, OnCpu{});
}

void emulate_flow_interpolate_bwd(const Array& grad, const Array& x, const Array& y, const Array& t, const Array& mu, int64_t ignore,
                              const Array& grad_source, const Array& grad_time) {
  const int64_t blocks = blocks_an_image(x.shape[2] * x.shape[3], kInterpolated) * x.shape[0];
  const auto sums = std::make_unique<double[]>(static_cast<size_t>(blocks));
  launch_interpolate_backward({source(grad), source(x), labels(y, ignore), times(t), codes(mu), target(grad_source),
                               target(grad_time), grad_time.size() ? sums.get() : nullptr, 0},
                              OnCpu{});
}

}  // namespace flowseg::cuda
