// decode_confusion on the CPU.
#include "cpu/launch.h"

namespace flowseg::cpu {

// Each thread counts in its own table if the table has at most kLargestTablePerThread cells (8 MiB) and at most as many cells as
// the batch has pixels: clearing and adding up the tables costs that much per thread. Otherwise all threads add to one table with
// integer atomics. The result does not depend on the order of the additions in either case.
constexpr int64_t kLargestTablePerThread = int64_t{1} << 20;

Tensor decode_confusion(Tensor x, Tensor target, Tensor centroids, std::vector<Tensor> tables, double grid_low, double grid_scale,
                        bool by_class, int64_t ignore_index) {
  const Image image = image_of(x, "x");
  const PaddedCodes codes(centroids, image);
  const int64_t classes = codes.codes.classes, rows = by_class ? 3 : classes, size = rows * classes;
  const CheckedLabels y(target, image, classes, ignore_index, "target");
  const Tables decode_tables = tables_of(centroids, tables, grid_low, grid_scale);
  const Confusion a{
      .decode = {.x = image, .codes = codes.codes, .tables = decode_tables},
      .target = y.labels,
      .by_class = by_class,
  };
  Tensor counts = torch::stable::new_zeros(x, std::vector<int64_t>{rows, classes}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(counts.data_ptr());

  const int64_t chunks = chunks_of(image);
  const int64_t parts = std::min<int64_t>(chunks, torch::stable::get_num_threads());
  const bool shared = parts > 1 && size > std::min(kLargestTablePerThread, image.batch * image.height * image.width);
  // The first part counts in the result itself.
  std::vector<int64_t> copies(shared || parts <= 1 ? 0 : (parts - 1) * size);
  with_kernels([&](auto kernels) {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        int64_t* to = copies.empty() || part == 0 ? out : copies.data() + (part - 1) * size;
        for (int64_t chunk = part; chunk < chunks; chunk += parts) kernels.confusion(a, chunk, to, shared);
      }
    });
  });
  for (auto from = copies.begin(); from != copies.end(); from += size) {
    for (int64_t i = 0; i < size; ++i) out[i] += from[i];
  }
  y.check();
  return counts;
}

STABLE_TORCH_LIBRARY_IMPL(flowseg_cpu, CPU, m) { m.impl("decode_confusion", TORCH_BOX(&decode_confusion)); }

}  // namespace flowseg::cpu
