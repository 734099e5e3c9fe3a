// The launch of decode_confusion on a GPU with given properties, without running it: blocks, threads, shared memory.
#include "cuda/decode_confusion.cuh"

namespace flowseg::host {

using namespace flowseg::cuda;

namespace {

struct Plan {
  int64_t blocks, threads, shared_bytes, counts_in_shared_memory;
};

// The interface of Launch in cuda/launch.h.
struct Planner {
  Device properties;
  Plan* plan;

  Device device() const { return properties; }

  void with_threads(int64_t threads, void (*kernel)(ConfusionParams), int64_t blocks, int64_t shared,
                    const ConfusionParams&) const {
    const bool counts = kernel == confusion_by_grid<true, true, float> || kernel == confusion_by_search<float, 3, true>;
    *plan = {blocks, threads, shared, counts};
  }
};

}  // namespace

extern "C" void plan_confusion(const Device& device, int64_t batch, int64_t pixels, int64_t classes, int64_t by_grid, Plan& plan) {
  ConfusionParams params{};
  params.x.type = Real::f32;
  params.x.batch = batch;
  params.x.height = 1;
  params.x.width = pixels;
  params.codes = {.data = nullptr, .classes = static_cast<int>(classes), .channels = 3};
  static const int32_t cell = 0;
  if (by_grid) params.tables.grid.cells = &cell;
  launch_confusion(params, Planner{device, &plan});
}

}  // namespace flowseg::host
