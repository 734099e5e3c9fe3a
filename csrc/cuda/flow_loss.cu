// flow_loss (loss and residual in one pass) and its backward on torch's CUDA tensors.
#include "cuda/flow_loss.cuh"

#include "cuda/torch_arguments.h"

namespace flowseg::cuda {

namespace {

enum Reduction : int64_t { mean = 0, sum = 1, none = 2 };

std::tuple<Tensor, Tensor, Tensor> flow_loss(Tensor prediction, Tensor source, Tensor labels, Tensor t, Tensor centroids,
                                             int64_t predicts, int64_t loss_space, double correction_weight, int64_t schedule,
                                             double temperature, double eps, int64_t transform, double max_norm,
                                             int64_t ignore_index, int64_t reduction, double t_min, bool need_grad) {
  const Image image = image_of(prediction, "prediction");
  const std::vector<int64_t> pixels{image.batch, image.height, image.width};
  Tensor residual = empty_like_shape(prediction, prediction.scalar_type(), need_grad ? shape_of(image) : std::vector<int64_t>{0});
  Tensor loss = torch::stable::new_zeros(prediction, reduction == none ? pixels : std::vector<int64_t>{}, compute_type(prediction));
  Tensor count = torch::stable::new_zeros(prediction, std::vector<int64_t>{}, ScalarType::Long);
  if (prediction.numel() == 0) return {loss, residual, count};
  Loss a{};
  a.prediction = source_of(image);
  a.source = source_of(image_of(source, "source"));
  a.labels = labels_of(labels, image, ignore_index, "labels");
  a.times = times_of(t, image);
  a.codes = codes_of(centroids, image);
  a.correction = {temperature, eps, max_norm, static_cast<int>(transform)};
  a.predicts_endpoint = predicts == 1;
  a.endpoint_space = loss_space == 1;
  a.annealed = schedule == 1;
  a.mean = reduction == mean;
  a.weight = correction_weight;
  a.t_min = t_min;
  if (need_grad) a.residual = target_of(residual, image);
  (reduction == none ? a.per_pixel : a.loss) = target_of(loss, image);
  a.count = static_cast<int64_t*>(count.data_ptr());
  Tensor partials = empty_like_shape(prediction, ScalarType::Double, {loss_blocks(a) * image.batch, 2});
  a.partials = static_cast<Partial*>(partials.data_ptr());
  launch_loss(a, Launch(prediction));
  return {loss, residual, count};
}

Tensor flow_loss_bwd(Tensor grad_loss, Tensor residual, Tensor count, int64_t reduction) {
  const Image image = image_of(residual, "residual");
  Tensor out = empty_like_shape(residual, residual.scalar_type(), shape_of(image));
  if (residual.numel() == 0) return out;
  const Tensor grad = torch::stable::to(grad_loss, compute_type(residual));
  Scale a{source_of(image), grad.data_ptr(), {0, 0, 0}, nullptr, target_of(out, image), 0};
  if (reduction == mean) a.count = static_cast<const int64_t*>(count.data_ptr());
  for (int i = 0; reduction == none && i < 3; ++i) a.stride[i] = grad.stride(i);
  launch_scale(a, Launch(residual));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowseg_cuda, CUDA, m) {
  m.impl("flow_loss", TORCH_BOX(&flow_loss));
  m.impl("flow_loss_bwd", TORCH_BOX(&flow_loss_bwd));
}

}  // namespace flowseg::cuda
