// flow_loss (loss and residual in one pass) and its backward on torch's CUDA tensors.
#include "cuda/flow_loss.cuh"

#include "cuda/launch.h"

namespace flowseg::cuda {

namespace {

std::tuple<Tensor, Tensor, Tensor> flow_loss(Tensor prediction, Tensor source, Tensor labels, Tensor t, Tensor centroids,
                                             int64_t predicts, int64_t loss_space, double correction_weight, int64_t schedule,
                                             double temperature, double eps, int64_t transform, double max_norm,
                                             int64_t ignore_index, int64_t reduction, double t_min, bool need_grad) {
  const Image image = image_of(prediction, "prediction");
  std::vector<int64_t> loss_shape;
  if (reduction == Reduction::none) loss_shape = {image.batch, image.height, image.width};
  Tensor residual = empty_like_shape(prediction, prediction.scalar_type(), need_grad ? shape_of(image) : std::vector<int64_t>{0});
  if (prediction.numel() == 0) {
    Tensor loss = torch::stable::new_zeros(prediction, loss_shape, compute_type(prediction));
    return {loss, residual, torch::stable::new_zeros(prediction, std::vector<int64_t>{}, ScalarType::Long)};
  }
  Tensor loss = empty_like_shape(prediction, compute_type(prediction), loss_shape);
  Tensor count = empty_like_shape(prediction, ScalarType::Long, {});
  const LossOptions options{
      .predicts_endpoint = predicts == 1,
      .endpoint_space = loss_space == 1,
      .weight = correction_weight,
      .annealed = schedule == 1,
      .correction = {.temperature = temperature, .eps = eps, .max_norm = max_norm, .transform = static_cast<int>(transform)},
      .reduction = reduction,
      .t_min = t_min};
  LossParams params = loss_params(input_image(image), input_image(image_of(source, "source")),
                                  input_labels(labels, image, ignore_index, "labels"), input_times(t, image),
                                  input_codes(centroids, image), options, output_image(loss, image),
                                  need_grad ? output_image(residual, image) : OutputImage{},
                                  static_cast<int64_t*>(count.data_ptr()));
  const Launch launch(prediction);
  plan_loss(params, launch);
  Tensor partials = empty_like_shape(prediction, ScalarType::Double, {params.loss_blocks + params.count_blocks, 2});
  params.partials = static_cast<Partial*>(partials.data_ptr());
  launch_loss(params, launch);
  return {loss, residual, count};
}

// `out` may be the residual itself.
void scale_residual(const Tensor& grad_loss, const Tensor& residual, const Tensor& count, int64_t reduction, const Tensor& out,
                    bool in_place) {
  if (residual.numel() == 0) return;
  const Image image = image_of(residual, "residual");
  const Tensor grad = torch::stable::to(grad_loss, compute_type(residual));
  ScaleParams params{.residual = input_image(image),
                     .grad = grad.data_ptr(),
                     .stride = {0, 0, 0},
                     .count = reduction == Reduction::mean ? static_cast<const int64_t*>(count.data_ptr()) : nullptr,
                     .out = output_image(out, image),
                     .in_place = in_place};
  for (int i = 0; reduction == Reduction::none && i < 3; ++i) params.stride[i] = grad.stride(i);
  launch_scale(params, Launch(residual));
}

Tensor flow_loss_bwd(Tensor grad_loss, Tensor residual, Tensor count, int64_t reduction) {
  Tensor out = empty_like_shape(residual, residual.scalar_type(), shape_of(image_of(residual, "residual")));
  scale_residual(grad_loss, residual, count, reduction, out, false);
  return out;
}

void flow_loss_bwd_(Tensor grad_loss, Tensor residual, Tensor count, int64_t reduction) {
  FLOWSEG_CHECK(reduction != Reduction::none, "reduction: wanted mean or sum; got none, whose gradient flow_loss_bwd computes");
  scale_residual(grad_loss, residual, count, reduction, residual, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowseg_cuda, CUDA, m) {
  m.impl("flow_loss", TORCH_BOX(&flow_loss));
  m.impl("flow_loss_bwd", TORCH_BOX(&flow_loss_bwd));
  m.impl("flow_loss_bwd_", TORCH_BOX(&flow_loss_bwd_));
}

}  // namespace flowseg::cuda
