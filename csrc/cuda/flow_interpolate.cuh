// flow_interpolate and its backward on a GPU.
#pragma once

#include "cuda/block.cuh"
#include "cuda/params.h"
#include "cuda/pixels.cuh"

namespace flowseg::cuda {

constexpr int kInterpolatePixels = 8;  // per thread: 16 bytes of bf16

struct InterpolateParams {
  InputImage source;  // (B, C, H, W)
  InputLabels labels;  // (B, H, W)
  InputTimes times;   // (B,)
  InputCodes codes;   // (K, C)
  OutputImage out;    // (B, C, H, W)
  unsigned blocks_per_image = 0;
};

template <class T>
__global__ void __launch_bounds__(kThreads) interpolate(const InterpolateParams a) {
  constexpr int P = kInterpolatePixels;
  const PixelRun run = run_of_block<P>(a.out.pixels, a.blocks_per_image);
  const T t = static_cast<T>(time_of(a.times, run.image));
  int y[P];
  load_labels(a.labels, a.codes.classes, run, y);
  const Offsets<P> offsets = offsets_of<P>(run, a.source);
  for (int c = 0; c < a.codes.channels; ++c) {
    T x[P], code[P];
    load_plane(a.source, c, run, offsets, x);
    load_code(a.codes, y, c, code);
#pragma unroll
    for (int p = 0; p < P; ++p) x[p] = y[p] >= 0 ? (1 - t) * x[p] + t * code[p] : x[p];
    store_plane(a.out, c, run, x);
  }
}

struct InterpolateBackwardParams {
  InputImage grad, source;  // (B, C, H, W)
  InputLabels labels;       // (B, H, W)
  InputTimes times;         // (B,)
  InputCodes codes;         // (K, C)
  OutputImage grad_source;  // (B, C, H, W)
  OutputImage grad_time;    // (B,)
  double* sums;             // (B, blocks_per_image), scratch; null if grad_time is not needed
  unsigned blocks_per_image = 0;
};

template <class T>
__global__ void __launch_bounds__(kThreads) interpolate_backward(const InterpolateBackwardParams a) {
  constexpr int P = kInterpolatePixels;
  const PixelRun run = run_of_block<P>(a.grad_source.pixels, a.blocks_per_image);
  const T t = static_cast<T>(time_of(a.times, run.image));
  int y[P];
  load_labels(a.labels, a.codes.classes, run, y);
  const Offsets<P> offsets = offsets_of<P>(run, a.source), grad_offsets = offsets_of<P>(run, a.grad);
  double sum = 0;
  for (int c = 0; c < a.codes.channels; ++c) {
    T grad[P];
    load_plane<true>(a.grad, c, run, grad_offsets, grad);
    if (a.sums) {
      T x[P], code[P];
      load_plane(a.source, c, run, offsets, x);
      load_code(a.codes, y, c, code);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (y[p] >= 0) sum += static_cast<double>(grad[p]) * (code[p] - x[p]);
      }
    }
#pragma unroll
    for (int p = 0; p < P; ++p) grad[p] = y[p] >= 0 ? (1 - t) * grad[p] : grad[p];
    store_plane(a.grad_source, c, run, grad);
  }
  if (a.sums) {
    sum = block_sum(sum);
    if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
  }
}

// Adds up the blocks' sums. One block per image.
static __global__ void __launch_bounds__(kThreads) finish_grad_time(const InterpolateBackwardParams a) {
  const double* sums = a.sums + static_cast<int64_t>(blockIdx.x) * a.blocks_per_image;
  const double sum[1] = {strided_sum(sums, a.blocks_per_image, 1)};
  if (threadIdx.x == 0) store_plane<true>(a.grad_time, 0, {blockIdx.x, 0, 1}, sum);
}

template <class Launch>
void launch_interpolate(InterpolateParams a, const Launch& launch) {
  const int64_t blocks = blocks_per_image(a.out.pixels, kInterpolatePixels);
  a.blocks_per_image = static_cast<unsigned>(blocks);
  for_type(a.source.type, [&]<class T>() { launch(interpolate<T>, blocks * a.source.batch, 0, a); });
}

// The number of `sums` that the backward needs for grad_time.
inline int64_t grad_time_sums(const Image& source) {
  return blocks_per_image(source.height * source.width, kInterpolatePixels) * source.batch;
}

template <class Launch>
void launch_interpolate_backward(InterpolateBackwardParams a, const Launch& launch) {
  const int64_t blocks = blocks_per_image(a.grad_source.pixels, kInterpolatePixels);
  a.blocks_per_image = static_cast<unsigned>(blocks);
  for_type(a.source.type, [&]<class T>() { launch(interpolate_backward<T>, blocks * a.source.batch, 0, a); });
  if (a.sums) launch(finish_grad_time, a.source.batch, 0, a);
}

}  // namespace flowseg::cuda
