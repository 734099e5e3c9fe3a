// The ops of csrc/cuda on the CPU: arguments as torch.ops.flowseg_cuda takes them, results written to arrays that the caller made.
#pragma once

#include <cstdint>
#include <vector>

namespace flowseg::cuda {

struct Array {
  void* data;
  char kind;  // as NumPy's; 'u' of two bytes is bfloat16
  int64_t itemsize;
  std::vector<int64_t> shape, stride;  // in elements

  int64_t size() const {
    int64_t n = 1;
    for (const int64_t s : shape) n *= s;
    return n;
  }
};

void emulate_flow_interpolate(const Array& x, const Array& y, const Array& t, const Array& mu, int64_t ignore, const Array& out);
void emulate_flow_interpolate_bwd(const Array& grad, const Array& x, const Array& y, const Array& t, const Array& mu, int64_t ignore,
                              const Array& grad_source, const Array& grad_time);
void emulate_distance_correction(const Array& x, const Array& y, const Array& mu, double temperature, double eps, int transform,
                             double max_norm, int64_t ignore, const Array& out);
void emulate_flow_loss(const Array& prediction, const Array& x, const Array& y, const Array& t, const Array& mu, bool endpoint, bool endpoint_space,
                   double weight, bool annealed, double temperature, double eps, int transform, double max_norm,
                   int64_t ignore, int reduction, double t_min, const Array& loss, const Array& residual, const Array& count);
void emulate_flow_loss_bwd(const Array& grad, const Array& residual, const Array& count, int reduction, const Array& out);
void emulate_nearest_centroid(const Array& x, const Array& mu, const Array& cells, const Array& records, const Array& groups, double low,
                          double scale, const Array& out, const Array& distance, const Array& margin, int64_t ignore);
void emulate_decode_confusion(const Array& x, const Array& y, const Array& mu, const Array& cells, const Array& records, const Array& groups,
                          double low, double scale, int64_t ignore, const Array& counts);

}  // namespace flowseg::cuda
