// distance_correction on torch's CUDA tensors.
#include "cuda/distance_correction.cuh"

#include "cuda/torch_arguments.h"

namespace flowseg::cuda {

namespace {

Tensor distance_correction(Tensor xhat, Tensor labels, Tensor centroids, double temperature, double eps, int64_t transform,
                           double max_norm, int64_t ignore_index) {
  const Image image = image_of(xhat, "xhat");
  Tensor out = empty_like_shape(xhat, xhat.scalar_type(), shape_of(image));
  if (xhat.numel() == 0) return out;
  const Correct a{source_of(image),
                  labels_of(labels, image, ignore_index, "labels"),
                  codes_of(centroids, image),
                  {temperature, eps, max_norm, static_cast<int>(transform)},
                  target_of(out, image),
                  0};
  launch_correct(a, Launch(xhat));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowseg_cuda, CUDA, m) { m.impl("distance_correction", TORCH_BOX(&distance_correction)); }

}  // namespace flowseg::cuda
