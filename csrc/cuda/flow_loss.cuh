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
  bool divided;  // the residual by the number of valid pixels
  double weight, t_min;
  Target residual;   // data null when not needed
  Target per_pixel;  // likewise
  Partial* partials;  // one a block of `loss`, then one a block of `count_valid`
  Target loss;        // one number; data null when per_pixel is wanted
  int64_t* count;     // of valid pixels; 1 where the residual is divided by it
  int64_t parts, counts;  // blocks of `loss` and of `count_valid`
  unsigned tiles, tiles_an_image, counted, counted_an_image;
};

constexpr int kCounted = 16;  // pixels a thread

// Labels are counted beforehand where the residual is divided by their number.
static __global__ void __launch_bounds__(kThreads) count_valid(const Loss a) {
  double count = 0;
  for (unsigned tile = blockIdx.x; tile < a.counted; tile += gridDim.x) {
    int y[kCounted], valid = 0;
    const Place place = place_at<kCounted>(a.prediction.height * a.prediction.width, a.counted_an_image, tile);
    load_labels(a.labels, a.codes.classes, place, y);
#pragma unroll
    for (int p = 0; p < kCounted; ++p) valid += y[p] >= 0;
    count += valid;
  }
  count = block_sum(count);
  if (threadIdx.x == 0) a.partials[a.parts + blockIdx.x].count = count;
}

// The errors of a block's pixels and the sums of each thread wait in shared memory while the correction needs the registers.
template <class T, int C>
struct Waiting {
  Packed<T, kPixels<T, C>> error[C][kThreads];
  Partial partial[kThreads];
  double share;  // 1 / number of valid pixels; 1 where the residual is not divided
};

template <class T, int C>
__device__ __forceinline__ void begin_waiting(const Loss& a, Waiting<T, C>& waiting) {
  waiting.partial[threadIdx.x] = {0, 0};
  const double count = a.divided ? sum_parts(&a.partials[a.parts].count, a.counts, 2) : 1;
  if (threadIdx.x == 0) waiting.share = 1 / (count > 0 ? count : 1);
  __syncthreads();
}

// From an error to what it is in the space of the loss.
template <class T>
__device__ __forceinline__ T scale_of(const Loss& a, T t) {
  if (a.predicts_endpoint == a.endpoint_space) return 1;
  const T rest = 1 - t, floor = static_cast<T>(a.t_min);
  return a.endpoint_space ? rest : 1 / (rest > floor ? rest : floor);
}

// The end points that a tile's predictions stand for; their errors begin to wait.
template <class T, int C, int P>
__device__ __forceinline__ void load_end_points(const Loss& a, const Staged<T, C>& staged, const Place& place, const Pack<int, P>& y,
                                                Pack<T, P> (&xhat)[C], Waiting<T, C>& waiting) {
  using V = Pack<T, P>;
  const T t = static_cast<T>(time_of(a.times, place.image)), rest = 1 - t, scale = scale_of(a, t);
  V x1[C];
  load_own_codes(a.codes, staged, y, x1);
  const Offsets<P> offsets = offsets_of<P>(place, a.prediction), source_offsets = offsets_of<P>(place, a.source);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    V error{};
    xhat[c] = V{};
    if (c < a.codes.channels) {
      V out, x0{};
      load_plane(a.prediction, c, place, offsets, out.at);
      if (!a.predicts_endpoint) load_plane<true>(a.source, c, place, source_offsets, x0.at);
      xhat[c] = a.predicts_endpoint ? out : rest * (x0 + out) + t * x1[c];
      error = scale * (out - (x1[c] - x0));
    }
    FLOWSEG_EACH(P) waiting.error[c][threadIdx.x].at[p] = error.at[p];
  }
}

// Residuals and losses of a tile.
template <class T, int C, int P>
__device__ __forceinline__ void store_losses(const Loss& a, const Place& place, const Pack<int, P>& y, const Pack<T, P> (&grad)[C],
                                             Waiting<T, C>& waiting) {
  using V = Pack<T, P>;
  const T t = static_cast<T>(time_of(a.times, place.image));
  const T weight = static_cast<T>(a.weight) * (a.annealed ? 1 - t : T(1)), mean = static_cast<T>(1.0 / a.codes.channels);
  const T back = scale_of(a, t) * 2 * mean * static_cast<T>(waiting.share);
  V square{};
#pragma unroll
  for (int c = 0; c < C; ++c) {
    V error;
    FLOWSEG_EACH(P) error.at[p] = waiting.error[c][threadIdx.x].at[p];
    if (a.weight != 0) error += weight * grad[c];
    FLOWSEG_EACH(P) error.at[p] = y.at[p] >= 0 ? error.at[p] : T(0);
    square += error * error;
    error *= back;
    if (a.residual.data && c < a.codes.channels) store_plane(a.residual, c, place, error.at);
  }
  square *= mean;
  if (a.per_pixel.data) store_plane(a.per_pixel, 0, place, square.at);
  Partial& partial = waiting.partial[threadIdx.x];
  FLOWSEG_EACH(P) {
    partial.sum += square.at[p];
    partial.count += y.at[p] >= 0;
  }
}

