// decode_confusion on a GPU: decodes and counts in one pass, without a label map.
#pragma once

#include <algorithm>

#include "cuda/decode.cuh"
#include "cuda/decode_guesses.cuh"
#include "cuda/params.h"

namespace flowseg::cuda {

// A block counts in 16-bit counters in shared memory, two per word. So it must process fewer than 65,536 pixels. If the counters do
// not fit, blocks count in global memory. Sums of integers do not depend on the order of the additions.
constexpr int kMaxPixelsPerBlock = 32768;
// Counters by class stay below this size. More would leave room for few blocks, and each block adds all of its counters at its end.
constexpr int64_t kMostClassBytes = 24 * 1024;

struct ConfusionParams {
  InputImage x;        // (B, C, H, W)
  InputLabels target;  // (B, H, W)
  InputCodes codes;    // (K, C)
  Tables tables;
  unsigned long long* counts;  // (K, K) pairs, or (3, K) hits, truths and predictions; zero before the launch
  bool by_class = false;       // (3, K)
  Tiling tiling{};
};

// Counters of a block by class: hits, missed truths and wrong predictions. Most pixels are hits, which then take one addition.
FLOWSEG_INLINE int64_t counters_of(const ConfusionParams& a) {
  return (a.by_class ? int64_t{3} : int64_t{a.codes.classes}) * a.codes.classes;
}
inline int64_t counter_bytes(const ConfusionParams& a) { return (counters_of(a) + 1) / 2 * 4; }
inline bool counters_fit(const ConfusionParams& a, int64_t other_bytes, const Device& device) {
  return counter_bytes(a) + other_bytes <= device.shared_block && (!a.by_class || counter_bytes(a) <= kMostClassBytes);
}

__device__ __forceinline__ void add_shared(unsigned* counts, int cell, unsigned n) {
  atomicAdd(&counts[cell / 2], cell % 2 ? n << 16 : n);
}
__device__ __forceinline__ void add_global(const ConfusionParams& a, int64_t cell, unsigned n) {
  atomicAdd(&a.counts[cell], static_cast<unsigned long long>(n));
}

// Counts n pixels of class y that decode to `label`.
template <bool kShared>
__device__ __forceinline__ void add(const ConfusionParams& a, unsigned* counts, int y, int label, unsigned n) {
  const int classes = a.codes.classes;
  if (!a.by_class) {
    if constexpr (kShared) {
      add_shared(counts, y * classes + label, n);
    } else {
      add_global(a, static_cast<int64_t>(y) * classes + label, n);
    }
  } else if constexpr (kShared) {
    if (y == label) {
      add_shared(counts, y, n);
    } else {
      add_shared(counts, classes + y, n);
      add_shared(counts, 2 * classes + label, n);
    }
  } else {
    if (y == label) add_global(a, y, n);
    add_global(a, int64_t{classes} + y, n);
    add_global(a, 2 * int64_t{classes} + label, n);
  }
}

// Adds a counter of the block to the result.
__device__ __forceinline__ void flush(const ConfusionParams& a, int cell, unsigned n) {
  if (n == 0) return;
  add_global(a, cell, n);
  if (a.by_class && cell < a.codes.classes) {  // a hit is a truth and a prediction too
    add_global(a, int64_t{a.codes.classes} + cell, n);
    add_global(a, 2 * int64_t{a.codes.classes} + cell, n);
  }
}

// Counts the pairs (target, label) of a run. Atomic additions to one address are serialised, and most pixels of a warp usually
// belong to the same pair. So the warp chooses a common pair, that of the first lane with two equal neighbours, counts it by
// ballots and adds it once.
template <bool kShared, int P>
__device__ __forceinline__ void count(const ConfusionParams& a, unsigned* counts, const int (&y)[P], const int (&label)[P]) {
  const auto counts_at = [&](int p) { return y[p] >= 0 && label[p] >= 0; };
  constexpr int kNext = P > 1 ? 1 : 0;
  const unsigned agree = __ballot_sync(kAllLanes, counts_at(0) && y[0] == y[kNext] && label[0] == label[kNext]);
  const int lane = agree ? __ffs(static_cast<int>(agree)) - 1 : 0;
  const int common_y = __shfl_sync(kAllLanes, y[0], lane), common_label = __shfl_sync(kAllLanes, label[0], lane);
  int same = 0;
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const bool is_common = y[p] == common_y && label[p] == common_label;
    same += __popc(__ballot_sync(kAllLanes, is_common));
    if (!is_common && counts_at(p)) add<kShared>(a, counts, y[p], label[p], 1);
  }
  if (common_y >= 0 && common_label >= 0 && threadIdx.x % 32 == 0) {
    add<kShared>(a, counts, common_y, common_label, static_cast<unsigned>(same));
  }
}

