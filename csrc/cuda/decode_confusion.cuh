// decode_confusion on a GPU: decode and count in one pass, without a label map.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/decode.cuh"
#include "cuda/dispatch.h"

namespace flowseg::cuda {

// Counts of a block are 16 bits wide, two in a word of shared memory; a block counts fewer than 65,536 pixels. More classes than
// have room there count in global memory. Sums of integers do not depend on the order.
constexpr int kMostCounted = 32768;  // pixels a block

struct Confusion {
  Source x;
  Labels target;
  Codes codes;
  Grid grid;
  unsigned long long* counts;  // (K, K), zero at first
  Parts parts;
};

inline int64_t shared_bytes(int64_t classes) { return (classes * classes + 1) / 2 * 4; }

template <bool kShared>
__device__ __forceinline__ void add(const Confusion& a, unsigned* counts, int64_t cell, unsigned n) {
  if constexpr (kShared) {
    const auto at = static_cast<unsigned>(cell);
    atomicAdd(&counts[at / 2], at % 2 ? n << 16 : n);
  } else {
    atomicAdd(&a.counts[cell], static_cast<unsigned long long>(n));
  }
}

// Additions to one address go one after the other, and in a map of areas most pixels of a warp are of one cell: that of a lane
// whose neighbouring pixels agree is counted by votes and added once.
template <bool kShared, int P>
__device__ __forceinline__ void count(const Confusion& a, unsigned* counts, const int (&y)[P], const int (&label)[P]) {
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

// Calls find(place, y, label) for each run of the block's pixels and counts what it finds.
template <int kBlock, int P, bool kShared, class Find>
__device__ __forceinline__ void count_pixels(const Confusion& a, unsigned* counts, Find find) {
  const int words = kShared ? (a.codes.classes * a.codes.classes + 1) / 2 : 0;
  if constexpr (kShared) {
    for (int i = threadIdx.x; i < words; i += kBlock) counts[i] = 0;
    __syncthreads();
  }
  for_each_place<kBlock, P>(a.parts, a.x.height * a.x.width, [&](const Place& place) {
    int y[P], label[P];
    find(place, y, label);
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
__global__ void __launch_bounds__(kWide, 2) confusion_by_grid(const Confusion a) {
  FLOWSEG_DYNAMIC_ROWS(rows);
  if constexpr (kWords) stage_rows<kWide>(a.codes, rows);
  auto* counts = reinterpret_cast<unsigned*>(rows + (kWords ? a.codes.classes : 0));
  count_pixels<kWide, kLookedUp, kShared>(a, counts, [&](const Place& place, int (&y)[kLookedUp], int (&label)[kLookedUp]) {
    Points<S> x;
    x.load(a.x, place);  // the target is waited for meanwhile
    load_labels(a.target, a.codes.classes, place, y);
    look_up<kWords>(a.grid, a.codes, rows, x, label);
  });
}

// Told of four blocks a multiprocessor, as ptxas spills for the sake of more.
template <class T, int C, bool kShared>
__global__ void __launch_bounds__(kThreads, 4) confusion_by_search(const Confusion a) {
  constexpr int P = kSearched<T, C>;
  FLOWSEG_TILE(T, C, tile);
  FLOWSEG_DYNAMIC_SHARED(unsigned, counts);
  count_pixels<kThreads, P, kShared>(a, counts, [&](const Place& place, int (&y)[P], int (&label)[P]) {
    load_labels(a.target, a.codes.classes, place, y);
    T x[C][P], nearest[P], second[P];
    load_points(a.x, a.codes.channels, place, x);
    search<false>(a.codes, tile, x, label, nearest, second);
  });
}

template <class Launch>
void launch_confusion(Confusion a, const Launch& launch) {
  const Device device = launch.device();
  const bool grid = a.grid.cells && a.x.type != Real::f64, words = grid && has_words(a.codes);
  // A search has a tile of centroids in shared memory too, which it need not ask for.
  const int64_t bytes = shared_bytes(a.codes.classes) + (grid ? row_bytes(a.codes) : 0), whole = bytes + (grid ? 0 : kTileBytes);
  const bool shared = whole <= device.shared_block && (words || !grid);
  const auto go = [&](auto kernel, int64_t threads, int64_t pixels_a_thread) {
    const int64_t room = shared ? device.shared_multiprocessor / (whole + 1024) : device.threads;  // 1 KiB is the system's
    // A search has up to 128 registers a thread.
    const int64_t at_once = std::max<int64_t>(1, std::min(room, device.threads / (grid ? threads : 2 * threads)));
    const int64_t pixels_a_part = threads * pixels_a_thread;
    a.parts = parts_of(a.x.batch, a.x.height * a.x.width, pixels_a_part, at_once * device.multiprocessors,
                       kMostCounted / pixels_a_part);
    launch.of_threads(threads, kernel, blocks_of(a.parts), shared ? bytes : grid ? row_bytes(a.codes) : 0, a);
  };
  if (grid) {
    return for_half_or_float(a.x.type, [&]<class S>() {
      go(shared  ? confusion_by_grid<true, true, S>
         : words ? confusion_by_grid<false, true, S>
                 : confusion_by_grid<false, false, S>,
         kWide, kLookedUp);
    });
  }
  for_type_and_channels(a.x.type, a.codes.channels, [&]<class T, int C>() {
    constexpr int P = kSearched<T, C>;
    shared ? go(confusion_by_search<T, C, true>, kThreads, P) : go(confusion_by_search<T, C, false>, kThreads, P);
  });
}

}  // namespace flowseg::cuda
