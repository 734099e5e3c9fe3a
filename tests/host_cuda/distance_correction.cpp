// distance_correction of csrc/cuda on the CPU.
#include "cuda/distance_correction.cuh"

#include "arrays.h"

namespace flowseg::cuda {

void emulate_distance_correction(const Array& x, const Array& y, const Array& mu, double temperature, double eps, int transform,
                             double max_norm, int64_t ignore, const Array& out) {
  launch_correct({source(x), labels(y, ignore), codes(mu), {temperature, eps, max_norm, transform}, target(out), 0},
                 OnCpu{});
}

}  // namespace flowseg::cuda
