// flow_interpolate and its backward on the CPU.
#include "torch_arguments.h"

namespace flowseg::cpu {

Tensor flow_interpolate(Tensor source, Tensor labels, Tensor t, Tensor centroids, int64_t ignore_index) {
  const Image image = image_of(source, "source");
  const CodeArgument codes(centroids, image);
  const LabelArgument y(labels, image, codes.codes.classes, ignore_index, "labels");
  const std::vector<double> times = times_of(t, image.batch);
  Tensor out = empty_like_shape(source, source.scalar_type(), {image.batch, image.channels, image.height, image.width});
  const Interpolate a{image, y.labels, times.data(), codes.codes, output_of(out)};
  for_each_chunk(image, [&](int64_t chunk) { kernels().interpolate(a, chunk); });
  y.check();
  return out;
}

std::tuple<Tensor, Tensor> flow_interpolate_bwd(Tensor grad, Tensor source, Tensor labels, Tensor t, Tensor centroids,
                                                int64_t ignore_index, bool need_t) {
  const Image image = image_of(source, "source");
  const CodeArgument codes(centroids, image);
  const LabelArgument y(labels, image, codes.codes.classes, ignore_index, "labels");
  const std::vector<double> times = times_of(t, image.batch);
  Tensor grad_source = empty_like_shape(source, source.scalar_type(), {image.batch, image.channels, image.height, image.width});
  const int64_t chunks = chunks_of(image);
  std::vector<double> sums(need_t ? chunks : 0);
  const InterpolateBackward a{image_of(grad, "grad"), image,       y.labels, times.data(), codes.codes,
                              output_of(grad_source), need_t ? sums.data() : nullptr};
  for_each_chunk(image, [&](int64_t chunk) { kernels().interpolate_backward(a, chunk); });
  y.check();
  Tensor wide = empty_like_shape(t, ScalarType::Double, {need_t ? image.batch : 0});
  if (need_t) {
    double* out = static_cast<double*>(wide.data_ptr());
    const int64_t each = image.batch ? chunks / image.batch : 0;
    for (int64_t b = 0; b < image.batch; ++b) {
      out[b] = 0;
      for (int64_t i = 0; i < each; ++i) out[b] += sums[b * each + i];
    }
  }
  return {grad_source, torch::stable::to(wide, t.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CPU, m) {
  m.impl("flow_interpolate", TORCH_BOX(&flow_interpolate));
  m.impl("flow_interpolate_bwd", TORCH_BOX(&flow_interpolate_bwd));
}

}  // namespace flowseg::cpu
