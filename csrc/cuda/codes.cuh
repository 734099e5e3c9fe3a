// Centroids in shared memory, a part of them at a time.
#pragma once

#include <cmath>

#include "cuda/arguments.h"
#include "cuda/platform.cuh"
#include "shared/half.h"

namespace flowseg::cuda {

constexpr int kTileBytes = 16384;

// One centroid, padded so that it is read in loads of 16 bytes.
template <class T, int C>
struct alignas(16) Row {
  static constexpr int kLength = C == 3 ? 4 : C;
  T at[kLength];
  __device__ __forceinline__ T operator[](int c) const { return at[c]; }
};

template <class T, int C>
struct Tile {
  static constexpr int kRows = kTileBytes / static_cast<int>(sizeof(Row<T, C>));
  Row<T, C>* rows;

  // By value: the whole row in 16-byte loads.
  __device__ __forceinline__ Row<T, C> operator[](int k) const { return rows[k]; }
};

#define FLOWSEG_TILE(T, C, name)                                   \
  __shared__ Row<T, C> name##_rows[Tile<T, C>::kRows];             \
  Tile<T, C> name { name##_rows }

// Rows may be staged in groups of so many. Those that fill up the last group lie so far out that next to any centroid they weigh
// nothing, and their squared distances still are normal numbers of fp32, and their reciprocals too.
constexpr int kGroup = 4;
constexpr float kFarOut = 1e18f;
FLOWSEG_INLINE constexpr int in_groups(int rows) { return (rows + kGroup - 1) / kGroup * kGroup; }

// Centroids [first, first + count) to shared memory, by the whole block. kFill: the last group is filled up.
template <bool kFill = false, class T, int C>
__device__ __forceinline__ void stage(const Codes& codes, int first, int count, const Tile<T, C>& tile) {
  static_assert(Tile<T, C>::kRows % kGroup == 0);
  constexpr int kLength = Row<T, C>::kLength;
  const T* __restrict__ mu = static_cast<const T*>(codes.data) + static_cast<int64_t>(first) * codes.channels;
  __syncthreads();  // the part before may still be read
  for (int i = threadIdx.x; i < (kFill ? in_groups(count) : count) * kLength; i += kThreads) {
    const int k = i / kLength, c = i % kLength;
    const bool filler = kFill && k >= count;
    tile.rows[k].at[c] =
        c < codes.channels && !filler ? mu[static_cast<int64_t>(k) * codes.channels + c] : filler ? T(kFarOut) : T(0);
  }
  if (!FLOWSEG_PLANTED(race)) __syncthreads();
}

// Calls use(first class, number of classes) with each part of the centroids in `tile`, in order. `staged`: they all fit and are
// there already.
template <class T, int C, class Use>
__device__ __forceinline__ void for_each_part(const Codes& codes, const Tile<T, C>& tile, bool& staged, Use use) {
  constexpr int kRows = Tile<T, C>::kRows;
  for (int first = 0; first < codes.classes; first += kRows) {
    const int count = codes.classes - first < kRows ? codes.classes - first : kRows;
    if (!staged) stage(codes, first, count, tile);
    use(first, count);
  }
  staged = codes.classes <= kRows;
}

// Largest magnitude of a coordinate, in every thread; NaN when there is one. Bits of floats that are not negative are ordered as
// integers are.
template <class T>
__device__ __forceinline__ float reach_of(const Codes& codes) {
  __shared__ unsigned largest;
  const T* __restrict__ mu = static_cast<const T*>(codes.data);
  unsigned own = 0;
  const int64_t size = static_cast<int64_t>(codes.classes) * codes.channels;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const unsigned bits = same_bits<unsigned>(std::fabs(static_cast<float>(mu[i])));
    own = own > bits ? own : bits;
  }
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  own = __reduce_max_sync(kAllLanes, own);
  if (threadIdx.x % 32 == 0) atomicMax(&largest, own);
  __syncthreads();
  return same_bits<float>(largest);
}

}  // namespace flowseg::cuda
