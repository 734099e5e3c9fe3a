// top_classes on the CPU.
#include "cpu/launch.h"

namespace flowseg::cpu {

void top_classes(Tensor x, Tensor centroids, double temperature, double eps, int64_t transform, Tensor labels, Tensor probabilities,
                 int64_t ignore_index) {
  const Image image = image_of(x, "x");
  const PaddedCodes codes(centroids, image);
  const TopClasses a{
      .x = image,
      .codes = codes.codes,
      .correction = {.temperature = temperature, .eps = eps, .max_norm = 0, .transform = static_cast<int>(transform)},
      .kept = labels.size(1),
      .ignore = ignore_index,
      .labels = labels.data_ptr(),
      .label_type = integer_of(labels, "out_dtype"),
      .probabilities = probabilities.data_ptr(),
  };
  for_each_chunk(image, [&](auto kernels, int64_t chunk) { kernels.top_classes(a, chunk); }, kSmallChunkPixels);
}

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CPU, m) { m.impl("top_classes", TORCH_BOX(&top_classes)); }

}  // namespace flowseg::cpu
