// top_classes on torch's CUDA tensors.
#include "cuda/top_classes.cuh"

#include "cuda/launch.h"

namespace flowseg::cuda {

namespace {

void top_classes(Tensor x, Tensor centroids, double temperature, double eps, int64_t transform, Tensor labels, Tensor probabilities,
                 int64_t ignore_index) {
  const Image image = image_of(x, "x");
  if (x.numel() == 0) return;
  const Integer label_type = integer_of(labels, "out_dtype");
  const int64_t pixels = image.height * image.width;
  const TopParams params{
      .x = input_image(image),
      .codes = input_codes(centroids, image),
      .correction = {.temperature = temperature, .eps = eps, .max_norm = 0, .transform = static_cast<int>(transform)},
      .kept = static_cast<int>(labels.size(1)),
      .ignore = ignore_index,
      .labels = labels.data_ptr(),
      .label_type = label_type,
      .label_vector = starts_at_16_bytes(labels.data_ptr(), pixels, size_of(label_type)),
      .probabilities = output_image(output_of(probabilities), labels.size(1), pixels)};
  launch_top_classes(params, Launch(x));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowseg_cuda, CUDA, m) { m.impl("top_classes", TORCH_BOX(&top_classes)); }

}  // namespace flowseg::cuda
