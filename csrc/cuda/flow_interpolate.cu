// flow_interpolate and its backward on torch's CUDA tensors.
#include "cuda/flow_interpolate.cuh"

#include "cuda/launch.h"

namespace flowseg::cuda {

namespace {

Tensor flow_interpolate(Tensor source, Tensor labels, Tensor t, Tensor centroids, int64_t ignore_index) {
  const Image image = image_of(source, "source");
  Tensor out = empty_like_shape(source, source.scalar_type(), shape_of(image));
  if (source.numel() == 0) return out;
  const InterpolateParams params{.source = input_image(image),
                                 .labels = input_labels(labels, image, ignore_index, "labels"),
                                 .times = input_times(t, image),
                                 .codes = input_codes(centroids, image),
                                 .out = output_image(out, image)};
  launch_interpolate(params, Launch(source));
  return out;
}

std::tuple<Tensor, Tensor> flow_interpolate_bwd(Tensor grad, Tensor source, Tensor labels, Tensor t, Tensor centroids,
                                                int64_t ignore_index, bool need_t) {
  const Image image = image_of(source, "source");
  Tensor grad_source = empty_like_shape(source, source.scalar_type(), shape_of(image));
  Tensor grad_time = torch::stable::new_zeros(t, std::vector<int64_t>{need_t ? image.batch : 0});
  if (source.numel() == 0) return {grad_source, grad_time};
  Tensor sums = empty_like_shape(source, ScalarType::Double, {need_t ? grad_time_sums(image) : 0});
  const InterpolateBackwardParams params{.grad = input_image(image_of(grad, "grad")),
                                         .source = input_image(image),
                                         .labels = input_labels(labels, image, ignore_index, "labels"),
                                         .times = input_times(t, image),
                                         .codes = input_codes(centroids, image),
                                         .grad_source = output_image(grad_source, image),
                                         .grad_time = output_image(output_of(grad_time), 1, 1),
                                         .sums = need_t ? static_cast<double*>(sums.data_ptr()) : nullptr};
  launch_interpolate_backward(params, Launch(source));
  return {grad_source, grad_time};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowseg_cuda, CUDA, m) {
  m.impl("flow_interpolate", TORCH_BOX(&flow_interpolate));
  m.impl("flow_interpolate_bwd", TORCH_BOX(&flow_interpolate_bwd));
}

}  // namespace flowseg::cuda
