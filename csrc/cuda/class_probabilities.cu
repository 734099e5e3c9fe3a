// class_probabilities on torch's CUDA tensors.
#include "cuda/class_probabilities.cuh"

#include "cuda/launch.h"

namespace flowseg::cuda {

namespace {

void class_probabilities(Tensor x, Tensor centroids, double temperature, double eps, int64_t transform, int64_t form, Tensor out) {
  const Image image = image_of(x, "x");
  if (x.numel() == 0) return;
  const ProbabilityParams params{
      .x = input_image(image),
      .codes = input_codes(centroids, image),
      .correction = {.temperature = temperature, .eps = eps, .max_norm = 0, .transform = static_cast<int>(transform)},
      .form = static_cast<int>(form),
      .out = output_image(output_of(out), centroids.size(0), image.height * image.width)};
  launch_probabilities(params, Launch(x));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowseg_cuda, CUDA, m) { m.impl("class_probabilities", TORCH_BOX(&class_probabilities)); }

}  // namespace flowseg::cuda
