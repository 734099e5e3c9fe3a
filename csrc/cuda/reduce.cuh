// Sums in an order that depends on nothing but the shape: results are bitwise repeatable.
#pragma once

#include "cuda/platform.cuh"

namespace flowseg::cuda {

// Sum over the block; thread 0 has it.
__device__ __forceinline__ double block_sum(double v) {
  constexpr int kWarps = kThreads / 32;
  __shared__ double warps[kWarps];
  for (int step = 16; step > 0; step /= 2) v += __shfl_down_sync(kAllLanes, v, step);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kWarps; ++w) sum += warps[w];
  }
  return sum;
}

// The second stage: sum of parts[0], parts[stride], ... of `count`; thread 0 has it.
__device__ __forceinline__ double sum_parts(const double* parts, int64_t count, int64_t stride) {
  double own = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) own += parts[i * stride];
  return block_sum(own);
}

}  // namespace flowseg::cuda
