// nearest_centroid on torch's CUDA tensors.
#include "cuda/nearest_centroid.cuh"

#include "cuda/launch.h"

namespace flowseg::cuda {

namespace {

void nearest_centroid(Tensor x, Tensor centroids, std::vector<Tensor> tables, double grid_low, double grid_scale, Tensor labels,
                      Tensor distance, Tensor margin, int64_t ignore_index) {
  const Image image = image_of(x, "x");
  if (x.numel() == 0) return;
  const Integer label_type = integer_of(labels, "out_dtype");
  const DecodeParams params{
      .x = input_image(image),
      .codes = input_codes(centroids, image),
      .tables = tables_of(centroids, tables, grid_low, grid_scale),
      .ignore = ignore_index,
      .labels = labels.data_ptr(),
      .label_type = label_type,
      .label_vector = starts_at_16_bytes(labels.data_ptr(), image.height * image.width, size_of(label_type)),
      .distance = distance.numel() ? output_image(distance, image) : OutputImage{},
      .margin = margin.numel() ? output_image(margin, image) : OutputImage{}};
  launch_decode(params, Launch(x));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowseg_cuda, CUDA, m) { m.impl("nearest_centroid", TORCH_BOX(&nearest_centroid)); }

}  // namespace flowseg::cuda
