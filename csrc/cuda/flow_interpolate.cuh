// flow_interpolate and its backward on a GPU.
#pragma once

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
  unsigned blocks;  // an image
};

template <class T>
__global__ void __launch_bounds__(kThreads) interpolate(const Interpolate a) {
  constexpr int P = kInterpolated;
  const Place place = place_of<P>(a.out.pixels, a.blocks);
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
  const int64_t blocks = blocks_an_image(a.out.pixels, kInterpolated);
  a.blocks = static_cast<unsigned>(blocks);
  for_type(a.source.type, [&]<class T>() { launch(interpolate<T>, blocks * a.source.batch, 0, a); });
}

template <class Launch>
void launch_interpolate_backward(InterpolateBackward a, Launch launch) {
  const int64_t blocks = blocks_an_image(a.grad_source.pixels, kInterpolated);
  a.blocks = static_cast<unsigned>(blocks);
  for_type(a.source.type, [&]<class T>() { launch(interpolate_backward<T>, blocks * a.source.batch, 0, a); });
  if (a.sums) launch(finish_grad_time, a.source.batch, 0, a);
}

}  // namespace flowseg::cuda
