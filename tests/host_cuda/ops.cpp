// Launches the kernels of csrc/cuda on the host.
#include "ops.h"

#include <memory>
#include <string>
#include <utility>

#include "cuda/class_probabilities.cuh"
#include "cuda/decode_confusion.cuh"
#include "cuda/distance_correction.cuh"
#include "cuda/field/launch.cuh"
#include "cuda/flow_interpolate.cuh"
#include "cuda/flow_loss.cuh"
#include "cuda/nearest_centroid.cuh"
#include "cuda/top_classes.cuh"

namespace flowseg::host {

using namespace flowseg::cuda;

namespace {

// The interface of Launch in cuda/launch.h.
struct HostLaunch {
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int64_t shared, const Arguments&... arguments) const {
    with_threads(cuda::kThreads, kernel, blocks, shared, arguments...);
  }
  template <class... Parameters, class... Arguments>
  void with_threads(int64_t threads, void (*kernel)(Parameters...), int64_t blocks, int64_t shared,
                    const Arguments&... arguments) const {
    run(kernel, threads, blocks, static_cast<size_t>(shared), arguments...);
  }

  // Room for two blocks at a time: each block then processes several tiles or patches.
  Device device() const {
    return {.multiprocessors = 2,
            .threads = cuda::kThreads,
            .shared_block = 48 * 1024,
            .shared_multiprocessor = 64 * 1024};
  }

  TensorMap tensor_map(const Matrices& matrices) const { return checked_tensor_map(matrices); }

  // Three blocks: each then loops over several tiles. One block per tile if only the last blocks run.
  template <class Kernel>
  int64_t resident_blocks(Kernel, int64_t tiles) const {
    return tiles < 3 || last_blocks < tiles ? tiles : 3;
  }
};

Real real_of(const Array& a) {
  if (a.is_bfloat16) return Real::bf16;
  return a.itemsize == 8 ? Real::f64 : a.itemsize == 4 ? Real::f32 : Real::f16;
}

Integer integer_of(const Array& a) {
  return a.itemsize == 1 ? Integer::u8 : a.itemsize == 2 ? Integer::i16 : a.itemsize == 4 ? Integer::i32 : Integer::i64;
}

InputImage image(const Array& a) {
  const auto& n = a.shape;
  const auto& s = a.stride;
  return input_image({.data = a.data,
                      .type = real_of(a),
                      .batch = n[0],
                      .channels = n[1],
                      .height = n[2],
                      .width = n[3],
                      .stride = {s[0], s[1], s[2], s[3]}});
}

// `a` is (B, C, H, W), (B, H, W) or smaller; data is null if it is empty.
OutputImage output(const Array& a) {
  return output_image({.data = a.size() ? a.data : nullptr, .type = real_of(a)}, a.dims == 4 ? a.shape[1] : 1,
                      a.dims >= 3 ? a.shape[a.dims - 2] * a.shape[a.dims - 1] : 1);
}

InputLabels label_map(const Array& a, int64_t ignore) {
  const LabelMap map{.data = a.data, .type = integer_of(a), .stride = {a.stride[0], a.stride[1], a.stride[2]}, .ignore = ignore};
  return input_labels(map, a.shape[0], a.shape[1], a.shape[2]);
}

InputTimes times(const Array& a) { return {.data = a.data, .type = real_of(a), .stride = a.stride[0]}; }

InputCodes codes(const Array& a) {
  return {.data = a.data, .classes = static_cast<int>(a.shape[0]), .channels = static_cast<int>(a.shape[1])};
}

Grid decode_grid(const Array& cells, const Array& records, const Array& records_left, double low, double scale) {
  if (!cells.data) return {};
  const auto* table = static_cast<const int32_t*>(cells.data);
  return {.cells = table,
          .records = static_cast<const float*>(records.data),
          .records_left = static_cast<const int32_t*>(records_left.data),
          .low = static_cast<float>(low),
          .scale = static_cast<float>(scale),
          .size = static_cast<int>(cells.shape[3]),
          .words = table + cells.size() / 2};
}

Guesses guesses(const Array& projection, const Array& starts, const Array& members, const Array& rivals, const Array& certain) {
  const int axes = static_cast<int>(projection.shape[0]);
  int log2_cells = 0;
  while (int64_t{1} << (log2_cells + 1) * axes < starts.shape[0]) ++log2_cells;
  return {.projection = static_cast<const float*>(projection.data),
          .starts = static_cast<const int32_t*>(starts.data),
          .members = static_cast<const int32_t*>(members.data),
          .rivals = static_cast<const int32_t*>(rivals.data),
          .certain = static_cast<const float*>(certain.data),
          .axes = axes,
          .log2_cells = log2_cells,
          .rival_count = static_cast<int>(rivals.shape[1])};
}

Tables tables(const Array& a, const Array& b, const Array& c, const Array& d, const Array& e, double low, double scale) {
  if (e.data) return {.grid = {}, .guesses = guesses(a, b, c, d, e)};
  return {.grid = decode_grid(a, b, c, low, scale), .guesses = {}};
}

Correction correction(double temperature, double eps, double max_norm, int64_t transform) {
  return {.temperature = temperature, .eps = eps, .max_norm = max_norm, .transform = static_cast<int>(transform)};
}

FieldParams field(const Array& x, const Array& weights, const Array& embed, const Array& embed_bias, const Array& norm,
                  const Array& out_norm, const Array& out_weight, const Array& out_bias, const FieldOptions& options) {
  const FieldShared shared{.embed = embed.data,
                           .embed_bias = embed_bias.data,
                           .gains = norm.data,
                           .out_gain = out_norm.data,
                           .out_weight = out_weight.data,
                           .out_bias = out_bias.data};
  return field_params(image(x), weights.data, weights.shape[2], shared, embed_bias.shape[0], embed.shape[1], options);
}

// Scratch memory of NaN: what a kernel reads before it is written shows in the results.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(static_cast<size_t>(bytes) + kAlignment, static_cast<char>(0xff)) {}
  void* data() { return memory_.data() + (-reinterpret_cast<uintptr_t>(memory_.data()) & (kAlignment - 1)); }

