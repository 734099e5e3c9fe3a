// The thread block: its size, its shared memory, and what its threads do together (sums, staging centroids).
//
// nvcc reads its own header here. A build for the host includes a header with the same names before this one.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#define FLOWSEG_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

#include "cuda/params.h"
#include "shared/types.h"

#ifndef FLOWSEG_THREADS
#define FLOWSEG_THREADS 128  // the host build uses fewer
#endif

// Faults that the sanitizer test switches on to check that they are found. Everywhere else they are compiled out.
#ifndef FLOWSEG_PLANTED
#define FLOWSEG_PLANTED(fault) false
#endif

namespace flowseg::cuda {

constexpr int kThreads = FLOWSEG_THREADS;  // per block
// Threads per block of the kernels that read the decode grid: a larger block fills its shared memory once for more pixels.
// kMeasuredThreads: of those that also find distances.
#ifdef __CUDACC__
constexpr int kGridThreads = 512;
constexpr int kMeasuredThreads = 256;
#else
constexpr int kGridThreads = kThreads;
constexpr int kMeasuredThreads = kThreads;
#endif
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
FLOWSEG_INLINE T infinity() {
  return static_cast<T>(__builtin_huge_valf());
}

// a b + c, in fp32 rounded once on a GPU. The compiler may fuse the product of either side of a sum, so searches whose results must
// agree bit for bit call this function. No tables are in fp64, where the compiler's choice needs fewer registers.
template <class T>
FLOWSEG_INLINE T multiply_add(T a, T b, T c) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == sizeof(float)) return fmaf(a, b, c);
#endif
  return a * b + c;
}

// A compiler barrier: values in memory are read again and values that follow from `from` are computed again, instead of occupying
// registers across the barrier.
__device__ __forceinline__ void compiler_barrier([[maybe_unused]] unsigned& from) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(from)::"memory");
#endif
}

// The sum over the block, in thread 0. The order of the additions depends on nothing but the block size: results are bitwise
// repeatable.
__device__ __forceinline__ double block_sum(double v) {
  constexpr int kWarps = kThreads / 32;
  __shared__ double warps[kWarps];
  for (int step = 16; step > 0; step /= 2) v += __shfl_down_sync(kAllLanes, v, step);
  __syncthreads();  // threads may still read an earlier sum
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kWarps; ++w) sum += warps[w];
  }
  return sum;
}

// The sum of `count` numbers of an array with a stride, in thread 0: the second stage, after each block has stored its sum.
__device__ __forceinline__ double strided_sum(const double* parts, int64_t count, int64_t stride) {
  double own = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) own += parts[i * stride];
  return block_sum(own);
}

// One centroid, padded to whole 16-byte loads.
template <class T, int C>
struct alignas(16) CodeRow {
  static constexpr int kLength = C == 3 ? 4 : C;
  T at[kLength];
  __device__ __forceinline__ T operator[](int c) const { return at[c]; }
};

constexpr int kCodeTileBytes = 16384;

// Centroids in shared memory: all of them, or one part after the other.
template <class T, int C>
struct CodeTile {
  static constexpr int kRows = kCodeTileBytes / static_cast<int>(sizeof(CodeRow<T, C>));
  CodeRow<T, C>* rows;

  // A copy: the compiler then reads the row in 16-byte loads.
  __device__ __forceinline__ CodeRow<T, C> operator[](int k) const { return rows[k]; }
};

#define FLOWSEG_CODE_TILE(T, C, name)                              \
  __shared__ CodeRow<T, C> name##_rows[CodeTile<T, C>::kRows];     \
  CodeTile<T, C> name { name##_rows }

// Loops that are unrolled over kGroup rows read a multiple of kGroup rows. Fillers lie so far away that their weight is nothing
// next to any centroid, but their squared distances and the reciprocals are still normal numbers in fp32.
constexpr int kGroup = 4;
constexpr float kFillerCoordinate = 1e18f;
FLOWSEG_INLINE constexpr int round_up_to_group(int rows) { return (rows + kGroup - 1) / kGroup * kGroup; }

// Copies centroids [first, first + count) to shared memory. Every thread of the block calls it. kFill: also fills the last group.
// kInLoop: for a kernel that is short of registers and comes here from a loop. The compiler then computes indices again.
template <bool kFill = false, bool kInLoop = false, class T, int C>
__device__ __forceinline__ void stage(const InputCodes& codes, int first, int count, const CodeTile<T, C>& tile) {
  static_assert(CodeTile<T, C>::kRows % kGroup == 0);
  constexpr int kLength = CodeRow<T, C>::kLength;
  const T* __restrict__ mu = static_cast<const T*>(codes.data) + static_cast<int64_t>(first) * codes.channels;
  __syncthreads();  // threads may still read the previous part
  unsigned thread = threadIdx.x;
  if constexpr (kInLoop) compiler_barrier(thread);
  for (int i = static_cast<int>(thread); i < (kFill ? round_up_to_group(count) : count) * kLength; i += kThreads) {
    const int k = i / kLength, c = i % kLength;
    const bool filler = kFill && k >= count;
    tile.rows[k].at[c] =
        c < codes.channels && !filler ? mu[static_cast<int64_t>(k) * codes.channels + c] : filler ? T(kFillerCoordinate) : T(0);
  }
  if (!FLOWSEG_PLANTED(race)) __syncthreads();
}

// Stages the centroids part by part, in order, and calls use(first class, number of classes) with each part in `tile`.
// `staged` says whether the tile already holds all centroids. The function updates it.
template <bool kInLoop = false, class T, int C, class Use>
__device__ __forceinline__ void for_each_part(const InputCodes& codes, const CodeTile<T, C>& tile, bool& staged, Use use) {
  constexpr int kRows = CodeTile<T, C>::kRows;
  for (int first = 0; first < codes.classes; first += kRows) {
    const int count = codes.classes - first < kRows ? codes.classes - first : kRows;
    if (!staged) stage<false, kInLoop>(codes, first, count, tile);
    use(first, count);
  }
  staged = codes.classes <= kRows;
}

// The largest magnitude of a coordinate, in every thread; NaN if a coordinate is NaN. The bits of non-negative floats compare like
// integers.
template <class T>
__device__ __forceinline__ float largest_coordinate(const InputCodes& codes) {
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
