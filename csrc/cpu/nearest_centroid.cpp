// nearest_centroid on the CPU.
#include "torch_arguments.h"

namespace flowseg::cpu {

void nearest_centroid(Tensor x, Tensor centroids, std::optional<Tensor> cells, std::optional<Tensor> records,
                      std::optional<Tensor> groups, double grid_low, double grid_scale, Tensor labels, Tensor distance,
                      Tensor margin, int64_t ignore_index) {
  const Image image = image_of(x, "x");
  const CodeArgument codes(centroids, image);
  const Grid grid = grid_of(centroids, cells, records, groups, grid_low, grid_scale);
  const Decode a{image,
                 codes.codes,
                 grid,
                 ignore_index,
                 labels.data_ptr(),
                 integer_of(labels, "out_dtype"),
                 distance.numel() ? distance.data_ptr() : nullptr,
                 margin.numel() ? margin.data_ptr() : nullptr};
  for_each_chunk(image, [&](int64_t chunk) { kernels().decode(a, chunk); });
}

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CPU, m) { m.impl("nearest_centroid", TORCH_BOX(&nearest_centroid)); }

}  // namespace flowseg::cpu
