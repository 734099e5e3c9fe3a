// distance_correction on the CPU.
#include "cpu/launch.h"

namespace flowseg::cpu {

Tensor distance_correction(Tensor xhat, Tensor labels, Tensor centroids, double temperature, double eps, int64_t transform,
                           double max_norm, int64_t ignore_index) {
  const Image image = image_of(xhat, "xhat");
  const PaddedCodes codes(centroids, image);
  const CheckedLabels y(labels, image, codes.codes.classes, ignore_index, "labels");
  Tensor out = empty_like_shape(xhat, xhat.scalar_type(), {image.batch, image.channels, image.height, image.width});
  const Correct a{
      .x = image,
      .labels = y.labels,
      .codes = codes.codes,
      .correction = {.temperature = temperature, .eps = eps, .max_norm = max_norm, .transform = static_cast<int>(transform)},
      .out = output_of(out),
  };
  for_each_chunk(image, [&](auto kernels, int64_t chunk) { kernels.correct(a, chunk); });
  y.check();
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CPU, m) { m.impl("distance_correction", TORCH_BOX(&distance_correction)); }

}  // namespace flowseg::cpu
