// Tensor maps for TMA: descriptions of arrays in global memory, which the driver encodes.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <map>
#include <mutex>

#include "cuda/hopper/async.cuh"
#include "cuda/hopper/tile.h"
#include "cuda/launch.h"

namespace flowseg::cuda {

// The driver's function, found through the CUDA runtime: the library does not link to the driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr;
  }();
  FLOWSEG_CHECK(encoder, "neural_field: the NVIDIA driver has no cuTensorMapEncodeTiled; wanted a driver for CUDA 12 or newer");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encoder);
}

inline TensorMap encode_tensor_map(const Matrices& m) {
  TensorMap map;
  const std::array sizes{static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows), static_cast<cuuint64_t>(m.count)};
  const std::array strides{static_cast<cuuint64_t>(m.row_bytes), static_cast<cuuint64_t>(m.matrix_bytes)};
  const std::array<cuuint32_t, 3> box{kTile, kTile, 1}, steps{1, 1, 1};
  const CUresult error = tensor_map_encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(m.data), sizes.data(), strides.data(), box.data(), steps.data(),
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FLOWSEG_CHECK(error == CUDA_SUCCESS, "neural_field: cuTensorMapEncodeTiled failed with error ", static_cast<int>(error), " for ",
                m.count, " matrices of ", m.rows, " rows and ", m.columns, " columns at ", m.data);
  return map;
}

// Launches of kernels that copy by TMA.
class HopperLaunch : public Launch {
 public:
  using Launch::Launch;

  // Maps depend on nothing but the arguments. The latest are kept: training makes the same ones again and again.
  TensorMap tensor_map(const Matrices& m) const {
    constexpr size_t kMostMaps = 256;
    static std::mutex mutex;
    static std::map<std::array<int64_t, 6>, TensorMap> known;
    const std::array key{static_cast<int64_t>(reinterpret_cast<intptr_t>(m.data)), m.columns, m.rows, m.count, m.row_bytes,
                         m.matrix_bytes};
    const std::lock_guard lock(mutex);
    if (const auto found = known.find(key); found != known.end()) return found->second;
    const TensorMap map = encode_tensor_map(m);
    if (known.size() >= kMostMaps) known.clear();
    return known.emplace(key, map).first->second;
  }
};

}  // namespace flowseg::cuda
