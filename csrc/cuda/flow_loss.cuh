// flow_loss (loss and residual in one pass over the pixels) and its backward on a GPU.
#pragma once

#include "cuda/correct.cuh"
#include "cuda/dispatch.h"
#include "cuda/pixels.cuh"
#include "cuda/reduce.cuh"

namespace flowseg::cuda {

// Sum of the losses of a block's pixels and the number of valid ones, which a double holds exactly.
struct Partial {
  double sum, count;
};

struct Loss {
  Source prediction, source;
  Labels labels;
  Times times;
  Codes codes;
  Correction correction;
  bool predicts_endpoint, endpoint_space, annealed, mean;
  double weight, t_min;
  Target residual;   // data null when not needed
  Target per_pixel;  // likewise
  Partial* partials;  // one a block
  int64_t parts;
  Target loss;  // one number; data null when per_pixel is wanted
  int64_t* count;
  unsigned blocks;  // an image
};

template <class T, int C, Transform kind>
__global__ void __launch_bounds__(kThreads, 1) loss(const Loss a) {
  constexpr int P = kPixels<T, C>;
  using V = Pack<T, P>;
  FLOWSEG_TILE(T, C, tile);
  const Place place = place_of<P>(a.prediction.height * a.prediction.width, a.blocks);
  const T t = static_cast<T>(time_of(a.times, place.image)), rest = 1 - t;
  T scale = 1;
  if (a.predicts_endpoint != a.endpoint_space) {
    const T floor = static_cast<T>(a.t_min);
    scale = a.endpoint_space ? rest : 1 / (rest > floor ? rest : floor);
  }
  V xhat[C], error[C], grad[C] = {};
  Pack<int, P> y;
  load_labels(a.labels, a.codes.classes, place, y.at);
  const Offsets<P> offsets = offsets_of<P>(place, a.prediction), source_offsets = offsets_of<P>(place, a.source);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (c < a.codes.channels) {
      V out, x0{}, x1;
      load_plane(a.prediction, c, place, offsets, out.at);
      load_code(a.codes, y.at, c, x1.at);
      if (!a.predicts_endpoint) load_plane<true>(a.source, c, place, source_offsets, x0.at);
      xhat[c] = a.predicts_endpoint ? out : rest * (x0 + out) + t * x1;
      error[c] = scale * (out - (x1 - x0));
    } else {
      xhat[c] = error[c] = V{};
    }
  }
  if (a.weight != 0) correct_pixels<kind>(a.correction, a.codes, tile, xhat, y, grad);
  const T weight = static_cast<T>(a.weight) * (a.annealed ? rest : T(1));
  const T mean = static_cast<T>(1.0 / a.codes.channels), back = scale * 2 * mean;
  V square{};
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (a.weight != 0) error[c] += weight * grad[c];
    FLOWSEG_EACH(P) error[c].at[p] = y.at[p] >= 0 ? error[c].at[p] : T(0);
    square += error[c] * error[c];
    error[c] *= back;
    if (a.residual.data && c < a.codes.channels) store_plane(a.residual, c, place, error[c].at);
  }
  square *= mean;
  if (a.per_pixel.data) store_plane(a.per_pixel, 0, place, square.at);
  double sum = 0, count = 0;
  FLOWSEG_EACH(P) {
    sum += square.at[p];
    count += y.at[p] >= 0;
  }
  sum = block_sum(sum);
  count = block_sum(count);
  if (threadIdx.x == 0) a.partials[blockIdx.x] = {sum, count};
}

// One block.
static __global__ void __launch_bounds__(kThreads) finish_loss(const Loss a) {
  const double count = sum_parts(&a.partials->count, a.parts, 2);
  const double sum = sum_parts(&a.partials->sum, a.parts, 2);
  if (threadIdx.x != 0) return;
  *a.count = static_cast<int64_t>(count);
  const double value[1] = {a.mean && count > 0 ? sum / count : sum};
  if (a.loss.data) store_plane<true>(a.loss, 0, {0, 0, 1}, value);
}

struct Scale {
  Source residual;
  const void* grad;  // gradient of the loss, in the compute type: one number, or (B, H, W) of these strides
  int64_t stride[3];
  const int64_t* count;  // of valid pixels for the mean, else null
  Target out;
  unsigned blocks;
};

constexpr int kScaled = 8;  // pixels a thread

template <class T>
__global__ void __launch_bounds__(kThreads) scale(const Scale a) {
  constexpr int P = kScaled;
  const Place place = place_of<P>(a.out.pixels, a.blocks);
  const T* grad = static_cast<const T*>(a.grad) + place.image * a.stride[0];
  const double share = a.count ? 1.0 / static_cast<double>(*a.count > 0 ? *a.count : 1) : 1.0;
  T factor[P] = {};
  const Offsets<P> of_grad = offsets_of<P>(place, {false, false}, a.residual.width, a.stride[1], a.stride[2]);
#pragma unroll
  for (int p = 0; p < P; ++p) {
    if (p < place.count) factor[p] = static_cast<T>(grad[of_grad.at[p]] * share);
  }
  const Offsets<P> offsets = offsets_of<P>(place, a.residual);
  for (int64_t c = 0; c < a.residual.channels; ++c) {
    T r[P];
    load_plane(a.residual, c, place, offsets, r);
#pragma unroll
    for (int p = 0; p < P; ++p) r[p] *= factor[p];
    store_plane(a.out, c, place, r);
  }
}

// Pixels a thread, as the launcher needs it for the number of partial sums.
inline int64_t loss_blocks(const Loss& a) {
  int64_t blocks = 0;
  for_type_and_channels(a.prediction.type, a.codes.channels, [&]<class T, int C>() {
    blocks = blocks_an_image(a.prediction.height * a.prediction.width, kPixels<T, C>);
  });
  return blocks;
}

// partials: room for loss_blocks(a) * batch.
template <class Launch>
void launch_loss(Loss a, Launch launch) {
  const int64_t blocks = loss_blocks(a);
  a.blocks = static_cast<unsigned>(blocks);
  a.parts = blocks * a.prediction.batch;
  for_type_and_channels(a.prediction.type, a.codes.channels, [&]<class T, int C>() {
    for_transform(a.correction.transform, [&]<Transform kind>() { launch(loss<T, C, kind>, a.parts, 0, a); });
  });
  launch(finish_loss, 1, 0, a);
}

template <class Launch>
void launch_scale(Scale a, Launch launch) {
  const int64_t blocks = blocks_an_image(a.out.pixels, kScaled);
  a.blocks = static_cast<unsigned>(blocks);
  for_type(a.residual.type, [&]<class T>() { launch(scale<T>, blocks * a.residual.batch, 0, a); });
}

}  // namespace flowseg::cuda
