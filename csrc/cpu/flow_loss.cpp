// flow_loss (loss and residual in one pass) and its backward on the CPU.
#include <numeric>

#include "cpu/launch.h"

namespace flowseg::cpu {

namespace {

void store_scalar(Tensor& t, double value) {
  if (t.scalar_type() == ScalarType::Double) {
    *static_cast<double*>(t.data_ptr()) = value;
  } else {
    *static_cast<float*>(t.data_ptr()) = static_cast<float>(value);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> flow_loss(Tensor prediction, Tensor source, Tensor labels, Tensor t, Tensor centroids,
                                             int64_t predicts, int64_t loss_space, double correction_weight, int64_t schedule,
                                             double temperature, double eps, int64_t transform, double max_norm,
                                             int64_t ignore_index, int64_t reduction, double t_min, bool need_grad) {
  const Image image = image_of(prediction, "prediction");
  const PaddedCodes codes(centroids, image);
  const CheckedLabels y(labels, image, codes.codes.classes, ignore_index, "labels");
  const std::vector<double> times = times_of(t, image.batch);
  const bool is_mean = reduction == Reduction::mean, is_per_pixel = reduction == Reduction::none;
  const std::vector<int64_t> shape{image.batch, image.channels, image.height, image.width};
  const std::vector<int64_t> pixels{image.batch, image.height, image.width};
  Tensor residual = empty_like_shape(prediction, prediction.scalar_type(), need_grad ? shape : std::vector<int64_t>{0});
  Tensor loss = empty_like_shape(prediction, compute_type(prediction), is_per_pixel ? pixels : std::vector<int64_t>{});
  Tensor count = empty_like_shape(prediction, ScalarType::Long, {});

  const int64_t chunks = chunks_of(image);
  std::vector<double> sums(chunks);
  std::vector<int64_t> counts(chunks);
  // For the mean, divide the residual by the number of valid pixels. The residual is then the gradient if the incoming gradient is
  // 1. fp16 underflows at 6e-8, so there the backward divides.
  const bool residual_is_divided = need_grad && is_mean && image.type != Real::f16;
  double residual_scale = 1;
  if (residual_is_divided) {
    const Count c{.shape = image, .labels = y.labels, .classes = codes.codes.classes, .counts = counts.data()};
    for_each_chunk(image, [&](auto kernels, int64_t chunk) { kernels.count(c, chunk); });
    residual_scale = 1.0 / static_cast<double>(std::max<int64_t>(1, std::accumulate(counts.begin(), counts.end(), int64_t{0})));
  }
  const Loss a{
      .prediction = image,
      .source = image_of(source, "source"),
      .labels = y.labels,
      .times = times.data(),
      .codes = codes.codes,
      .correction = {.temperature = temperature, .eps = eps, .max_norm = max_norm, .transform = static_cast<int>(transform)},
      .predicts_endpoint = predicts == 1,
      .endpoint_space = loss_space == 1,
      .annealed = schedule == 1,
      .weight = correction_weight,
      .t_min = t_min,
      .residual = need_grad ? output_of(residual) : Output{nullptr, image.type},
      .residual_scale = residual_scale,
      .per_pixel = is_per_pixel ? loss.data_ptr() : nullptr,
      .sums = sums.data(),
      .counts = counts.data(),
  };
  for_each_chunk(image, [&](auto kernels, int64_t chunk) { kernels.loss(a, chunk); });
  y.check();

  double total = 0;
  int64_t valid = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    total += sums[i];
    valid += counts[i];
  }
  *static_cast<int64_t*>(count.data_ptr()) = residual_is_divided ? 1 : valid;
  if (!is_per_pixel) store_scalar(loss, is_mean ? total / static_cast<double>(valid ? valid : 1) : total);
  return {loss, residual, count};
}

Tensor flow_loss_bwd(Tensor grad_loss, Tensor residual, Tensor count, int64_t reduction) {
  const Image image = image_of(residual, "residual");
  Tensor out = empty_like_shape(residual, residual.scalar_type(), {image.batch, image.channels, image.height, image.width});
  const Tensor grad = torch::stable::to(grad_loss, compute_type(residual));
  Scale a{.residual = image, .grad = grad.data_ptr(), .stride = {0, 0, 0}, .factor = 1, .out = output_of(out)};
  if (reduction == Reduction::none) {
    for (int i = 0; i < 3; ++i) a.stride[i] = grad.stride(i);
  } else if (reduction == Reduction::mean) {
    const int64_t valid = *static_cast<const int64_t*>(count.data_ptr());
    a.factor = 1.0 / static_cast<double>(valid ? valid : 1);
  }
  for_each_chunk(image, [&](auto kernels, int64_t chunk) { kernels.scale(a, chunk); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CPU, m) {
  m.impl("flow_loss", TORCH_BOX(&flow_loss));
  m.impl("flow_loss_bwd", TORCH_BOX(&flow_loss_bwd));
}

}  // namespace flowseg::cpu
