// flow_loss of csrc/cuda on the CPU.
#include "cuda/flow_loss.cuh"

#include "arrays.h"

namespace flowseg::cuda {

void emulate_flow_loss(const Array& prediction, const Array& x, const Array& y, const Array& t, const Array& mu, bool endpoint, bool endpoint_space,
                   double weight, bool annealed, double temperature, double eps, int transform, double max_norm,
                   int64_t ignore, int reduction, double t_min, const Array& loss, const Array& residual, const Array& count) {
  Loss a{};
  a.prediction = source(prediction);
  a.source = source(x);
  a.labels = labels(y, ignore);
  a.times = times(t);
  a.codes = codes(mu);
  a.correction = {temperature, eps, max_norm, transform};
  a.predicts_endpoint = endpoint;
  a.endpoint_space = endpoint_space;
  a.annealed = annealed;
  a.mean = reduction == Reduction::mean;
  a.weight = weight;
  a.t_min = t_min;
  a.residual = target(residual);
  (reduction == Reduction::none ? a.per_pixel : a.loss) = target(loss);
  a.count = static_cast<int64_t*>(count.data);
  a.divided = a.residual.data && a.mean && a.prediction.type != Real::f16;
  plan_loss(a, OnCpu{});
  const auto partials = std::make_unique<Partial[]>(static_cast<size_t>(a.parts + a.counts));
  a.partials = partials.get();
  launch_loss(a, OnCpu{});
}

void emulate_flow_loss_bwd(const Array& grad, const Array& residual, const Array& count, int reduction, const Array& out) {
  Scale a{source(residual), grad.data, {}, nullptr, target(out), residual.data == out.data, 0};
  if (reduction == Reduction::mean) a.count = static_cast<const int64_t*>(count.data);
  for (int i = 0; reduction == Reduction::none && i < 3; ++i) a.stride[i] = grad.stride[i];
  launch_scale(a, OnCpu{});
}

}  // namespace flowseg::cuda
