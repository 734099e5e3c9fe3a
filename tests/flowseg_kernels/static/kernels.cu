// Instantiates every kernel of csrc/cuda, without torch: for disassembly and register counts.
#include "cuda/class_probabilities.cuh"
#include "cuda/decode_confusion.cuh"
#include "cuda/distance_correction.cuh"
#include "cuda/flow_interpolate.cuh"
#include "cuda/flow_loss.cuh"
#include "cuda/nearest_centroid.cuh"
#include "cuda/top_classes.cuh"

namespace flowseg::cuda {

// The interface of Launch in cuda/launch.h.
struct Instantiate {
  template <class Kernel>
  int64_t resident_blocks(Kernel, int64_t tiles) const {
    return tiles;
  }
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int64_t shared, const Arguments&... arguments) const {
    kernel<<<static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(shared)>>>(arguments...);
  }
  template <class... All>
  void with_threads(int64_t, const All&... all) const {
    (*this)(all...);
  }
  Device device() const { return {}; }
};

void instantiate(const CorrectionParams& correction, const InterpolateParams& interpolate, const InterpolateBackwardParams& backward,
                 const LossParams& loss, const ScaleParams& scale, const DecodeParams& decode, const ConfusionParams& confusion,
                 const ProbabilityParams& probabilities, const TopParams& top) {
  const Instantiate launch;
  launch_correction(correction, launch);
  launch_interpolate(interpolate, launch);
  launch_interpolate_backward(backward, launch);
  launch_loss(loss, launch);
  launch_scale(scale, launch);
  launch_decode(decode, launch);
  launch_confusion(confusion, launch);
  launch_probabilities(probabilities, launch);
  launch_top_classes(top, launch);
}

}  // namespace flowseg::cuda
