// decode_confusion on torch's CUDA tensors.
#include "cuda/decode_confusion.cuh"

#include "cuda/launch.h"

namespace flowseg::cuda {

namespace {

Tensor decode_confusion(Tensor x, Tensor target, Tensor centroids, std::vector<Tensor> tables, double grid_low, double grid_scale,
                        bool by_class, int64_t ignore_index) {
  const Image image = image_of(x, "x");
  const InputCodes codes = input_codes(centroids, image);
  const std::vector<int64_t> shape{by_class ? 3 : codes.classes, codes.classes};
  Tensor counts = torch::stable::new_zeros(x, shape, ScalarType::Long);
  if (x.numel() == 0) return counts;
  const ConfusionParams params{.x = input_image(image),
                               .target = input_labels(target, image, ignore_index, "target"),
                               .codes = codes,
                               .tables = tables_of(centroids, tables, grid_low, grid_scale),
                               .counts = static_cast<unsigned long long*>(counts.data_ptr()),
                               .by_class = by_class};
  launch_confusion(params, Launch(x));
  return counts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowseg_cuda, CUDA, m) { m.impl("decode_confusion", TORCH_BOX(&decode_confusion)); }

}  // namespace flowseg::cuda
