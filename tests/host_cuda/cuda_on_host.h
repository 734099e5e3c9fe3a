// Runs CUDA kernels on the host, one thread (block_threads.h) per CUDA thread, to test the same kernel sources without a GPU, also
// under ThreadSanitizer and AddressSanitizer. The build includes this header before every other one.
//
// Blocks run one after the other. Shared memory is static memory, __syncthreads is a barrier of the block, and warp operations
// exchange values between two barriers of 32 threads. Only the parts of CUDA that csrc/cuda uses are defined.
#pragma once

#define FLOWSEG_GPU_ROUNDING

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "block_threads.h"

#define FLOWSEG_INLINE inline
#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#ifndef FLOWSEG_THREADS
#define FLOWSEG_THREADS 64  // two warps
#endif
#define FLOWSEG_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(flowseg::host::block->dynamic_shared.get())

#ifdef FLOWSEG_PLANTS
namespace flowseg::host {
enum class Fault { none, race, overrun, histogram, list };
inline Fault planted = Fault::none;
}  // namespace flowseg::host
#define FLOWSEG_PLANTED(fault) (flowseg::host::planted == flowseg::host::Fault::fault)
#endif

namespace flowseg::host {

constexpr int kThreads = FLOWSEG_THREADS, kLanes = 32;
static_assert(kThreads % kLanes == 0);

struct Block {
  Barrier all{kThreads};
  std::vector<std::unique_ptr<Barrier>> warps;
  uint64_t value[kThreads];  // one value per thread, for exchange()
  std::unique_ptr<char[]> dynamic_shared;

  explicit Block(size_t shared) : dynamic_shared(new char[shared]) {
    for (int w = 0; w < kThreads / kLanes; ++w) warps.push_back(std::make_unique<Barrier>(kLanes));
  }
};
inline Block* block = nullptr;
// A launch runs only its last `last_blocks` blocks. Tests of huge images compute only the end of the image.
inline int64_t last_blocks = int64_t{1} << 62;

// Every thread that waits at `barrier` publishes `own`. Each thread then returns use(value), where value(i) is the value that
// thread first + i published.
template <class T, class Use>
auto exchange(Barrier& barrier, int first, T own, Use use) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &own, sizeof own);
  block->value[threadIdx.x] = bits;
  barrier.arrive_and_wait();
  const auto result = use([&](int i) {
    T v;
    std::memcpy(&v, &block->value[first + i], sizeof v);
    return v;
  });
  barrier.arrive_and_wait();
  return result;
}
template <class T, class Use>
auto exchange_in_warp(T own, Use use) {
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  return exchange(*block->warps[warp], warp * kLanes, own, use);
}

// Runs kernel(arguments...) on `blocks` blocks.
template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), int64_t blocks, size_t shared, const Arguments&... arguments) {
  Block state(shared);
  block = &state;
  run_threads(kThreads, [&] {
    for (int64_t b = blocks > last_blocks ? blocks - last_blocks : 0; b < blocks; ++b) {
      blockIdx.x = static_cast<unsigned>(b);
      gridDim.x = static_cast<unsigned>(blocks);
      kernel(arguments...);
      state.all.arrive_and_wait();
    }
  });
  block = nullptr;
}

}  // namespace flowseg::host

inline void __syncthreads() { flowseg::host::block->all.arrive_and_wait(); }
inline int __syncthreads_and(int own) {
  using namespace flowseg::host;
  return exchange(block->all, 0, own, [](auto value) {
    bool all = true;
    for (int i = 0; i < kThreads; ++i) all = all && value(i);
    return static_cast<int>(all);
  });
}
inline int __any_sync(unsigned, int own) {
  return flowseg::host::exchange_in_warp(own, [](auto value) {
    bool any = false;
    for (int i = 0; i < flowseg::host::kLanes; ++i) any = any || value(i);
    return static_cast<int>(any);
  });
}
inline unsigned __ballot_sync(unsigned, int own) {
  return flowseg::host::exchange_in_warp(own, [](auto value) {
    unsigned set = 0;
    for (int i = 0; i < flowseg::host::kLanes; ++i) set |= static_cast<unsigned>(value(i) != 0) << i;
    return set;
  });
}
template <class T>
T __shfl_sync(unsigned, T own, int lane) {
  return flowseg::host::exchange_in_warp(own, [&](auto value) { return value(lane); });
}

inline int __all_sync(unsigned all, int own) { return !__any_sync(all, !own); }
template <class T>
T __shfl_down_sync(unsigned, T own, int step) {
  return flowseg::host::exchange_in_warp(own, [&](auto value) {
    const int lane = static_cast<int>(threadIdx.x) % flowseg::host::kLanes;
    return value(lane + step < flowseg::host::kLanes ? lane + step : lane);
  });
}
inline unsigned __reduce_max_sync(unsigned, unsigned own) {
  return flowseg::host::exchange_in_warp(own, [](auto value) {
    unsigned most = 0;
    for (int i = 0; i < flowseg::host::kLanes; ++i) most = value(i) > most ? value(i) : most;
    return most;
  });
}
inline unsigned __reduce_min_sync(unsigned all, unsigned own) { return ~__reduce_max_sync(all, ~own); }
// a + b rounded down. Correct if the sum in double is exact or lies on the same side of the float as the exact sum.
inline float __fadd_rd(float a, float b) {
  const float sum = a + b;
  return static_cast<double>(sum) - b > a ? std::nextafter(sum, -INFINITY) : sum;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }

template <class T>
T atomicAdd(T* at, T v) {
  return std::atomic_ref<T>(*at).fetch_add(v, std::memory_order_relaxed);
}
inline unsigned atomicMax(unsigned* at, unsigned v) {
  std::atomic_ref<unsigned> value(*at);
  unsigned seen = value.load(std::memory_order_relaxed);
  while (seen < v && !value.compare_exchange_weak(seen, v, std::memory_order_relaxed)) {
  }
  return seen;
}

namespace flowseg {

// 1 / v with the largest error that rcp.approx.ftz.f32 may have: for two thirds of all arguments the result is 1 ulp off, to either
// side. So an error test that passes here covers a GPU's reciprocal.
inline float inexact_reciprocal(float v) {
  if (std::fabs(v) < 1.17549435e-38f) v = std::copysign(0.0f, v);
  const float r = 1.0f / v;
  if (!std::isnormal(r)) return std::isnan(r) || std::isinf(r) ? r : std::copysign(0.0f, r);
  uint32_t bits;
  std::memcpy(&bits, &r, sizeof bits);
  bits += (bits * 2654435761u >> 16) % 3 - 1;
  float moved;
  std::memcpy(&moved, &bits, sizeof moved);
  return moved;
}

}  // namespace flowseg