template <class T, int C, Transform kind>
__device__ __forceinline__ void loss_tile(const Loss& a, unsigned tile, Staged<T, C>& staged, Waiting<T, C>& waiting) {
  constexpr int P = kPixels<T, C>;
  const int64_t pixels = a.prediction.height * a.prediction.width;
  Pack<T, P> xhat[C], grad[C] = {};
  Pack<int, P> y;
  const Place place = place_at<P>(pixels, a.tiles_an_image, tile);
  load_labels(a.labels, a.codes.classes, place, y.at);
  load_end_points(a, staged, place, y, xhat, waiting);
  if (tile + gridDim.x < a.tiles) {
    const Place next = place_at<P>(pixels, a.tiles_an_image, tile + gridDim.x);
    prefetch_labels(a.labels, next);
    prefetch_planes<C>(a.prediction, a.codes.channels, next);
    if (!a.predicts_endpoint) prefetch_planes<C>(a.source, a.codes.channels, next);
  }
  forget(tile);
  if (a.weight != 0) correct_pixels<kind>(a.correction, a.codes, staged, xhat, y, grad);
  store_losses(a, place_at<P>(pixels, a.tiles_an_image, tile), y, grad, waiting);
}

// For sm_100 and newer ptxas needs a few registers more, and would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class T, int C>
constexpr int kLossResident = kResident<T, C> == 4 ? 3 : kResident<T, C>;
#else
template <class T, int C>
constexpr int kLossResident = kResident<T, C>;
#endif

// In turns, as `correct` does it.
template <class T, int C, Transform kind>
__global__ void __launch_bounds__(kThreads, kLossResident<T, C>) loss(const Loss a) {
  FLOWSEG_TILE(T, C, rows);
  __shared__ Waiting<T, C> waiting;
  begin_waiting(a, waiting);
  auto staged = stage_codes<kind>(a.correction, a.codes, rows);
#pragma unroll 1
  for (unsigned tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    loss_tile<T, C, kind>(a, tile, staged, waiting);
  }
  const double sum = block_sum(waiting.partial[threadIdx.x].sum), count = block_sum(waiting.partial[threadIdx.x].count);
  if (threadIdx.x == 0) a.partials[blockIdx.x] = {sum, count};
}

// One block.
static __global__ void __launch_bounds__(kThreads) finish_loss(const Loss a) {
  const double count = sum_parts(&a.partials->count, a.parts, 2);
  const double sum = sum_parts(&a.partials->sum, a.parts, 2);
  if (threadIdx.x != 0) return;
  *a.count = a.divided ? 1 : static_cast<int64_t>(count);
  const double value[1] = {a.mean && count > 0 ? sum / count : sum};
  if (a.loss.data) store_plane<true>(a.loss, 0, {0, 0, 1}, value);
}

struct Scale {
  Source residual;
  const void* grad;  // gradient of the loss, in the compute type: one number, or (B, H, W) of these strides
  int64_t stride[3];
  const int64_t* count;  // of valid pixels for the mean, else null
  Target out;
  bool in_place;  // `out` is the residual
  unsigned blocks;
};

constexpr int kScaled = 8;  // pixels a thread

template <class T>
__global__ void __launch_bounds__(kThreads) scale(const Scale a) {
  constexpr int P = kScaled;
  const Place place = place_of<P>(a.out.pixels, a.blocks);
  const T* grad = static_cast<const T*>(a.grad) + place.image * a.stride[0];
  const double share = a.count ? 1.0 / static_cast<double>(*a.count > 0 ? *a.count : 1) : 1.0;
  // A gradient already: nothing is read or written.
  if (a.in_place && static_cast<T>(*grad * share) == 1) return;
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

template <class Body>
void for_loss(const Loss& a, Body body) {
  for_type_and_channels(a.prediction.type, a.codes.channels, [&]<class T, int C>() {
    for_transform(a.correction.transform, [&]<Transform kind>() { body(loss<T, C, kind>, kPixels<T, C>); });
  });
}

// Fills in the sizes of the grids. `partials` needs room for `parts + counts`.
template <class Launch>
void plan_loss(Loss& a, const Launch& launch) {
  const int64_t pixels = a.prediction.height * a.prediction.width;
  const auto divide = [&](int each, unsigned& tiles, unsigned& tiles_an_image) {
    const int64_t blocks = blocks_an_image(pixels, each);
    tiles_an_image = static_cast<unsigned>(blocks);
    tiles = static_cast<unsigned>(blocks * a.prediction.batch);
    return blocks * a.prediction.batch;
  };
  for_loss(a, [&](auto kernel, int each) { a.parts = launch.in_turns(kernel, divide(each, a.tiles, a.tiles_an_image)); });
  a.counts = a.divided ? launch.in_turns(count_valid, divide(kCounted, a.counted, a.counted_an_image)) : 0;
}

template <class Launch>
void launch_loss(const Loss& a, const Launch& launch) {
  if (a.divided) launch(count_valid, a.counts, 0, a);
  for_loss(a, [&](auto kernel, int) { launch(kernel, a.parts, 0, a); });
  launch(finish_loss, 1, 0, a);
}

template <class Launch>
void launch_scale(Scale a, Launch launch) {
  const int64_t blocks = blocks_an_image(a.out.pixels, kScaled);
  a.blocks = static_cast<unsigned>(blocks);
  for_type(a.residual.type, [&]<class T>() { launch(scale<T>, blocks * a.residual.batch, 0, a); });
}

}  // namespace flowseg::cuda