// Calls visit(use), which calls use(y, label) with the classes of each run of the block, and counts them.
template <int kBlock, bool kShared, class Visit>
__device__ __forceinline__ void count_all(const ConfusionParams& a, unsigned* counts, Visit visit) {
  const int words = kShared ? static_cast<int>((counters_of(a) + 1) / 2) : 0;
  if constexpr (kShared) {
    for (int i = threadIdx.x; i < words; i += kBlock) counts[i] = 0;
    __syncthreads();
  }
  visit([&](const auto& y, const auto& label) { count<kShared>(a, counts, y, label); });
  if constexpr (kShared) {
    if (!FLOWSEG_PLANTED(histogram)) __syncthreads();
    for (int i = threadIdx.x; i < words; i += kBlock) {
      const unsigned two = counts[i];
      flush(a, 2 * i, two & 0xffff);
      flush(a, 2 * i + 1, two >> 16);
    }
  }
}

// Calls find(run, y, label) for each run of the block's pixels and counts the pairs that it returns.
template <int kBlock, int P, bool kShared, class Find>
__device__ __forceinline__ void count_pixels(const ConfusionParams& a, unsigned* counts, Find find) {
  count_all<kBlock, kShared>(a, counts, [&](auto use) {
    for_each_run<kBlock, P>(a.tiling, a.x.height * a.x.width, [&](const PixelRun& run) {
      int y[P], label[P];
      find(run, y, label);
      use(y, label);
    });
  });
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

template <int C>
constexpr int kGuessBlocks = C > 8 ? 3 : 4;  // per multiprocessor, as above

template <class T, int C, bool kShared>
__global__ void __launch_bounds__(kThreads, kGuessBlocks<C>) confusion_by_guesses(const ConfusionParams a) {
  FLOWSEG_CODE_TILE(T, C, tile);
  FLOWSEG_AXES(C, axes);
  FLOWSEG_DYNAMIC_SHARED(unsigned, counts);
  stage_axes<C>(a.tables.guesses, a.codes.channels, axes);
  const GuessTables<C> tables{a.codes, a.tables.guesses, axes};
  count_all<kThreads, kShared>(a, counts, [&](auto use) {
    for_each_run<kThreads, kGuessPixels<C>>(a.tiling, a.x.height * a.x.width, [&](const PixelRun& tile_run) {
      prefetch_labels(a.target, tile_run);
      decode_tile<false, true>(tables, a.x, tile, tile_run, [&]<int P>(const PixelRun& run, const int (&label)[P], auto&, auto&) {
        int y[P];
        load_labels(a.target, a.codes.classes, run, y);
        use(y, label);
      });
    });
  });
}

template <class Launch>
void launch_confusion(ConfusionParams a, const Launch& launch) {
  const Device device = launch.device();
  const bool by_grid = a.tables.grid.cells && a.x.type != Real::f64, words = by_grid && has_words(a.codes);
  const int64_t code_bytes = by_grid ? staged_bytes(a.codes) : 0;
  const int64_t dynamic_bytes = counter_bytes(a) + code_bytes;
  const bool by_guesses = has_guesses(a.tables.guesses, a.x);
  const int64_t tile_bytes = by_grid ? 0 : kCodeTileBytes + (by_guesses ? kMostAxisBytes : 0);  // static
  const int64_t block_bytes = dynamic_bytes + tile_bytes;
  const bool shared = counters_fit(a, code_bytes + tile_bytes, device) && (words || !by_grid);
  const auto launch_kernel = [&](auto kernel, int64_t threads, int64_t pixels_per_thread, int64_t most_blocks = INT32_MAX) {
    // The system reserves 1 KiB of shared memory per block. A search needs up to 128 registers per thread, twice those of Device.
    const int64_t by_memory = shared ? device.shared_multiprocessor / (block_bytes + 1024) : device.threads;
    const int64_t by_registers = std::min(most_blocks, device.threads / (by_grid ? threads : 2 * threads));
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
  if (by_guesses) {
    return for_guessed_channels(a.codes.channels, [&]<class T, int C>() {
      launch_kernel(shared ? confusion_by_guesses<T, C, true> : confusion_by_guesses<T, C, false>, kThreads, kGuessPixels<C>,
                    kGuessBlocks<C>);
    });
  }
  for_type_and_channels(a.x.type, a.codes.channels, [&]<class T, int C>() {
    launch_kernel(shared ? confusion_by_search<T, C, true> : confusion_by_search<T, C, false>, kThreads, kSearchPixels<T, C>);
  });
}

}  // namespace flowseg::cuda
