// flow_interpolate and its backward on the CPU.
#include "cpu/launch.h"

namespace flowseg::cpu {

Tensor flow_interpolate(Tensor source, Tensor labels, Tensor t, Tensor centroids, int64_t ignore_index) {
  const Image image = image_of(source, "source");
  const PaddedCodes codes(centroids, image);
  const CheckedLabels y(labels, image, codes.codes.classes, ignore_index, "labels");
  const std::vector<double> times = times_of(t, image.batch);
  Tensor out = empty_like_shape(source, source.scalar_type(), {image.batch, image.channels, image.height, image.width});
  const Interpolate a{
      .source = image, .labels = y.labels, .times = times.data(), .codes = codes.codes, .out = output_of(out)};
  for_each_chunk(image, [&](auto kernels, int64_t chunk) { kernels.interpolate(a, chunk); });
  y.check();
  return out;
}

std::tuple<Tensor, Tensor> flow_interpolate_bwd(Tensor grad, Tensor source, Tensor labels, Tensor t, Tensor centroids,
                                                int64_t ignore_index, bool need_t) {
  const Image image = image_of(source, "source");
  const PaddedCodes codes(centroids, image);
  const CheckedLabels y(labels, image, codes.codes.classes, ignore_index, "labels");
  const std::vector<double> times = times_of(t, image.batch);
  Tensor grad_source = empty_like_shape(source, source.scalar_type(), {image.batch, image.channels, image.height, image.width});
  std::vector<double> sums(need_t ? chunks_of(image) : 0);
  const InterpolateBackward a{
      .grad = image_of(grad, "grad"),
      .source = image,
      .labels = y.labels,
      .times = times.data(),
      .codes = codes.codes,
      .grad_source = output_of(grad_source),
      .grad_time = need_t ? sums.data() : nullptr,
  };
  for_each_chunk(image, [&](auto kernels, int64_t chunk) { kernels.interpolate_backward(a, chunk); });
  y.check();
  Tensor grad_t = empty_like_shape(t, ScalarType::Double, {need_t ? image.batch : 0});
  if (need_t) {
    double* out = static_cast<double*>(grad_t.data_ptr());
    const int64_t chunks = chunks_per_image(image);
    for (int64_t b = 0; b < image.batch; ++b) {
      out[b] = 0;
      for (int64_t i = 0; i < chunks; ++i) out[b] += sums[b * chunks + i];
    }
  }
  return {grad_source, torch::stable::to(grad_t, t.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CPU, m) {
  m.impl("flow_interpolate", TORCH_BOX(&flow_interpolate));
  m.impl("flow_interpolate_bwd", TORCH_BOX(&flow_interpolate_bwd));
}

}  // namespace flowseg::cpu
