// flow_loss (loss and residual in one pass) and its backward on the CPU.
#include <numeric>

#include "torch_arguments.h"

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
  const CodeArgument codes(centroids, image);
  const LabelArgument y(labels, image, codes.codes.classes, ignore_index, "labels");
  const std::vector<double> times = times_of(t, image.batch);
  const ScalarType wide = compute_type(prediction);
  const std::vector<int64_t> shape{image.batch, image.channels, image.height, image.width};
  Tensor residual = empty_like_shape(prediction, prediction.scalar_type(), need_grad ? shape : std::vector<int64_t>{0});
  const std::vector<int64_t> pixels{image.batch, image.height, image.width};
  Tensor loss = empty_like_shape(prediction, wide, reduction == Reduction::none ? pixels : std::vector<int64_t>{});
  Tensor count = empty_like_shape(prediction, ScalarType::Long, {});

  const int64_t chunks = chunks_of(image);
  std::vector<double> sums(chunks);
  std::vector<int64_t> counts(chunks);
  Loss a{};
  a.prediction = image;
  a.source = image_of(source, "source");
  a.labels = y.labels;
  a.times = times.data();
  a.codes = codes.codes;
  a.correction = {temperature, eps, max_norm, static_cast<int>(transform)};
  a.predicts_endpoint = predicts == 1;
  a.endpoint_space = loss_space == 1;
  a.annealed = schedule == 1;
  a.weight = correction_weight;
  a.t_min = t_min;
  // For a mean the residual leaves divided by the count, so that it is the gradient already where the incoming one is 1; in fp16,
  // whose range ends at 6e-8, only the backward divides it.
  const bool divided = need_grad && reduction == Reduction::mean && image.type != Real::f16;
  a.share = 1;
  if (divided) {
    const Count c{image, y.labels, codes.codes.classes, counts.data()};
    for_each_chunk(image, [&](int64_t chunk) { kernels().count(c, chunk); });
    a.share = 1.0 / static_cast<double>(std::max<int64_t>(1, std::accumulate(counts.begin(), counts.end(), int64_t{0})));
  }
  a.residual = need_grad ? output_of(residual) : Output{nullptr, image.type};
  a.per_pixel = reduction == Reduction::none ? loss.data_ptr() : nullptr;
  a.sums = sums.data();
  a.counts = counts.data();
  for_each_chunk(image, [&](int64_t chunk) { kernels().loss(a, chunk); });
  y.check();

  double total = 0;
  int64_t valid = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    total += sums[i];
    valid += counts[i];
  }
  *static_cast<int64_t*>(count.data_ptr()) = divided ? 1 : valid;
  if (reduction == Reduction::mean) total /= static_cast<double>(valid ? valid : 1);
  if (reduction != Reduction::none) store_scalar(loss, total);
  return {loss, residual, count};
}

Tensor flow_loss_bwd(Tensor grad_loss, Tensor residual, Tensor count, int64_t reduction) {
  const Image image = image_of(residual, "residual");
  Tensor out = empty_like_shape(residual, residual.scalar_type(), {image.batch, image.channels, image.height, image.width});
  const Tensor grad = torch::stable::to(grad_loss, compute_type(residual));
  Scale a{image, grad.data_ptr(), {0, 0, 0}, 1, output_of(out)};
  if (reduction == Reduction::none) {
    for (int i = 0; i < 3; ++i) a.stride[i] = grad.stride(i);
  } else if (reduction == Reduction::mean) {
    const int64_t valid = *static_cast<const int64_t*>(count.data_ptr());
    a.factor = 1.0 / static_cast<double>(valid ? valid : 1);
  }
  for_each_chunk(image, [&](int64_t chunk) { kernels().scale(a, chunk); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CPU, m) {
  m.impl("flow_loss", TORCH_BOX(&flow_loss));
  m.impl("flow_loss_bwd", TORCH_BOX(&flow_loss_bwd));
}

}  // namespace flowseg::cpu
