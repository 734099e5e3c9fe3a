// What nearest_centroid and decode_confusion share: the decode grid as plain data.
#pragma once

#include <optional>

#include "torch_arguments.h"

namespace flowseg::cpu {

class GridArgument {
 public:
  GridArgument(const Tensor& centroids, const std::optional<Tensor>& cells, const std::optional<Tensor>& records,
               const std::optional<Tensor>& groups, double low, double scale) {
    // The grid holds fp32 codes; fp64 points are searched in fp64.
    if (!cells || centroids.scalar_type() != ScalarType::Float || centroids.size(1) != 3) return;
    FLOWSEG_CHECK(cells->is_contiguous() && records && records->is_contiguous() && groups && groups->is_contiguous() &&
                      cells->is_cpu() && records->is_cpu() && groups->is_cpu(),
                  "codebook: wanted its decode grid contiguous and on the CPU");
    const int64_t classes = centroids.size(0);
    const int64_t length = (classes + 7) / 8 * 8;
    columns_.assign(3 * length, std::numeric_limits<float>::infinity());
    const float* mu = static_cast<const float*>(centroids.data_ptr());
    for (int64_t k = 0; k < classes; ++k) {
      for (int64_t c = 0; c < 3; ++c) columns_[c * length + k] = mu[k * 3 + c];
    }
    grid = {static_cast<const int32_t*>(cells->data_ptr()),
            static_cast<const float*>(records->data_ptr()),
            static_cast<const int32_t*>(groups->data_ptr()),
            static_cast<float>(low),
            static_cast<float>(scale),
            static_cast<int>(cells->size(0)),
            columns_.data(),
            length};
  }
  GridArgument(const GridArgument&) = delete;

  Grid grid{};

 private:
  std::vector<float> columns_;
};

}  // namespace flowseg::cpu
