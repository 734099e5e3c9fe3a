// From torch tensors to the parameters of the kernels, and the launch of a kernel on torch's current stream.
#pragma once

#include <algorithm>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "cuda/block.cuh"
#include "cuda/params.h"
#include "torch/tensors.h"

namespace flowseg::cuda {

inline Image image_of(const Tensor& t, const char* name) {
  FLOWSEG_CHECK(t.is_cuda(), name, ": wanted a CUDA tensor");
  return view_of(t, name);
}

inline std::vector<int64_t> shape_of(const Image& image) { return {image.batch, image.channels, image.height, image.width}; }

// `result` is contiguous, (B, C, H, W) or (B, H, W).
inline OutputImage output_image(const Tensor& result, const Image& image) {
  return output_image(output_of(result), result.dim() == 4 ? image.channels : 1, image.height * image.width);
}

inline InputLabels input_labels(const Tensor& t, const Image& image, int64_t ignore, const char* name) {
  return input_labels(label_map_of(t, image, ignore, name), image.batch, image.height, image.width);
}

inline InputCodes input_codes(const Tensor& t, const Image& image) {
  check_codes(t, image);
  return {.data = t.data_ptr(), .classes = static_cast<int>(t.size(0)), .channels = static_cast<int>(t.size(1))};
}

inline InputTimes input_times(const Tensor& t, const Image& image) {
  FLOWSEG_CHECK(t.dim() == 1 && t.size(0) == image.batch, "t: wanted shape (B,)");
  return {.data = t.data_ptr(), .type = real_of(t, "t"), .stride = t.stride(0)};
}

// The decode grid, or none where the centroids do not start at 16 bytes: the kernels then search all centroids.
inline Grid aligned_grid(const Tensor& centroids, const std::optional<Tensor>& cells, const std::optional<Tensor>& records,
                         const std::optional<Tensor>& records_left, double low, double scale) {
  const Grid grid = grid_of(centroids, cells, records, records_left, low, scale);
  return starts_at_16_bytes(centroids.data_ptr(), 0, 0) ? grid : Grid{};
}

// Launches kernels on the device of a tensor, on that device's current stream, without waiting for the device.
class Launch {
 public:
  explicit Launch(const Tensor& t) : index_(t.get_device_index()), guard_(t.get_device_index()) {
    // This library links its own CUDA runtime, which does not see the device that torch's runtime has set.
    STD_CUDA_CHECK(cudaSetDevice(t.get_device_index()));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Launches a kernel with kThreads threads per block and `shared` bytes of dynamic shared memory.
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int64_t shared, const Arguments&... arguments) const {
    with_threads(kThreads, kernel, blocks, shared, arguments...);
  }

  template <class... Parameters, class... Arguments>
  void with_threads(int64_t threads, void (*kernel)(Parameters...), int64_t blocks, int64_t shared,
                    const Arguments&... arguments) const {
    FLOWSEG_CHECK(blocks <= INT32_MAX, "image: wanted fewer than 2^31 blocks of pixels");
    // CUDA requires an opt-in for more than 48 KiB of shared memory; the static arrays of a kernel take up to 16 KiB of them.
    if (shared > 32 * 1024) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    }
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared), stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  Device device() const {
    const auto attribute = [this](cudaDeviceAttr name) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index_));
      return value;
    };
    return {.multiprocessors = attribute(cudaDevAttrMultiProcessorCount),
            .threads = attribute(cudaDevAttrMaxRegistersPerMultiprocessor) / 64,
            .shared_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            .shared_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  }

  // Blocks for a kernel whose blocks loop over `tiles` tiles: as many as the device runs at once.
  template <class... Parameters>
  int64_t resident_blocks(void (*kernel)(Parameters...), int64_t tiles) const {
    FLOWSEG_CHECK(tiles <= INT32_MAX, "image: wanted at most 2^31 blocks of pixels");
    int device = 0, multiprocessors = 0, blocks = 0;
    STD_CUDA_CHECK(cudaGetDevice(&device));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
    return std::min(tiles, int64_t{multiprocessors} * std::max(1, blocks));
  }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace flowseg::cuda
