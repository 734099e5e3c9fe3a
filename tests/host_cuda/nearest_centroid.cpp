// nearest_centroid of csrc/cuda on the CPU.
#include "cuda/nearest_centroid.cuh"

#include "arrays.h"

namespace flowseg::cuda {

void emulate_nearest_centroid(const Array& x, const Array& mu, const Array& cells, const Array& records, const Array& groups, double low,
                          double scale, const Array& out, const Array& distance, const Array& margin, int64_t ignore) {
  Decode a{};
  a.x = source(x);
  a.codes = codes(mu);
  a.grid = grid(cells, records, groups, low, scale);
  a.ignore = ignore;
  a.labels = out.data;
  a.label_type = integer_of(out);
  a.label_vector = starts_at_16_bytes(out.data, x.shape[2] * x.shape[3], out.itemsize);
  a.distance = target(distance);
  a.margin = target(margin);
  launch_decode(a, OnCpu{});
}

}  // namespace flowseg::cuda
