// The ops of csrc/cuda on the host, for kernels.py (by ctypes) and driver.cpp. Parameters are those of torch.ops.flowseg_cuda; the
// caller allocates the results.
#pragma once

#include <cstdint>

namespace flowseg::host {

// kernels.py repeats this layout.
struct Array {
  void* data = nullptr;  // null: an absent tensor
  int64_t itemsize = 4;
  int64_t is_bfloat16 = 0;
  int64_t dims = 0;
  int64_t shape[4] = {};
  int64_t stride[4] = {};  // in elements

  int64_t size() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dims; ++i) n *= shape[i];
    return n;
  }
};

extern "C" {

void flow_interpolate(const Array& source, const Array& labels, const Array& t, const Array& centroids, int64_t ignore,
                      const Array& out);
void flow_interpolate_bwd(const Array& grad, const Array& source, const Array& labels, const Array& t, const Array& centroids,
                          int64_t ignore, const Array& grad_source, const Array& grad_time);
void distance_correction(const Array& x, const Array& labels, const Array& centroids, double temperature, double eps,
                         int64_t transform, double max_norm, int64_t ignore, const Array& out);
void flow_loss(const Array& prediction, const Array& source, const Array& labels, const Array& t, const Array& centroids,
               int64_t predicts, int64_t loss_space, double weight, int64_t schedule, double temperature, double eps,
               int64_t transform, double max_norm, int64_t ignore, int64_t reduction, double t_min, const Array& loss,
               const Array& residual, const Array& count);
void flow_loss_bwd(const Array& grad, const Array& residual, const Array& count, int64_t reduction, const Array& out);
// The tables of decoding: a grid (three tables), guesses (five), or none. Absent arrays have no data.
void nearest_centroid(const Array& x, const Array& centroids, const Array& table0, const Array& table1, const Array& table2,
                      const Array& table3, const Array& table4, double low, double scale, const Array& labels,
                      const Array& distance, const Array& margin, int64_t ignore);
void decode_confusion(const Array& x, const Array& target, const Array& centroids, const Array& table0, const Array& table1,
                      const Array& table2, const Array& table3, const Array& table4, double low, double scale, int64_t by_class,
                      int64_t ignore, const Array& counts);
void class_probabilities(const Array& x, const Array& centroids, double temperature, double eps, int64_t transform, int64_t form,
                         const Array& out);
void top_classes(const Array& x, const Array& centroids, double temperature, double eps, int64_t transform, const Array& labels,
                 const Array& probabilities, int64_t ignore);

void neural_field(const Array& x, const Array& weights, const Array& embed, const Array& embed_bias, const Array& norm,
                  const Array& out_norm, const Array& out_weight, const Array& out_bias, int64_t patch_size, int64_t mlp_ratio,
                  double eps, int64_t both, int64_t residual, const Array& out);
void neural_field_bwd(const Array& grad, const Array& x, const Array& weights, const Array& embed, const Array& embed_bias,
                      const Array& norm, const Array& out_norm, const Array& out_weight, const Array& out_bias, int64_t patch_size,
                      int64_t mlp_ratio, double eps, int64_t both, int64_t residual, const Array& grad_x, const Array& grad_weights,
                      const Array& grad_embed, const Array& grad_bias, const Array& grad_norm, const Array& grad_out_norm,
                      const Array& grad_out_weight, const Array& grad_out_bias);

// From now on each launch runs only its last `count` blocks.
void run_last_blocks(int64_t count);
// The failure of a launch since the last call, or null.
const char* last_failure();

}  // extern "C"

}  // namespace flowseg::host
