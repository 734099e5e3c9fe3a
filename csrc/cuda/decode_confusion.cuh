// decode_confusion on a GPU: decodes and counts in one pass, without a label map.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/decode.cuh"
#include "cuda/params.h"

namespace flowseg::cuda {

// A block counts in 16-bit counters in shared memory, two per word. So it must process fewer than 65,536 pixels. If the histogram
// does not fit, blocks count in global memory. Sums of integers do not depend on the order of the additions.
constexpr int kMaxPixelsPerBlock = 32768;

struct ConfusionParams {
  InputImage x;        // (B, C, H, W)
  InputLabels target;  // (B, H, W)
  InputCodes codes;    // (K, C)
  Tables tables;
  unsigned long long* counts;  // (K, K), zero before the launch
  Tiling tiling{};
};

inline int64_t histogram_bytes(int64_t classes) { return (classes * classes + 1) / 2 * 4; }

template <bool kShared>
__device__ __forceinline__ void add(const ConfusionParams& a, unsigned* counts, int64_t cell, unsigned n) {
  if constexpr (kShared) {
    const auto at = static_cast<unsigned>(cell);
    atomicAdd(&counts[at / 2], at % 2 ? n << 16 : n);
  } else {
    atomicAdd(&a.counts[cell], static_cast<unsigned long long>(n));
  }
}

// Counts the pairs (target, label) of a run. Atomic additions to one address are serialised, and most pixels of a warp usually
// belong to the same pair. So the warp chooses a common pair, that of the first lane with two equal neighbours, counts it by
// ballots and adds it once.
template <bool kShared, int P>
__device__ __forceinline__ void count(const ConfusionParams& a, unsigned* counts, const int (&y)[P], const int (&label)[P]) {
  using Cell = std::conditional_t<kShared, int, int64_t>;
  Cell cell[P];
#pragma unroll
  for (int p = 0; p < P; ++p) {
    cell[p] = y[p] < 0 || label[p] < 0 ? Cell{-1} : static_cast<Cell>(y[p]) * a.codes.classes + label[p];
  }
  const unsigned agree = __ballot_sync(kAllLanes, cell[0] >= 0 && cell[0] == cell[P > 1 ? 1 : 0]);
  const Cell common = __shfl_sync(kAllLanes, cell[0], agree ? __ffs(static_cast<int>(agree)) - 1 : 0);
  int same = 0;
#pragma unroll
  for (int p = 0; p < P; ++p) {
    same += __popc(__ballot_sync(kAllLanes, cell[p] == common));
    if (cell[p] != common && cell[p] >= 0) add<kShared>(a, counts, cell[p], 1);
  }
  if (common >= 0 && threadIdx.x % 32 == 0) add<kShared>(a, counts, common, static_cast<unsigned>(same));
}

// Calls find(run, y, label) for each run of the block's pixels and counts the pairs that it returns.
template <int kBlock, int P, bool kShared, class Find>
__device__ __forceinline__ void count_pixels(const ConfusionParams& a, unsigned* counts, Find find) {
  const int words = kShared ? (a.codes.classes * a.codes.classes + 1) / 2 : 0;
  if constexpr (kShared) {
    for (int i = threadIdx.x; i < words; i += kBlock) counts[i] = 0;
    __syncthreads();
  }
  for_each_run<kBlock, P>(a.tiling, a.x.height * a.x.width, [&](const PixelRun& run) {
    int y[P], label[P];
    find(run, y, label);
    count<kShared>(a, counts, y, label);
  });
  if constexpr (kShared) {
    if (!FLOWSEG_PLANTED(histogram)) __syncthreads();
    for (int i = threadIdx.x; i < words; i += kBlock) {
      const unsigned two = counts[i];
      if (two & 0xffff) add<false>(a, counts, 2 * i, two & 0xffff);
      if (two >> 16) add<false>(a, counts, 2 * i + 1, two >> 16);
    }
  }
}

template <bool kShared, bool kWords, class S>
__global__ void __launch_bounds__(kGridThreads, 2) confusion_by_grid(const ConfusionParams a) {
  FLOWSEG_DYNAMIC_CODES(rows);
  if constexpr (kWords) stage_rows<kGridThreads>(a.codes, rows);
  auto* counts = reinterpret_cast<unsigned*>(rows + (kWords ? a.codes.classes : 0));
  constexpr int P = kLookupPixels;
  count_pixels<kGridThreads, P, kShared>(a, counts, [&](const PixelRun& run, int (&y)[P], int (&label)[P]) {
    RawPixels<S> x;
    x.load(a.x, run);  // loading the target overlaps with waiting for the pixels
    load_labels(a.target, a.codes.classes, run, y);
    look_up<kWords>(a.tables.grid, a.codes, rows, x, label);
  });
}

// Limited to four blocks per multiprocessor: ptxas would spill to fit more.
template <class T, int C, bool kShared>
__global__ void __launch_bounds__(kThreads, 4) confusion_by_search(const ConfusionParams a) {
  constexpr int P = kSearchPixels<T, C>;
  FLOWSEG_CODE_TILE(T, C, tile);
  FLOWSEG_DYNAMIC_SHARED(unsigned, counts);
  count_pixels<kThreads, P, kShared>(a, counts, [&](const PixelRun& run, int (&y)[P], int (&label)[P]) {
    load_labels(a.target, a.codes.classes, run, y);
    T x[C][P], nearest[P], second[P];
    load_points(a.x, a.codes.channels, run, x);
    search<false>(a.codes, tile, x, label, nearest, second);
  });
}

template <class Launch>
void launch_confusion(ConfusionParams a, const Launch& launch) {
  const Device device = launch.device();
  const bool by_grid = a.tables.grid.cells && a.x.type != Real::f64, words = by_grid && has_words(a.codes);
  const int64_t code_bytes = by_grid ? staged_bytes(a.codes) : 0;
  const int64_t dynamic_bytes = histogram_bytes(a.codes.classes) + code_bytes;
  const int64_t block_bytes = dynamic_bytes + (by_grid ? 0 : kCodeTileBytes);  // a search also has its static tile of centroids
  const bool shared = block_bytes <= device.shared_block && (words || !by_grid);
  const auto launch_kernel = [&](auto kernel, int64_t threads, int64_t pixels_per_thread) {
    // The system reserves 1 KiB of shared memory per block. A search needs up to 128 registers per thread, twice those of Device.
    const int64_t by_memory = shared ? device.shared_multiprocessor / (block_bytes + 1024) : device.threads;
    const int64_t by_registers = device.threads / (by_grid ? threads : 2 * threads);
    const int64_t resident_blocks = std::max<int64_t>(1, std::min(by_memory, by_registers)) * device.multiprocessors;
    const int64_t pixels_per_tile = threads * pixels_per_thread;
    a.tiling = tiling_of(a.x.batch, a.x.height * a.x.width, pixels_per_tile, resident_blocks, kMaxPixelsPerBlock / pixels_per_tile);
    launch.with_threads(threads, kernel, blocks_of(a.tiling), shared ? dynamic_bytes : code_bytes, a);
  };
  if (by_grid) {
    return for_half_or_float(a.x.type, [&]<class S>() {
      launch_kernel(shared  ? confusion_by_grid<true, true, S>
                    : words ? confusion_by_grid<false, true, S>
                            : confusion_by_grid<false, false, S>,
                    kGridThreads, kLookupPixels);
    });
  }
  for_type_and_channels(a.x.type, a.codes.channels, [&]<class T, int C>() {
    launch_kernel(shared ? confusion_by_search<T, C, true> : confusion_by_search<T, C, false>, kThreads, kSearchPixels<T, C>);
  });
}

}  // namespace flowseg::cuda
