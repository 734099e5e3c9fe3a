// nearest_centroid on the CPU.
#include "cpu/launch.h"

namespace flowseg::cpu {

void nearest_centroid(Tensor x, Tensor centroids, std::vector<Tensor> tables, double grid_low, double grid_scale, Tensor labels,
                      Tensor distance, Tensor margin, int64_t ignore_index) {
  const Image image = image_of(x, "x");
  const PaddedCodes codes(centroids, image);
  const Decode a{
      .x = image,
      .codes = codes.codes,
      .tables = tables_of(centroids, tables, grid_low, grid_scale),
      .ignore = ignore_index,
      .labels = labels.data_ptr(),
      .label_type = integer_of(labels, "out_dtype"),
      .distance = distance.numel() ? distance.data_ptr() : nullptr,
      .margin = margin.numel() ? margin.data_ptr() : nullptr,
  };
  for_each_chunk(image, [&](auto kernels, int64_t chunk) { kernels.decode(a, chunk); });
}

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CPU, m) { m.impl("nearest_centroid", TORCH_BOX(&nearest_centroid)); }

}  // namespace flowseg::cpu
