// flow_loss (loss and residual in one pass) and its backward on torch's CUDA tensors.
#include "cuda/flow_loss.cuh"

#include "cuda/torch_arguments.h"

namespace flowseg::cuda {

namespace {

std::tuple<Tensor, Tensor, Tensor> flow_loss(Tensor prediction, Tensor source, Tensor labels, Tensor t, Tensor centroids,
                                             int64_t predicts, int64_t loss_space, double correction_weight, int64_t schedule,
                                             double temperature, double eps, int64_t transform, double max_norm,
                                             int64_t ignore_index, int64_t reduction, double t_min, bool need_grad) {
  const Image image = image_of(prediction, "prediction");
  const std::vector<int64_t> pixels{image.batch, image.height, image.width};
  Tensor residual = empty_like_shape(prediction, prediction.scalar_type(), need_grad ? shape_of(image) : std::vector<int64_t>{0});
  const std::vector<int64_t> of_loss = reduction == Reduction::none ? pixels : std::vector<int64_t>{};
  if (prediction.numel() == 0) {
    Tensor loss = torch::stable::new_zeros(prediction, of_loss, compute_type(prediction));
    return {loss, residual, torch::stable::new_zeros(prediction, std::vector<int64_t>{}, ScalarType::Long)};
  }
  Tensor loss = empty_like_shape(prediction, compute_type(prediction), of_loss);
  Tensor count = empty_like_shape(prediction, ScalarType::Long, {});
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
  a.mean = reduction == Reduction::mean;
  // So that the residual is the gradient already where the incoming one is 1; in fp16 a large batch's would vanish.
  a.divided = need_grad && reduction == Reduction::mean && image.type != Real::f16;
  a.weight = correction_weight;
  a.t_min = t_min;
  if (need_grad) a.residual = target_of(residual, image);
  (reduction == Reduction::none ? a.per_pixel : a.loss) = target_of(loss, image);
  a.count = static_cast<int64_t*>(count.data_ptr());
  const Launch launch(prediction);
  plan_loss(a, launch);
  Tensor partials = empty_like_shape(prediction, ScalarType::Double, {a.parts + a.counts, 2});
  a.partials = static_cast<Partial*>(partials.data_ptr());
  launch_loss(a, launch);
  return {loss, residual, count};
}

// `out` may be the residual itself.
void scale_residual(const Tensor& grad_loss, const Tensor& residual, const Tensor& count, int64_t reduction, const Tensor& out,
                    bool in_place) {
  if (residual.numel() == 0) return;
  const Image image = image_of(residual, "residual");
  const Tensor grad = torch::stable::to(grad_loss, compute_type(residual));
  Scale a{source_of(image), grad.data_ptr(), {0, 0, 0}, nullptr, target_of(out, image), in_place, 0};
  if (reduction == Reduction::mean) a.count = static_cast<const int64_t*>(count.data_ptr());
  for (int i = 0; reduction == Reduction::none && i < 3; ++i) a.stride[i] = grad.stride(i);
  launch_scale(a, Launch(residual));
}

Tensor flow_loss_bwd(Tensor grad_loss, Tensor residual, Tensor count, int64_t reduction) {
  Tensor out = empty_like_shape(residual, residual.scalar_type(), shape_of(image_of(residual, "residual")));
  scale_residual(grad_loss, residual, count, reduction, out, false);
  return out;
}

void flow_loss_bwd_(Tensor grad_loss, Tensor residual, Tensor count, int64_t reduction) {
  FLOWSEG_CHECK(reduction != Reduction::none, "reduction: a gradient for each pixel has no pass in place");
  scale_residual(grad_loss, residual, count, reduction, residual, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flowseg_cuda, CUDA, m) {
  m.impl("flow_loss", TORCH_BOX(&flow_loss));
  m.impl("flow_loss_bwd", TORCH_BOX(&flow_loss_bwd));
  m.impl("flow_loss_bwd_", TORCH_BOX(&flow_loss_bwd_));
}

}  // namespace flowseg::cuda
