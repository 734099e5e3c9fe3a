// A small kernel with everything that the kernels of the neural field use: loads into stages, scaling in place, products, stores.
// It tests the host build itself, which must also find the faults that are planted in it.
//
// An item has the matrices X (64, 64) and W. V is W with column n times 1 + n % 3. The item's first result tile is X V + X V^T, its
// second one X^T V.
#pragma once

#include "cuda/block.cuh"
#include "cuda/hopper/async.cuh"
#include "cuda/hopper/wgmma.cuh"

namespace flowseg::cuda {

constexpr int kPipelineThreads = 384, kPipelineStages = 2;

struct PipelineParams {
  const char* x;    // of each item a tile, laid out as tile_offset says
  TensorMap w, out; // of each item one matrix, two matrices
  int items;
};

struct PipelineShared {
  alignas(1024) char x[kPipelineStages][kTileBytes], w[kPipelineStages][kTileBytes], staged[2][kTileBytes];
  Barrier full[kPipelineStages], ready[kPipelineStages], empty[kPipelineStages];
};

// The address of this lane's row of the four matrices of rows 16 `down` and columns 16 `right` of a tile. With `swizzled` false,
// as if the tile were not swizzled.
__device__ __forceinline__ uint32_t matrices_at(uint32_t tile, int down, int right, bool swizzled = true) {
  const uint32_t lane = threadIdx.x % 32, row = down * 16 + lane % 16, column = right * 16 + lane / 16 * 8;
  return tile + (swizzled ? tile_offset(row, column) : row * kTileRowBytes + column * 2);
}

__device__ __forceinline__ void pipeline_load(const PipelineParams& a, PipelineShared& s) {
  int step = 0;
  for (int item = blockIdx.x; item < a.items; item += gridDim.x, ++step) {
    const int stage = step % kPipelineStages;
    s.empty[stage].wait((step / kPipelineStages & 1) ^ 1);
    s.full[stage].arrive_and_expect(2 * kTileBytes);
    load_bytes(shared_address(s.x[stage]), a.x + int64_t{item} * kTileBytes, s.full[stage], kTileBytes);
    load_tile(shared_address(s.w[stage]), a.w, s.full[stage], 0, 0, item);
  }
}

template <class T>
__device__ __forceinline__ void pipeline_scale(const PipelineParams& a, PipelineShared& s) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  int step = 0;
  for (int item = blockIdx.x; item < a.items; item += gridDim.x, ++step) {
    const int stage = step % kPipelineStages;
    s.full[stage].wait(step / kPipelineStages & 1);
    for (int right = 0; right < 4; ++right) {
      const uint32_t at = matrices_at(shared_address(s.w[stage]), warp, right, !FLOWSEG_PLANTED(swizzle));
      uint32_t r[4];
      load_matrices(r, at);
      for (int m = 0; m < 4; ++m) {
        const int column = right * 16 + m / 2 * 8 + 2 * (lane % 4);
        const float first = static_cast<float>(1 + column % 3), second = static_cast<float>(1 + (column + 1) % 3);
        r[m] = T::pack(T::low(r[m]) * first, T::high(r[m]) * second);
      }
      store_matrices(at, r);
    }
    if (!FLOWSEG_PLANTED(proxy_fence)) fence_async();
    __syncwarp();
    if (lane == 0) s.ready[stage].arrive();
  }
}

// Packs the accumulators of a thread into fragments and stores them to a tile.
template <class T>
__device__ __forceinline__ void stage_result(const float (&d)[32], uint32_t tile) {
  for (int right = 0; right < 4; ++right) {
    uint32_t r[4];
    for (int m = 0; m < 4; ++m) r[m] = T::pack(d[8 * right + 2 * m], d[8 * right + 2 * m + 1]);
    store_matrices(matrices_at(tile, threadIdx.x / 32 % 4, right), r);
  }
}

template <class T>
__device__ __forceinline__ void pipeline_multiply(const PipelineParams& a, PipelineShared& s) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const bool leads = threadIdx.x % 128 == 0;
  int step = 0;
  for (int item = blockIdx.x; item < a.items; item += gridDim.x, ++step) {
    const int stage = step % kPipelineStages, parity = step / kPipelineStages & 1;
    const uint32_t x = descriptor_low(shared_address(s.x[stage])), w = descriptor_low(shared_address(s.w[stage]));
    uint32_t fragments[16];
    float pq[32], r[32];
    s.full[stage].wait(parity);
    for (int k = 0; k < 4; ++k) load_matrices(fragments + 4 * k, matrices_at(shared_address(s.x[stage]), warp, k));
    s.ready[stage].wait(parity);
    wgmma_fence();
    for (int k = 0; k < 4; ++k) {
      if (k == 0) {
        wgmma_first<T, true>(pq, fragments, descriptor(w));
      } else if (FLOWSEG_PLANTED(transposed)) {
        wgmma<T, false>(pq, fragments + 4 * k, descriptor(w, kRowStep * k));
      } else {
        wgmma<T, true>(pq, fragments + 4 * k, descriptor(w, kRowStep * k));
      }
      wgmma<T, false>(pq, fragments + 4 * k, descriptor(w, kColumnStep * k));
    }
    wgmma_commit();
    for (int k = 0; k < 4; ++k) wgmma_tiles<T, true, true>(r, descriptor(x, kRowStep * k), descriptor(w, kRowStep * k), k != 0);
    wgmma_commit();
    if (leads) wait_for_reads<0>();  // of the previous item's results
    named_barrier<1, 128>();
    if (FLOWSEG_PLANTED(wait_group)) wgmma_wait<2>(); else wgmma_wait<1>();
    settle(pq);
    stage_result<T>(pq, shared_address(s.staged[0]));
    if (FLOWSEG_PLANTED(early_load) && lane == 0) s.empty[stage].arrive();
    wgmma_wait<0>();
    settle(r);
    if (!FLOWSEG_PLANTED(early_load) && lane == 0) s.empty[stage].arrive();
    stage_result<T>(r, shared_address(s.staged[1]));
    fence_async();
    named_barrier<1, 128>();
    if (leads) {
      for (int i = 0; i < 2; ++i) store_tile(a.out, shared_address(s.staged[i]), 0, 0, 2 * item + i);
      commit_copies();
    }
  }
  if (leads) wait_for_reads<0>();
}

template <class T>
__global__ void __launch_bounds__(kPipelineThreads, 1) pipeline(FLOWSEG_GRID_CONSTANT PipelineParams a) {
  FLOWSEG_DYNAMIC_SHARED(char, raw);
  PipelineShared& s = *reinterpret_cast<PipelineShared*>(raw + (-shared_address(raw) & 1023));
  const int group = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPipelineStages; ++i) {
      s.full[i].init(1);
      s.ready[i].init(4);
      s.empty[i].init(4);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (group == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) pipeline_load(a, s);
  } else if (group == 1) {
    give_registers<40>();
    pipeline_scale<T>(a, s);
  } else {
    take_registers<232>();
    pipeline_multiply<T>(a, s);
  }
}

}  // namespace flowseg::cuda
