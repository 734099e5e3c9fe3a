// What nearest_centroid and decode_confusion share: the decode grid as plain data.
#pragma once

#include "torch_arguments.h"

namespace flowseg::cpu {

class GridArgument {
 public:
  GridArgument(const Tensor& centroids, const std::optional<Tensor>& cells, const std::optional<Tensor>& records,
               const std::optional<Tensor>& groups, double low, double scale) {
    const Grid plain = grid_of(centroids, cells, records, groups, low, scale);
    if (!plain.cells) return;
    const int64_t classes = centroids.size(0);
    const int64_t length = (classes + 7) / 8 * 8;
    columns_.assign(3 * length, std::numeric_limits<float>::infinity());
    const float* mu = static_cast<const float*>(centroids.data_ptr());
    for (int64_t k = 0; k < classes; ++k) {
      for (int64_t c = 0; c < 3; ++c) columns_[c * length + k] = mu[k * 3 + c];
    }
    grid = {plain, columns_.data(), length};
  }
  GridArgument(const GridArgument&) = delete;

  GridAndCodes grid{};

 private:
  std::vector<float> columns_;
};

}  // namespace flowseg::cpu