 private:
  static constexpr size_t kAlignment = 256;
  std::vector<char> memory_;
};

}  // namespace

void run_last_blocks(int64_t count) { last_blocks = count; }
const char* last_failure() { return take_failure(); }

void flow_interpolate(const Array& source, const Array& labels, const Array& t, const Array& centroids, int64_t ignore,
                      const Array& out) {
  const InterpolateParams params{.source = image(source),
                                 .labels = label_map(labels, ignore),
                                 .times = times(t),
                                 .codes = codes(centroids),
                                 .out = output(out)};
  launch_interpolate(params, HostLaunch{});
}

void flow_interpolate_bwd(const Array& grad, const Array& source, const Array& labels, const Array& t, const Array& centroids,
                          int64_t ignore, const Array& grad_source, const Array& grad_time) {
  const InputImage x = image(source);
  const auto sums = std::make_unique<double[]>(static_cast<size_t>(grad_time_sums(x)));
  const InterpolateBackwardParams params{.grad = image(grad),
                                         .source = x,
                                         .labels = label_map(labels, ignore),
                                         .times = times(t),
                                         .codes = codes(centroids),
                                         .grad_source = output(grad_source),
                                         .grad_time = output(grad_time),
                                         .sums = grad_time.size() ? sums.get() : nullptr};
  launch_interpolate_backward(params, HostLaunch{});
}

void distance_correction(const Array& x, const Array& labels, const Array& centroids, double temperature, double eps,
                         int64_t transform, double max_norm, int64_t ignore, const Array& out) {
  const CorrectionParams params{.x = image(x),
                                .labels = label_map(labels, ignore),
                                .codes = codes(centroids),
                                .correction = correction(temperature, eps, max_norm, transform),
                                .out = output(out)};
  launch_correction(params, HostLaunch{});
}

void flow_loss(const Array& prediction, const Array& source, const Array& labels, const Array& t, const Array& centroids,
               int64_t predicts, int64_t loss_space, double weight, int64_t schedule, double temperature, double eps,
               int64_t transform, double max_norm, int64_t ignore, int64_t reduction, double t_min, const Array& loss,
               const Array& residual, const Array& count) {
  const LossOptions options{.predicts_endpoint = predicts == 1,
                            .endpoint_space = loss_space == 1,
                            .weight = weight,
                            .annealed = schedule == 1,
                            .correction = correction(temperature, eps, max_norm, transform),
                            .reduction = reduction,
                            .t_min = t_min};
  LossParams params = loss_params(image(prediction), image(source), label_map(labels, ignore), times(t), codes(centroids), options,
                                  output(loss), output(residual), static_cast<int64_t*>(count.data));
  plan_loss(params, HostLaunch{});
  const auto partials = std::make_unique<Partial[]>(static_cast<size_t>(params.loss_blocks + params.count_blocks));
  params.partials = partials.get();
  launch_loss(params, HostLaunch{});
}

void flow_loss_bwd(const Array& grad, const Array& residual, const Array& count, int64_t reduction, const Array& out) {
  ScaleParams params{.residual = image(residual),
                     .grad = grad.data,
                     .stride = {0, 0, 0},
                     .count = reduction == Reduction::mean ? static_cast<const int64_t*>(count.data) : nullptr,
                     .out = output(out),
                     .in_place = residual.data == out.data};
  for (int i = 0; reduction == Reduction::none && i < 3; ++i) params.stride[i] = grad.stride[i];
  launch_scale(params, HostLaunch{});
}

