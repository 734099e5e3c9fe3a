// Runs CUDA kernels on the host, one thread (block_threads.h) per CUDA thread, to test the same kernel sources without a GPU, also
// under ThreadSanitizer and AddressSanitizer. The build includes this header before every other one.
//
// Blocks run one after the other. Static shared memory is static memory, __syncthreads is a barrier of the block, and warp
// operations exchange values at a barrier of 32 threads. Only the parts of CUDA that csrc/cuda uses are defined.
#pragma once

#define FLOWSEG_GPU_ROUNDING

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
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
#define FLOWSEG_ROUND_PATCHES 8  // two groups
#define FLOWSEG_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(flowseg::host::dynamic_shared())

#ifdef FLOWSEG_PLANTS
namespace flowseg::host {
// `race` to `list` are in the kernels of the loss and the decode, the others in kernels with asynchronous copies and products.
enum class Fault { none, race, overrun, histogram, list, axes, members, swizzle, proxy_fence, early_load, transposed, wait_group };
inline Fault planted = Fault::none;
// The fault of a name; none for any other name.
inline Fault fault_named(const std::string& name) {
  const std::pair<const char*, Fault> faults[] = {
      {"race", Fault::race},       {"overrun", Fault::overrun},         {"histogram", Fault::histogram},
      {"list", Fault::list},       {"axes", Fault::axes},               {"members", Fault::members},
      {"swizzle", Fault::swizzle},         {"proxy_fence", Fault::proxy_fence},
      {"early_load", Fault::early_load}, {"transposed", Fault::transposed}, {"wait_group", Fault::wait_group}};
  for (const auto& [own, fault] : faults) {
    if (name == own) return fault;
  }
  return Fault::none;
}
// The only launch that runs the fault, 0 the first since `launches` was 0; -1: all.
inline int planted_launch = -1, launches = 0;
}  // namespace flowseg::host
#define FLOWSEG_PLANTED(fault) (flowseg::host::planted == flowseg::host::Fault::fault)
#endif

namespace flowseg::host {

constexpr int kThreads = FLOWSEG_THREADS, kLanes = 32;
static_assert(kThreads % kLanes == 0);

struct Asynchronous;  // hopper_on_host.h

// A value that a thread publishes to the others.
struct alignas(16) Value {
  char bytes[16];
};

struct Block {
  unsigned threads;
  ThreadBarrier all;
  std::vector<std::unique_ptr<ThreadBarrier>> warps;
  // Values of exchange(): those of two exchanges, so that one barrier is enough.
  std::vector<Value> in_block[2], in_warp[2];
  std::vector<unsigned> exchanges_in_block, exchanges_in_warp;
  std::unique_ptr<Asynchronous> asynchronous;

  Block(unsigned count, size_t shared);
  ~Block();
};
inline Block* block = nullptr;
// The block's dynamic shared memory.
char* dynamic_shared();
// The end of a thread and of a block: remaining copies, and checks.
void end_thread();
void end_block();
// A launch runs only its last `last_blocks` blocks. Tests of huge images compute only the end of the image.
inline int64_t last_blocks = int64_t{1} << 62;

// Every thread that waits at `barrier` publishes `own`. Each thread then returns use(value), where value(i) is the value that
// thread first + i published.
template <class T, class Use>
auto exchange(ThreadBarrier& barrier, std::vector<Value> (&values)[2], unsigned& exchanges, bool orders, int first, T own,
              Use use) {
  static_assert(sizeof(T) <= sizeof(Value));
  std::vector<Value>& now = values[exchanges++ % 2];
  {
    const Unwatched unwatched;
    std::memcpy(now[threadIdx.x].bytes, &own, sizeof own);
  }
  barrier.arrive_and_wait(orders);
  return use([&](int i) {
    const Unwatched unwatched;
    T v;
    std::memcpy(&v, now[first + i].bytes, sizeof v);
    return v;
  });
}
template <class T, class Use>
auto exchange_in_block(T own, Use use) {
  return exchange(block->all, block->in_block, block->exchanges_in_block[threadIdx.x], true, 0, own, use);
}
template <class T, class Use>
auto exchange_in_warp(T own, Use use) {
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  // No operation on a warp's values orders accesses to memory: that is __syncwarp.
  return exchange(*block->warps[warp], block->in_warp, block->exchanges_in_warp[threadIdx.x], false, warp * kLanes, own, use);
}

constexpr size_t kMostShared = 227 * 1024;  // dynamic, of a block on Hopper

// Runs kernel(arguments...) on `blocks` blocks of `threads` threads.
template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), int64_t threads, int64_t blocks, size_t shared, const Arguments&... arguments) {
  if (shared > kMostShared) failure = "a launch with more shared memory than a block may have";
  if (!failure.empty()) return;
#ifdef FLOWSEG_PLANTS
  const Fault fault = planted;
  if (launches++ != planted_launch && planted_launch >= 0) planted = Fault::none;
#endif
  Block state(static_cast<unsigned>(threads), shared);
  block = &state;
  run_threads(state.threads, [&] {
    for (int64_t b = blocks > last_blocks ? blocks - last_blocks : 0; b < blocks; ++b) {
      blockIdx.x = static_cast<unsigned>(b);
      gridDim.x = static_cast<unsigned>(blocks);
      kernel(arguments...);
      end_thread();
      state.all.arrive_and_wait(true, end_block);
    }
  });
  block = nullptr;
#ifdef FLOWSEG_PLANTS
  planted = fault;
#endif
}

}  // namespace flowseg::host

inline void __syncthreads() { flowseg::host::block->all.arrive_and_wait(); }
inline int __syncthreads_and(int own) {
  return flowseg::host::exchange_in_block(own, [](auto value) {
    bool all = true;
    for (unsigned i = 0; i < flowseg::host::block->threads; ++i) all = all && value(i);
    return static_cast<int>(all);
  });
}
inline int __syncthreads_count(int own) {
  return flowseg::host::exchange_in_block(own, [](auto value) {
    int count = 0;
    for (unsigned i = 0; i < flowseg::host::block->threads; ++i) count += value(i) != 0;
    return count;
  });
}
inline void __syncwarp(unsigned = 0xffffffffu) { flowseg::host::block->warps[threadIdx.x / 32]->arrive_and_wait(); }
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
  return flowseg::host::exchange_in_warp(own, [&](auto value) { return value(lane % flowseg::host::kLanes); });
}
template <class T>
T __shfl_xor_sync(unsigned, T own, int mask) {
  return flowseg::host::exchange_in_warp(own, [&](auto value) { return value((threadIdx.x % flowseg::host::kLanes) ^ mask); });
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
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
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

#include "hopper_on_host.h"
