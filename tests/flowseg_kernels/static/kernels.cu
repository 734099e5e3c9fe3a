// Every kernel of csrc/cuda, without torch: for disassembly and register counts.
#include "cuda/decode_confusion.cuh"
#include "cuda/distance_correction.cuh"
#include "cuda/flow_interpolate.cuh"
#include "cuda/flow_loss.cuh"
#include "cuda/nearest_centroid.cuh"

namespace flowseg::cuda {

struct Instantiate {
  template <class Kernel>
  int64_t in_turns(Kernel, int64_t tiles) const {
    return tiles;
  }
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int64_t shared, const Arguments&... arguments) const {
    kernel<<<static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(shared)>>>(arguments...);
  }
  template <class... All>
  void of_threads(int64_t, const All&... all) const {
    (*this)(all...);
  }
  Device device() const { return {}; }
};

void instantiate(const Correct& correct, const Interpolate& interpolate, const InterpolateBackward& backward, const Loss& loss,
                 const Scale& scale, const Decode& decode, const Confusion& confusion) {
  const Instantiate launch;
  launch_correct(correct, launch);
  launch_interpolate(interpolate, launch);
  launch_interpolate_backward(backward, launch);
  launch_loss(loss, launch);
  launch_scale(scale, launch);
  launch_decode(decode, launch);
  launch_confusion(confusion, launch);
}

}  // namespace flowseg::cuda