void nearest_centroid(const Array& x, const Array& centroids, const Array& table0, const Array& table1, const Array& table2,
                      const Array& table3, const Array& table4, double low, double scale, const Array& labels,
                      const Array& distance, const Array& margin, int64_t ignore) {
  const DecodeParams params{.x = image(x),
                            .codes = codes(centroids),
                            .tables = tables(table0, table1, table2, table3, table4, low, scale),
                            .ignore = ignore,
                            .labels = labels.data,
                            .label_type = integer_of(labels),
                            .label_vector = starts_at_16_bytes(labels.data, x.shape[2] * x.shape[3], labels.itemsize),
                            .distance = output(distance),
                            .margin = output(margin)};
  launch_decode(params, HostLaunch{});
}

void decode_confusion(const Array& x, const Array& target, const Array& centroids, const Array& table0, const Array& table1,
                      const Array& table2, const Array& table3, const Array& table4, double low, double scale, int64_t by_class,
                      int64_t ignore, const Array& counts) {
  const ConfusionParams params{.x = image(x),
                               .target = label_map(target, ignore),
                               .codes = codes(centroids),
                               .tables = tables(table0, table1, table2, table3, table4, low, scale),
                               .counts = static_cast<unsigned long long*>(counts.data),
                               .by_class = by_class != 0};
  launch_confusion(params, HostLaunch{});
}

void class_probabilities(const Array& x, const Array& centroids, double temperature, double eps, int64_t transform, int64_t form,
                         const Array& out) {
  const ProbabilityParams params{.x = image(x),
                                 .codes = codes(centroids),
                                 .correction = correction(temperature, eps, 0, transform),
                                 .form = static_cast<int>(form),
                                 .out = output(out)};
  launch_probabilities(params, HostLaunch{});
}

void top_classes(const Array& x, const Array& centroids, double temperature, double eps, int64_t transform, const Array& labels,
                 const Array& probabilities, int64_t ignore) {
  const TopParams params{.x = image(x),
                         .codes = codes(centroids),
                         .correction = correction(temperature, eps, 0, transform),
                         .kept = static_cast<int>(labels.shape[1]),
                         .ignore = ignore,
                         .labels = labels.data,
                         .label_type = integer_of(labels),
                         .label_vector = starts_at_16_bytes(labels.data, x.shape[2] * x.shape[3], labels.itemsize),
                         .probabilities = output(probabilities)};
  launch_top_classes(params, HostLaunch{});
}

void neural_field(const Array& x, const Array& weights, const Array& embed, const Array& embed_bias, const Array& norm,
                  const Array& out_norm, const Array& out_weight, const Array& out_bias, int64_t patch_size, int64_t mlp_ratio,
                  double eps, int64_t both, int64_t residual, const Array& out) {
  FieldParams params = field(x, weights, embed, embed_bias, norm, out_norm, out_weight, out_bias,
                             {patch_size, mlp_ratio, eps, both != 0, residual != 0});
  params.out = out.data;
  Scratch scratch(field_scratch(params, false, HostLaunch{}));
  launch_field(params, real_of(x), scratch.data(), HostLaunch{});
}

void neural_field_bwd(const Array& grad, const Array& x, const Array& weights, const Array& embed, const Array& embed_bias,
                      const Array& norm, const Array& out_norm, const Array& out_weight, const Array& out_bias, int64_t patch_size,
                      int64_t mlp_ratio, double eps, int64_t both, int64_t residual, const Array& grad_x, const Array& grad_weights,
                      const Array& grad_embed, const Array& grad_bias, const Array& grad_norm, const Array& grad_out_norm,
                      const Array& grad_out_weight, const Array& grad_out_bias) {
  FieldParams params = field(x, weights, embed, embed_bias, norm, out_norm, out_weight, out_bias,
                             {patch_size, mlp_ratio, eps, both != 0, residual != 0});
  params.grad = image(grad);
  params.grad_x = grad_x.data;
  params.grad_weights = grad_weights.data;
  params.grad_embed = grad_embed.data;
  params.grad_bias = grad_bias.data;
  params.grad_gains = grad_norm.data;
  params.grad_out_gain = grad_out_norm.data;
  params.grad_out_weight = grad_out_weight.data;
  params.grad_out_bias = grad_out_bias.data;
  Scratch scratch(field_scratch(params, true, HostLaunch{}));
  launch_field_backward(params, real_of(x), scratch.data(), HostLaunch{});
}

}  // namespace flowseg::host
