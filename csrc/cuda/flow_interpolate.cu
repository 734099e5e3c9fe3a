// flow_interpolate and its backward on torch's CUDA tensors.
#include "cuda/flow_interpolate.cuh"

#include "cuda/torch_arguments.h"

namespace flowseg::cuda {

namespace {

Tensor flow_interpolate(Tensor source, Tensor labels, Tensor t, Tensor centroids, int64_t ignore_index) {
  const Image image = image_of(source, "source");
  Tensor out = empty_like_shape(source, source.scalar_type(), shape_of(image));
  if (source.numel() == 0) return out;
  const Interpolate a{source_of(image), labels_of(labels, image, ignore_index, "labels"), times_of(t, image),
                      codes_of(centroids, image), target_of(out, image), 0};
  launch_interpolate(a, Launch(source));
  return out;
}

std::tuple<Tensor, Tensor> flow_interpolate_bwd(Tensor grad, Tensor source, Tensor labels, Tensor t, Tensor centroids,
                                                int64_t ignore_index, bool need_t) {
  const Image image = image_of(source, "source");
  Tensor grad_source = empty_like_shape(source, source.scalar_type(), shape_of(image));
  Tensor grad_time = torch::stable::new_zeros(t, std::vector<int64_t>{need_t ? image.batch : 0});
  if (source.numel() == 0) return {grad_source, grad_time};
  const int64_t blocks = blocks_an_image(image.height * image.width, kInterpolated) * image.batch;
  Tensor sums = empty_like_shape(source, ScalarType::Double, {need_t ? blocks : 0});
  const InterpolateBackward a{source_of(image_of(grad, "grad")),
                              source_of(image),
                              labels_of(labels, image, ignore_index, "labels"),
                              times_of(t, image),
                              codes_of(centroids, image),
                              target_of(grad_source, image),
                              target_of(output_of(grad_time), 1, 1),
                              need_t ? static_cast<double*>(sums.data_ptr()) : nullptr,
                              0};
  launch_interpolate_backward(a, Launch(source));
  return {grad_source, grad_time};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowseg_cuda, CUDA, m) {
  m.impl("flow_interpolate", TORCH_BOX(&flow_interpolate));
  m.impl("flow_interpolate_bwd", TORCH_BOX(&flow_interpolate_bwd));
}

}  // namespace flowseg::cuda
