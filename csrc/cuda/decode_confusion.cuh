// decode_confusion on a GPU: decode and count in one pass, without a label map.
#pragma once

#include "cuda/decode.cuh"
#include "cuda/dispatch.h"

namespace flowseg::cuda {

// Counts of a block are 16 bits wide, two in a word of shared memory, so that 150 classes fit into what every GPU gives a block
// without asking; a block counts fewer than 65,536 pixels. More classes count in global memory, where the lanes of a warp with
// the same cell add once. Sums of integers do not depend on the order.
constexpr int kMostShared = 48 * 1024;
constexpr int kMostCounted = 32768;  // pixels a block

struct Confusion {
  Source x;
  Labels target;
  Codes codes;
  Grid grid;
  unsigned long long* counts;  // (K, K), zero at first
  unsigned blocks;             // an image
  int steps;                   // runs of pixels a thread
};

inline int64_t shared_bytes(int64_t classes) { return (classes * classes + 1) / 2 * 4; }

// The smallest number of steps that fills the counts of a block, if there are pixels for it.
inline int steps_of(int64_t pixels, int pixels_a_thread, bool shared) {
  const int64_t each = int64_t{kThreads} * pixels_a_thread;
  const int64_t most = shared ? kMostCounted / each : 1;
  const int64_t wanted = (pixels + each - 1) / each;
  return static_cast<int>(wanted < most ? wanted : most);
}

template <int P>
__device__ __forceinline__ void count_shared(const Confusion& a, unsigned* counts, const int (&y)[P], const int (&label)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    if (y[p] < 0 || label[p] < 0) continue;
    const int cell = y[p] * a.codes.classes + label[p];
    atomicAdd(&counts[cell / 2], cell % 2 ? 65536u : 1u);
  }
}

template <int P>
__device__ __forceinline__ void count_global(const Confusion& a, const int (&y)[P], const int (&label)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const bool counts = y[p] >= 0 && label[p] >= 0;
    const unsigned long long cell = counts ? static_cast<unsigned long long>(y[p]) * a.codes.classes + label[p] : ~0ull;
    const unsigned same = __match_any_sync(kAllLanes, cell);
    if (counts && (same & ((1u << (threadIdx.x % 32)) - 1)) == 0) {
      atomicAdd(&a.counts[cell], static_cast<unsigned long long>(__popc(same)));
    }
  }
}

// Calls decode(place, label) for each run of the block's pixels and counts what it finds.
template <int P, bool kShared, class Find>
__device__ __forceinline__ void count_pixels(const Confusion& a, Find decode) {
  FLOWSEG_DYNAMIC_SHARED(unsigned, counts);
  const int size = kShared ? a.codes.classes * a.codes.classes : 0;
  if constexpr (kShared) {
    for (int i = threadIdx.x; i < (size + 1) / 2; i += kThreads) counts[i] = 0;
    __syncthreads();
  }
  for (int step = 0; step < a.steps; ++step) {
    const Place place = place_of<P>(a.x.height * a.x.width, a.blocks, a.steps, step);
    int y[P], label[P];
    load_labels(a.target, a.codes.classes, place, y);
    decode(place, label);
    if constexpr (kShared) {
      count_shared(a, counts, y, label);
    } else {
      count_global(a, y, label);
    }
  }
  if constexpr (kShared) {
    if (!FLOWSEG_PLANTED(histogram)) __syncthreads();
    for (int i = threadIdx.x; i < size; i += kThreads) {
      const unsigned n = counts[i / 2] >> (i % 2 * 16) & 0xffff;
      if (n) atomicAdd(&a.counts[i], static_cast<unsigned long long>(n));
    }
  }
}

template <bool kShared>
__global__ void __launch_bounds__(kThreads) confusion_by_grid(const Confusion a) {
  count_pixels<kLookedUp, kShared>(a, [&](const Place& place, int (&label)[kLookedUp]) {
    float x[3][kLookedUp];
    load_points(a.x, 3, place, x);
    look_up(a.grid, a.codes, x, label);
  });
}

template <class T, int C, bool kShared>
__global__ void __launch_bounds__(kThreads) confusion_by_search(const Confusion a) {
  constexpr int P = kSearched<T, C>;
  FLOWSEG_TILE(T, C, tile);
  count_pixels<P, kShared>(a, [&](const Place& place, int (&label)[P]) {
    T x[C][P], nearest[P], second[P];
    load_points(a.x, a.codes.channels, place, x);
    search<false>(a.codes, tile, x, label, nearest, second);
  });
}

template <class Launch>
void launch_confusion(Confusion a, Launch launch) {
  const bool grid = a.grid.cells && a.x.type != Real::f64;
  // The tile of centroids of a search is in shared memory too.
  const bool shared = shared_bytes(a.codes.classes) <= kMostShared - (grid ? 0 : kTileBytes);
  const int64_t pixels = a.x.height * a.x.width;
  const auto go = [&](auto kernel, int pixels_a_thread) {
    a.steps = steps_of(pixels, pixels_a_thread, shared);
    const int64_t blocks = blocks_an_image(pixels, pixels_a_thread * a.steps);
    a.blocks = static_cast<unsigned>(blocks);
    launch(kernel, blocks * a.x.batch, shared ? shared_bytes(a.codes.classes) : 0, a);
  };
  if (grid) return shared ? go(confusion_by_grid<true>, kLookedUp) : go(confusion_by_grid<false>, kLookedUp);
  for_type_and_channels(a.x.type, a.codes.channels, [&]<class T, int C>() {
    constexpr int P = kSearched<T, C>;
    shared ? go(confusion_by_search<T, C, true>, P) : go(confusion_by_search<T, C, false>, P);
  });
}

}  // namespace flowseg::cuda
