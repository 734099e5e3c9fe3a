// From torch tensors to the parameters of the kernels, and the launch of a kernel on torch's current stream.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

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

// Answers of the CUDA runtime that never change, by what they are about. Each question is asked once per process: the host's time
// bounds a small call.
template <class About, class Answer>
class Known {
 public:
  template <class Ask>
  Answer operator()(const About& about, Ask ask) {
    const std::lock_guard lock(mutex_);
    const auto found = answers_.find(about);
    return found != answers_.end() ? found->second : answers_.emplace(about, ask()).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<About, Answer> answers_;
};

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
    static Known<int, Device> devices;
    return devices(index_, [this] {
      const auto attribute = [this](cudaDeviceAttr name) {
        int value = 0;
        STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index_));
        return value;
      };
      return Device{.multiprocessors = attribute(cudaDevAttrMultiProcessorCount),
                    .threads = attribute(cudaDevAttrMaxRegistersPerMultiprocessor) / 64,
                    .shared_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                    .shared_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
    });
  }

  // Blocks for a kernel whose blocks loop over `tiles` tiles: as many as the device runs at once.
  template <class... Parameters>
  int64_t resident_blocks(void (*kernel)(Parameters...), int64_t tiles) const {
    FLOWSEG_CHECK(tiles <= INT32_MAX, "image: wanted at most 2^31 blocks of pixels");
    static Known<std::pair<int, const void*>, int> kernels;
    const int blocks = kernels({index_, reinterpret_cast<const void*>(kernel)}, [&] {
      int found = 0;
      STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, kThreads, 0));
      return std::max(1, found);
    });
    return std::min(tiles, device().multiprocessors * blocks);
  }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace flowseg::cuda
