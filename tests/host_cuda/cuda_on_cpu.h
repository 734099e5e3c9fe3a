// Runs CUDA kernels on a CPU, a host thread for each CUDA thread: so that the very kernels can be tested, also under ThreadSanitizer
// and AddressSanitizer, where there is no GPU.
//
// Blocks run one after the other; shared memory is static memory, __syncthreads a std::barrier of the block, and warp operations
// exchange values between barriers of 32 threads. It holds what the kernels of csrc/cuda use and no more.
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define FLOWSEG_INLINE inline
#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#ifndef FLOWSEG_THREADS
#define FLOWSEG_THREADS 64  // two warps
#endif
#define FLOWSEG_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(flowseg::emu::block->dynamic_shared.get())

#ifdef FLOWSEG_PLANTS
namespace flowseg::emu {
enum class Fault { none, race, overrun, histogram, list };
inline Fault planted = Fault::none;
}  // namespace flowseg::emu
#define FLOWSEG_PLANTED(fault) (flowseg::emu::planted == flowseg::emu::Fault::fault)
#endif

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx, gridDim;

namespace flowseg::emu {

constexpr int kThreads = FLOWSEG_THREADS, kLanes = 32;
static_assert(kThreads % kLanes == 0);

struct Block {
  std::barrier<> all{kThreads};
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  uint64_t value[kThreads];  // what each thread shows the others
  std::unique_ptr<char[]> dynamic_shared;

  explicit Block(size_t shared) : dynamic_shared(new char[shared]) {
    for (int w = 0; w < kThreads / kLanes; ++w) warps.push_back(std::make_unique<std::barrier<>>(kLanes));
  }
};
inline Block* block = nullptr;
inline int64_t last_blocks = int64_t{1} << 62;  // so many of a grid run: the end of an image that is too large to run all of it

// Every thread of [first, first + count) shows `own`; then each calls use(values of all of them).
template <class T, class Use>
auto exchange(std::barrier<>& barrier, int first, T own, Use use) {
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

// kernel(arguments...) on `blocks` blocks.
template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), int64_t blocks, size_t shared, const Arguments&... arguments) {
  Block state(shared);
  block = &state;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      threadIdx.x = t;
      for (int64_t b = blocks > last_blocks ? blocks - last_blocks : 0; b < blocks; ++b) {
        blockIdx.x = static_cast<unsigned>(b);
        gridDim.x = static_cast<unsigned>(blocks);
        kernel(arguments...);
        state.all.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  block = nullptr;
}

}  // namespace flowseg::emu

inline void __syncthreads() { flowseg::emu::block->all.arrive_and_wait(); }
inline int __syncthreads_and(int own) {
  using namespace flowseg::emu;
  return exchange(block->all, 0, own, [](auto value) {
    bool all = true;
    for (int i = 0; i < kThreads; ++i) all = all && value(i);
    return static_cast<int>(all);
  });
}
inline int __any_sync(unsigned, int own) {
  return flowseg::emu::exchange_in_warp(own, [](auto value) {
    bool any = false;
    for (int i = 0; i < flowseg::emu::kLanes; ++i) any = any || value(i);
    return static_cast<int>(any);
  });
}
inline unsigned __ballot_sync(unsigned, int own) {
  return flowseg::emu::exchange_in_warp(own, [](auto value) {
    unsigned set = 0;
    for (int i = 0; i < flowseg::emu::kLanes; ++i) set |= static_cast<unsigned>(value(i) != 0) << i;
    return set;
  });
}
template <class T>
T __shfl_sync(unsigned, T own, int lane) {
  return flowseg::emu::exchange_in_warp(own, [&](auto value) { return value(lane); });
}

inline int __all_sync(unsigned all, int own) { return !__any_sync(all, !own); }
template <class T>
T __shfl_down_sync(unsigned, T own, int step) {
  return flowseg::emu::exchange_in_warp(own, [&](auto value) {
    const int lane = static_cast<int>(threadIdx.x) % flowseg::emu::kLanes;
    return value(lane + step < flowseg::emu::kLanes ? lane + step : lane);
  });
}
inline unsigned __reduce_max_sync(unsigned, unsigned own) {
  return flowseg::emu::exchange_in_warp(own, [](auto value) {
    unsigned most = 0;
    for (int i = 0; i < flowseg::emu::kLanes; ++i) most = value(i) > most ? value(i) : most;
    return most;
  });
}
template <class T>
unsigned __match_any_sync(unsigned, T own) {
  return flowseg::emu::exchange_in_warp(own, [&](auto value) {
    unsigned same = 0;
    for (int i = 0; i < flowseg::emu::kLanes; ++i) same |= static_cast<unsigned>(value(i) == own) << i;
    return same;
  });
}
// Rounded down; for sums whose double is exact or lies as the exact one does.
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

// rcp.approx.ftz.f32 may be 1 ulp off: this is off by one, to either side, for two thirds of all arguments, so that what is accurate
// here is accurate there.
inline float emulated_reciprocal(float v) {
  if (std::fabs(v) < 1.17549435e-38f) v = std::copysign(0.0f, v);
  const float r = 1.0f / v;
  if (!std::isnormal(r)) return std::isnan(r) || std::isinf(r) ? r : std::copysign(0.0f, r);
  uint32_t bits;
  std::memcpy(&bits, &r, sizeof bits);
  bits += (bits * 2654435761u >> 16) % 3 - 1;
  float off;
  std::memcpy(&off, &bits, sizeof off);
  return off;
}

}  // namespace flowseg
