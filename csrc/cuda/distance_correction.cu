// distance_correction on torch's CUDA tensors.
#include "cuda/distance_correction.cuh"

#include "cuda/launch.h"

namespace flowseg::cuda {

namespace {

Tensor distance_correction(Tensor xhat, Tensor labels, Tensor centroids, double temperature, double eps, int64_t transform,
                           double max_norm, int64_t ignore_index) {
  const Image image = image_of(xhat, "xhat");
  Tensor out = empty_like_shape(xhat, xhat.scalar_type(), shape_of(image));
  if (xhat.numel() == 0) return out;
  const CorrectionParams params{
      .x = input_image(image),
      .labels = input_labels(labels, image, ignore_index, "labels"),
      .codes = input_codes(centroids, image),
      .correction = {.temperature = temperature, .eps = eps, .max_norm = max_norm, .transform = static_cast<int>(transform)},
      .out = output_image(out, image)};
  launch_correction(params, Launch(xhat));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowseg_cuda, CUDA, m) { m.impl("distance_correction", TORCH_BOX(&distance_correction)); }

}  // namespace flowseg::cuda
