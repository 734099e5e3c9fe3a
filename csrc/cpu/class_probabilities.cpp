// class_probabilities on the CPU.
#include "cpu/launch.h"

namespace flowseg::cpu {

void class_probabilities(Tensor x, Tensor centroids, double temperature, double eps, int64_t transform, int64_t form, Tensor out) {
  const Image image = image_of(x, "x");
  const PaddedCodes codes(centroids, image);
  const Probabilities a{
      .x = image,
      .codes = codes.codes,
      .correction = {.temperature = temperature, .eps = eps, .max_norm = 0, .transform = static_cast<int>(transform)},
      .form = static_cast<int>(form),
      .out = out.data_ptr(),
  };
  for_each_chunk(image, [&](auto kernels, int64_t chunk) { kernels.probabilities(a, chunk); }, kSmallChunkPixels);
}

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CPU, m) { m.impl("class_probabilities", TORCH_BOX(&class_probabilities)); }

}  // namespace flowseg::cpu
