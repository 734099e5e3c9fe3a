// nearest_centroid on torch's CUDA tensors.
#include "cuda/nearest_centroid.cuh"

#include "cuda/torch_arguments.h"

namespace flowseg::cuda {

namespace {

void nearest_centroid(Tensor x, Tensor centroids, std::optional<Tensor> cells, std::optional<Tensor> records,
                      std::optional<Tensor> groups, double grid_low, double grid_scale, Tensor labels, Tensor distance,
                      Tensor margin, int64_t ignore_index) {
  const Image image = image_of(x, "x");
  if (x.numel() == 0) return;
  Decode a{};
  a.x = source_of(image);
  a.codes = codes_of(centroids, image);
  a.grid = grid_for_vectors(centroids, cells, records, groups, grid_low, grid_scale);
  a.ignore = ignore_index;
  a.labels = labels.data_ptr();
  a.label_type = integer_of(labels, "out_dtype");
  a.label_vector = starts_at_16_bytes(a.labels, image.height * image.width, size_of(a.label_type));
  if (distance.numel()) a.distance = target_of(distance, image);
  if (margin.numel()) a.margin = target_of(margin, image);
  launch_decode(a, Launch(x));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowseg_cuda, CUDA, m) { m.impl("nearest_centroid", TORCH_BOX(&nearest_centroid)); }

}  // namespace flowseg::cuda
