// Asynchronous copies between global and shared memory on Hopper (TMA), and the barriers in shared memory that they complete.
//
// A thread's own writes to shared memory are visible to copies and to products only after fence_async().
// A build for the host includes its own definitions before this file.
#pragma once

#include <cstdint>

#include "cuda/hopper/tile.h"

#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_runtime.h>

#define FLOWSEG_GRID_CONSTANT const __grid_constant__

namespace flowseg::cuda {

using TensorMap = CUtensorMap;  // Launch::tensor_map makes one from Matrices

// The address of something in shared memory, in bytes. Valid for arithmetic; alignment too must be computed with it.
__device__ __forceinline__ uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// A barrier: a phase ends when `arrivals` threads have arrived and all expected bytes have come. Waiting for the parity of a phase
// returns once that phase has ended; the first phase has parity 0. Waiting for parity 1 of a new barrier returns at once.
struct Barrier {
  uint64_t state;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // Arrives, and lets the phase wait for `bytes` more bytes of copies.
  __device__ __forceinline__ void arrive_and_expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes) : "memory");
  }
  __device__ __forceinline__ void wait(int parity) {
    const uint32_t at = shared_address(this);
    uint32_t done;
    do {
      asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
                   : "=r"(done) : "r"(at), "r"(parity) : "memory");
    } while (!done);
  }
};
// After init() and before any other use, followed by __syncthreads().
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Makes the thread's writes to shared memory visible to later copies and products.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Orders the thread's own copies to and from global memory: after wait_for_copies() and before a copy that reads what was written.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// One tile of a matrix from global to shared memory, its first column and row given; completes kTileBytes of `barrier`.
__device__ __forceinline__ void load_tile(uint32_t to, const TensorMap& map, Barrier& barrier, int column, int row, int matrix) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(matrix) : "memory");
}
// The other way. Belongs to the thread's current group of copies.
__device__ __forceinline__ void store_tile(const TensorMap& map, uint32_t from, int column, int row, int matrix) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map), "r"(from),
               "r"(column), "r"(row), "r"(matrix) : "memory");
}
// Contiguous bytes, a multiple of 16, both addresses multiples of 16.
__device__ __forceinline__ void load_bytes(uint32_t to, const void* from, Barrier& barrier, int bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(shared_address(&barrier)) : "memory");
}
__device__ __forceinline__ void store_bytes(void* to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
// Ends a group of the thread's stores.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most kPending of the thread's groups of stores have not yet read shared memory.
template <int kPending>
__device__ __forceinline__ void wait_for_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// The same, until they are complete and visible to this thread.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// A barrier of kThreads threads of the block; 0 is __syncthreads' own.
template <int kId, int kThreads_>
__device__ __forceinline__ void named_barrier() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads_) : "memory");
}

}  // namespace flowseg::cuda
#endif  // __CUDACC__
