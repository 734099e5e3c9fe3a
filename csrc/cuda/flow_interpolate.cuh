// flow_interpolate and its backward on a GPU.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/dispatch.h"
#include "cuda/pixels.cuh"
#include "cuda/reduce.cuh"

namespace flowseg::cuda {

constexpr int kInterpolated = 8;  // pixels a thread: 16 bytes of bf16

struct Interpolate {
  Source source;
  Labels labels;
  Times times;
  Codes codes;
  Target out;
  unsigned tiles, tiles_an_image;
};

// Where centroids are few, their rows are copied to shared memory, each to be read as one vector.
template <class T, int C>
struct FewRows {
  static constexpr int kRows = 256;
  Row<T, C> at[kRows];
};

template <class T, int C>
__device__ __forceinline__ void stage_few(const Codes& codes, FewRows<T, C>& rows) {
  const T* __restrict__ mu = static_cast<const T*>(codes.data);
  for (int i = threadIdx.x; i < codes.classes * C; i += kThreads) {
    const int k = i / C, c = i % C;
    rows.at[k].at[c] = c < codes.channels ? mu[k * codes.channels + c] : T(0);
  }
  __syncthreads();
}

template <class T, int C>
__device__ __forceinline__ void interpolate_tile(const Interpolate& a, unsigned tile, bool few, const FewRows<T, C>& rows) {
  constexpr int P = kInterpolated;
  const Place place = place_at<P>(a.out.pixels, a.tiles_an_image, tile);
  const T t = static_cast<T>(time_of(a.times, place.image));
  int y[P];
  T x[C][P];
  load_planes(a.source, a.codes.channels, place, offsets_of<P>(place, a.source), x);
  load_labels(a.labels, a.codes.classes, place, y);
#pragma unroll
  for (int p = 0; p < P; ++p) {
    const int k = y[p] >= 0 ? y[p] : 0;
    Row<T, C> row;
    if (few) {
      row = rows.at[k];
    } else {
      const T* __restrict__ mu = static_cast<const T*>(a.codes.data) + static_cast<int64_t>(k) * a.codes.channels;
#pragma unroll
      for (int c = 0; c < C; ++c) row.at[c] = c < a.codes.channels ? mu[c] : T(0);
    }
#pragma unroll
    for (int c = 0; c < C; ++c) x[c][p] = y[p] >= 0 ? (1 - t) * x[c][p] + t * row[c] : x[c][p];
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (c < a.codes.channels) store_plane(a.out, c, place, x[c]);
  }
}

// Any number of channels, one after the other.
template <class T>
__device__ __forceinline__ void interpolate_many(const Interpolate& a, unsigned tile) {
  constexpr int P = kInterpolated;
  const Place place = place_at<P>(a.out.pixels, a.tiles_an_image, tile);
  const T t = static_cast<T>(time_of(a.times, place.image));
  int y[P];
  load_labels(a.labels, a.codes.classes, place, y);
  const Offsets<P> offsets = offsets_of<P>(place, a.source);
  for (int c = 0; c < a.codes.channels; ++c) {
    T x[P], code[P];
    load_plane(a.source, c, place, offsets, x);
    load_code(a.codes, y, c, code);
#pragma unroll
    for (int p = 0; p < P; ++p) x[p] = y[p] >= 0 ? (1 - t) * x[p] + t * code[p] : x[p];
    store_plane(a.out, c, place, x);
  }
}

// In turns: the rows are copied once a block. C = kMany: any number of channels.
constexpr int kMany = 16;
template <class T, int C>
__global__ void __launch_bounds__(kThreads, C == 3 && sizeof(T) == 4 ? 4 : 1) interpolate(const Interpolate a) {
  if constexpr (C == kMany) {
    for (unsigned tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) interpolate_many<T>(a, tile);
  } else {
    __shared__ FewRows<T, C> rows;
    const bool few = a.codes.classes <= FewRows<T, C>::kRows;
    if (few) stage_few(a.codes, rows);
    for (unsigned tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) interpolate_tile(a, tile, few, rows);
  }
}

struct InterpolateBackward {
  Source grad, source;
  Labels labels;
  Times times;
  Codes codes;
  Target grad_source, grad_time;
  double* sums;  // one a block; null when grad_time is not needed
  unsigned blocks;
};

template <class T>
__global__ void __launch_bounds__(kThreads) interpolate_backward(const InterpolateBackward a) {
  constexpr int P = kInterpolated;
  const Place place = place_of<P>(a.grad_source.pixels, a.blocks);
  const T t = static_cast<T>(time_of(a.times, place.image));
  int y[P];
  load_labels(a.labels, a.codes.classes, place, y);
  const Offsets<P> offsets = offsets_of<P>(place, a.source), grad_offsets = offsets_of<P>(place, a.grad);
  double sum = 0;
  for (int c = 0; c < a.codes.channels; ++c) {
    T grad[P];
    load_plane<true>(a.grad, c, place, grad_offsets, grad);
    if (a.sums) {
      T x[P], code[P];
      load_plane(a.source, c, place, offsets, x);
      load_code(a.codes, y, c, code);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (y[p] >= 0) sum += static_cast<double>(grad[p]) * (code[p] - x[p]);
      }
    }
#pragma unroll
    for (int p = 0; p < P; ++p) grad[p] = y[p] >= 0 ? (1 - t) * grad[p] : grad[p];
    store_plane(a.grad_source, c, place, grad);
  }
  if (a.sums) {
    sum = block_sum(sum);
    if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
  }
}

// One block an image.
static __global__ void __launch_bounds__(kThreads) finish_grad_time(const InterpolateBackward a) {
  const double sum[1] = {sum_parts(a.sums + static_cast<int64_t>(blockIdx.x) * a.blocks, a.blocks, 1)};
  if (threadIdx.x == 0) store_plane<true>(a.grad_time, 0, {blockIdx.x, 0, 1}, sum);
}

template <class Launch>
void launch_interpolate(Interpolate a, Launch launch) {
  const int64_t tiles = blocks_an_image(a.out.pixels, kInterpolated);
  a.tiles_an_image = static_cast<unsigned>(tiles);
  a.tiles = static_cast<unsigned>(tiles * a.source.batch);
  for_type_and_channels(a.source.type, a.codes.channels, [&]<class T, int C>() {
    constexpr auto kernel = interpolate<T, C <= 4 ? C : kMany>;
    launch(kernel, launch.in_turns(kernel, tiles * a.source.batch), 0, a);
  });
}

template <class Launch>
void launch_interpolate_backward(InterpolateBackward a, Launch launch) {
  const int64_t blocks = blocks_an_image(a.grad_source.pixels, kInterpolated);
  a.blocks = static_cast<unsigned>(blocks);
  for_type(a.source.type, [&]<class T>() { launch(interpolate_backward<T>, blocks * a.source.batch, 0, a); });
  if (a.sums) launch(finish_grad_time, a.source.batch, 0, a);
}

}  // namespace flowseg::cuda
