// From torch tensors to the plain arguments of the kernels, and the launch of a kernel on torch's current stream.
#pragma once

#include <algorithm>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../torch/tensors.h"
#include "cuda/decode.cuh"

namespace flowseg::cuda {

inline Image image_of(const Tensor& t, const char* name) {
  FLOWSEG_CHECK(t.is_cuda(), name, ": wanted a CUDA tensor");
  return view_of(t, name);
}

inline std::vector<int64_t> shape_of(const Image& image) { return {image.batch, image.channels, image.height, image.width}; }

// `result` is contiguous, (B, C, H, W) or (B, H, W).
inline Target target_of(const Tensor& result, const Image& image) {
  return target_of(output_of(result), result.dim() == 4 ? image.channels : 1, image.height * image.width);
}

inline Labels labels_of(const Tensor& t, const Image& image, int64_t ignore, const char* name) {
  return labels_of(label_map_of(t, image, ignore, name), image.batch, image.height, image.width);
}

inline Codes codes_of(const Tensor& t, const Image& image) {
  check_codes(t, image);
  return {t.data_ptr(), static_cast<int>(t.size(0)), static_cast<int>(t.size(1))};
}

inline Times times_of(const Tensor& t, const Image& image) {
  FLOWSEG_CHECK(t.dim() == 1 && t.size(0) == image.batch, "t: wanted shape (B,)");
  return {t.data_ptr(), real_of(t, "t"), t.stride(0)};
}

// Where the kernels of the grid cannot read the codes in vectors, every centroid is searched.
inline Grid grid_for_vectors(const Tensor& centroids, const std::optional<Tensor>& cells, const std::optional<Tensor>& records,
                             const std::optional<Tensor>& groups, double low, double scale) {
  const Grid grid = grid_of(centroids, cells, records, groups, low, scale);
  return starts_at_16_bytes(centroids.data_ptr(), 0, 0) ? grid : Grid{};
}

// Launches on the device of a tensor and on the current stream there; nothing waits for the device.
class Launch {
 public:
  explicit Launch(const Tensor& t) : index_(t.get_device_index()), guard_(t.get_device_index()) {
    // This library has a CUDA runtime of its own, which does not see what torch's one has set.
    STD_CUDA_CHECK(cudaSetDevice(t.get_device_index()));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int64_t shared, const Arguments&... arguments) const {
    of_threads(kThreads, kernel, blocks, shared, arguments...);
  }

  template <class... Parameters, class... Arguments>
  void of_threads(int64_t threads, void (*kernel)(Parameters...), int64_t blocks, int64_t shared,
                  const Arguments&... arguments) const {
    FLOWSEG_CHECK(blocks <= INT32_MAX, "image: wanted at most 2^31 blocks of pixels");
    // More than 48 KiB, a kernel's own arrays of at most 16 KiB included, have to be asked for.
    if (shared > 32 * 1024) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    }
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared), stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  Device device() const {
    const auto ask = [this](cudaDeviceAttr what) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, what, index_));
      return value;
    };
    return {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxRegistersPerMultiprocessor) / 64,
            ask(cudaDevAttrMaxSharedMemoryPerBlockOptin), ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  }

  // Blocks of a kernel that goes through `tiles` in turns: as many as the device holds at a time.
  template <class... Parameters>
  int64_t in_turns(void (*kernel)(Parameters...), int64_t tiles) const {
    FLOWSEG_CHECK(tiles <= INT32_MAX, "image: wanted at most 2^31 blocks of pixels");
    int device = 0, processors = 0, blocks = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
    return std::min(tiles, int64_t{processors} * std::max(1, blocks));
  }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace flowseg::cuda
