// decode_confusion on the CPU.
#include "torch_arguments.h"

namespace flowseg::cpu {

// Threads have counts of their own, which cost K^2 numbers each to clear and to add up, while these are fewer than the pixels and
// at most 8 MiB; else they add to one array with integer atomics, whose result does not depend on the order either.
constexpr int64_t kOwnCounts = int64_t{1} << 20;

Tensor decode_confusion(Tensor x, Tensor target, Tensor centroids, std::optional<Tensor> cells, std::optional<Tensor> records,
                        std::optional<Tensor> groups, double grid_low, double grid_scale, int64_t ignore_index) {
  const Image image = image_of(x, "x");
  const CodeArgument codes(centroids, image);
  const Grid grid = grid_of(centroids, cells, records, groups, grid_low, grid_scale);
  const int64_t classes = codes.codes.classes, size = classes * classes;
  const LabelArgument y(target, image, classes, ignore_index, "target");
  Confusion a{};
  a.decode.x = image;
  a.decode.codes = codes.codes;
  a.decode.grid = grid;
  a.target = y.labels;
  Tensor counts = torch::stable::new_zeros(x, std::vector<int64_t>{classes, classes}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(counts.data_ptr());

  const int64_t chunks = chunks_of(image);
  const int64_t parts = std::min<int64_t>(chunks, torch::stable::get_num_threads());
  const bool shared = parts > 1 && size > std::min(kOwnCounts, image.batch * image.height * image.width);
  std::vector<int64_t> own(shared || parts <= 1 ? 0 : (parts - 1) * size);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      int64_t* to = own.empty() || part == 0 ? out : own.data() + (part - 1) * size;
      for (int64_t chunk = part; chunk < chunks; chunk += parts) kernels().confusion(a, chunk, to, shared);
    }
  });
  for (auto from = own.begin(); from != own.end(); from += size) {
    for (int64_t i = 0; i < size; ++i) out[i] += from[i];
  }
  y.check();
  return counts;
}

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CPU, m) { m.impl("decode_confusion", TORCH_BOX(&decode_confusion)); }

}  // namespace flowseg::cpu
