// flow_loss (loss and residual in one pass over the pixels) and its backward on a GPU.
#pragma once

#include "cuda/block.cuh"
#include "cuda/correction.cuh"
#include "cuda/params.h"
#include "cuda/pixels.cuh"

namespace flowseg::cuda {

// The sum of the losses of a block's pixels and the number of its valid pixels, which a double represents exactly.
struct Partial {
  double sum, count;
};

struct LossParams {
  InputImage prediction, source;  // (B, C, H, W)
  InputLabels labels;             // (B, H, W)
  InputTimes times;               // (B,)
  InputCodes codes;               // (K, C)
  Correction correction;
  bool predicts_endpoint, endpoint_space, annealed, mean;
  bool residual_is_divided;  // by the number of valid pixels
  double weight, t_min;
  OutputImage residual;                       // (B, C, H, W); data null if not needed
  OutputImage per_pixel;                      // (B, H, W), the loss for Reduction::none; else data null
  Partial* partials = nullptr;                // (loss_blocks + count_blocks,), scratch
  OutputImage loss;                           // one number; data null for Reduction::none
  int64_t* count;                             // one number: valid pixels, or 1 if the residual is already divided by them
  int64_t loss_blocks = 0, count_blocks = 0;  // blocks of `loss` and of `count_valid`
  unsigned tiles = 0, tiles_per_image = 0, count_tiles = 0, count_tiles_per_image = 0;
};

struct LossOptions {
  bool predicts_endpoint, endpoint_space;
  double weight;
  bool annealed;
  Correction correction;
  int64_t reduction;
  double t_min;
};

// All parameters except the launch sizes (plan_loss sets them) and the scratch memory. `residual.data` is null if no gradient is
// needed.
//
// For a mean, `loss` divides the residual by the number of valid pixels. The residual is then the gradient if the incoming gradient
// is 1. In fp16 the quotient could underflow in a large batch, so there the backward divides.
inline LossParams loss_params(const InputImage& prediction, const InputImage& source, const InputLabels& labels,
                              const InputTimes& times, const InputCodes& codes, const LossOptions& options, const OutputImage& loss,
                              const OutputImage& residual, int64_t* count) {
  const bool mean = options.reduction == Reduction::mean, none = options.reduction == Reduction::none;
  return {.prediction = prediction,
          .source = source,
          .labels = labels,
          .times = times,
          .codes = codes,
          .correction = options.correction,
          .predicts_endpoint = options.predicts_endpoint,
          .endpoint_space = options.endpoint_space,
          .annealed = options.annealed,
          .mean = mean,
          .residual_is_divided = residual.data && mean && prediction.type != Real::f16,
          .weight = options.weight,
          .t_min = options.t_min,
          .residual = residual,
          .per_pixel = none ? loss : OutputImage{},
          .loss = none ? OutputImage{} : loss,
          .count = count};
}

constexpr int kCountPixels = 16;  // per thread

// Counts the valid labels before the loss runs, if the residual is divided by their number.
static __global__ void __launch_bounds__(kThreads) count_valid(const LossParams a) {
  double count = 0;
  for (unsigned tile = blockIdx.x; tile < a.count_tiles; tile += gridDim.x) {
    int y[kCountPixels], valid = 0;
    const PixelRun run = run_in_batch<kCountPixels>(a.prediction.height * a.prediction.width, a.count_tiles_per_image, tile);
    load_labels(a.labels, a.codes.classes, run, y);
#pragma unroll
    for (int p = 0; p < kCountPixels; ++p) valid += y[p] >= 0;
    count += valid;
  }
  count = block_sum(count);
  if (threadIdx.x == 0) a.partials[a.loss_blocks + blockIdx.x].count = count;
}

// Shared memory that keeps each thread's errors and sums while the correction needs the registers.
template <class T, int C>
struct LossScratch {
  Packed<T, kCorrectionPixels<T, C>> error[C][kThreads];
  Partial partial[kThreads];
  double residual_factor;  // 1 / number of valid pixels; 1 if the residual is not divided
};

template <class T, int C>
__device__ __forceinline__ void initialise(const LossParams& a, LossScratch<T, C>& scratch) {
  scratch.partial[threadIdx.x] = {0, 0};
  const double count = a.residual_is_divided ? strided_sum(&a.partials[a.loss_blocks].count, a.count_blocks, 2) : 1;
  if (threadIdx.x == 0) scratch.residual_factor = 1 / (count > 0 ? count : 1);
  __syncthreads();
}

// The factor that converts an error of the prediction to the space of the loss.
template <class T>
__device__ __forceinline__ T error_scale(const LossParams& a, T t) {
  if (a.predicts_endpoint == a.endpoint_space) return 1;
  const T rest = 1 - t, floor = static_cast<T>(a.t_min);
  return a.endpoint_space ? rest : 1 / (rest > floor ? rest : floor);
}

// Computes the end points that a run's predictions imply, and stores the errors of the predictions in `scratch`.
template <class T, int C, int P>
__device__ __forceinline__ void load_end_points(const LossParams& a, const StagedCodes<T, C>& staged, const PixelRun& run,
                                                const Pack<int, P>& y, Pack<T, P> (&xhat)[C], LossScratch<T, C>& scratch) {
  using V = Pack<T, P>;
  const T t = static_cast<T>(time_of(a.times, run.image)), rest = 1 - t, scale = error_scale(a, t);
  V x1[C];
  load_own_codes(a.codes, staged, y, x1);
  const Offsets<P> offsets = offsets_of<P>(run, a.prediction), source_offsets = offsets_of<P>(run, a.source);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    V error{};
    xhat[c] = V{};
    if (c < a.codes.channels) {
      V out, x0{};
      load_plane(a.prediction, c, run, offsets, out.at);
      if (!a.predicts_endpoint) load_plane<true>(a.source, c, run, source_offsets, x0.at);
      xhat[c] = a.predicts_endpoint ? out : rest * (x0 + out) + t * x1[c];
      error = scale * (out - (x1[c] - x0));
    }
    FLOWSEG_EACH(P) scratch.error[c][threadIdx.x].at[p] = error.at[p];
  }
}

// Stores the residuals of a run and adds its losses to the thread's sums.
template <class T, int C, int P>
__device__ __forceinline__ void store_losses(const LossParams& a, const PixelRun& run, const Pack<int, P>& y,
                                             const Pack<T, P> (&grad)[C], LossScratch<T, C>& scratch) {
  using V = Pack<T, P>;
  const T t = static_cast<T>(time_of(a.times, run.image));
  const T weight = static_cast<T>(a.weight) * (a.annealed ? 1 - t : T(1));
  const T inverse_channels = static_cast<T>(1.0 / a.codes.channels);
  const T residual_scale = error_scale(a, t) * 2 * inverse_channels * static_cast<T>(scratch.residual_factor);
  V square{};
#pragma unroll
  for (int c = 0; c < C; ++c) {
    V error;
    FLOWSEG_EACH(P) error.at[p] = scratch.error[c][threadIdx.x].at[p];
    if (a.weight != 0) error += weight * grad[c];
    FLOWSEG_EACH(P) error.at[p] = y.at[p] >= 0 ? error.at[p] : T(0);
    square += error * error;
    error *= residual_scale;
    if (a.residual.data && c < a.codes.channels) store_plane(a.residual, c, run, error.at);
  }
  square *= inverse_channels;
  if (a.per_pixel.data) store_plane(a.per_pixel, 0, run, square.at);
  Partial& partial = scratch.partial[threadIdx.x];
  FLOWSEG_EACH(P) {
    partial.sum += square.at[p];
    partial.count += y.at[p] >= 0;
  }
}

template <class T, int C, Transform kTransform>
__device__ __forceinline__ void loss_tile(const LossParams& a, unsigned tile, StagedCodes<T, C>& staged,
                                          LossScratch<T, C>& scratch) {
  constexpr int P = kCorrectionPixels<T, C>;
  const int64_t pixels = a.prediction.height * a.prediction.width;
  Pack<T, P> xhat[C], grad[C] = {};
  Pack<int, P> y;
  const PixelRun run = run_in_batch<P>(pixels, a.tiles_per_image, tile);
  load_labels(a.labels, a.codes.classes, run, y.at);
  load_end_points(a, staged, run, y, xhat, scratch);
  if (tile + gridDim.x < a.tiles) {
    const PixelRun next = run_in_batch<P>(pixels, a.tiles_per_image, tile + gridDim.x);
    prefetch_labels(a.labels, next);
    prefetch_planes<C>(a.prediction, a.codes.channels, next);
    if (!a.predicts_endpoint) prefetch_planes<C>(a.source, a.codes.channels, next);
  }
  compiler_barrier(tile);
  if (a.weight != 0) correct_pixels<kTransform>(a.correction, a.codes, staged, xhat, y, grad);
  // Compute the run again. Kept during the correction it would take registers.
  store_losses(a, run_in_batch<P>(pixels, a.tiles_per_image, tile), y, grad, scratch);
}

// For sm_100 and newer ptxas needs a few more registers and would spill with four blocks per SM. Ask for three.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class T, int C>
constexpr int kMinLossBlocks = kMinBlocks<T, C> == 4 ? 3 : kMinBlocks<T, C>;
#else
template <class T, int C>
constexpr int kMinLossBlocks = kMinBlocks<T, C>;
#endif

// Each block loops over tiles.
template <class T, int C, Transform kTransform>
__global__ void __launch_bounds__(kThreads, kMinLossBlocks<T, C>) loss(const LossParams a) {
  FLOWSEG_CODE_TILE(T, C, rows);
  __shared__ LossScratch<T, C> scratch;
  initialise(a, scratch);
  auto staged = stage_codes<kTransform>(a.correction, a.codes, rows);
#pragma unroll 1
  for (unsigned tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    loss_tile<T, C, kTransform>(a, tile, staged, scratch);
  }
  const double sum = block_sum(scratch.partial[threadIdx.x].sum), count = block_sum(scratch.partial[threadIdx.x].count);
  if (threadIdx.x == 0) a.partials[blockIdx.x] = {sum, count};
}

// Adds up the blocks' partial sums. A single block.
static __global__ void __launch_bounds__(kThreads) finish_loss(const LossParams a) {
  const double count = strided_sum(&a.partials->count, a.loss_blocks, 2);
  const double sum = strided_sum(&a.partials->sum, a.loss_blocks, 2);
  if (threadIdx.x != 0) return;
  *a.count = a.residual_is_divided ? 1 : static_cast<int64_t>(count);
  const double value[1] = {a.mean && count > 0 ? sum / count : sum};
  if (a.loss.data) store_plane<true>(a.loss, 0, {0, 0, 1}, value);
}

struct ScaleParams {
  InputImage residual;   // (B, C, H, W)
  const void* grad;      // the incoming gradient in the compute dtype: one number, or (B, H, W) for Reduction::none
  int64_t stride[3];     // of grad; zeros for one number
  const int64_t* count;  // number of valid pixels for Reduction::mean, else null
  OutputImage out;       // (B, C, H, W)
  bool in_place;         // out is the residual
  unsigned blocks_per_image = 0;
};

constexpr int kScalePixels = 8;  // per thread

template <class T>
__global__ void __launch_bounds__(kThreads) scale(const ScaleParams a) {
  constexpr int P = kScalePixels;
  const PixelRun run = run_of_block<P>(a.out.pixels, a.blocks_per_image);
  const T* grad = static_cast<const T*>(a.grad) + run.image * a.stride[0];
  const double inverse_count = a.count ? 1.0 / static_cast<double>(*a.count > 0 ? *a.count : 1) : 1.0;
  // The residual already is the gradient.
  if (a.in_place && static_cast<T>(*grad * inverse_count) == 1) return;
  T factor[P] = {};
  const Offsets<P> grad_offsets = offsets_of<P>(run, {false, false}, a.residual.width, a.stride[1], a.stride[2]);
#pragma unroll
  for (int p = 0; p < P; ++p) {
    if (p < run.count) factor[p] = static_cast<T>(grad[grad_offsets.at[p]] * inverse_count);
  }
  const Offsets<P> offsets = offsets_of<P>(run, a.residual);
  for (int64_t c = 0; c < a.residual.channels; ++c) {
    T r[P];
    load_plane(a.residual, c, run, offsets, r);
#pragma unroll
    for (int p = 0; p < P; ++p) r[p] *= factor[p];
    store_plane(a.out, c, run, r);
  }
}

// Calls body(kernel, pixels per thread) with the kernel `loss` for the dtype, channels and transform.
template <class Body>
void for_loss_kernel(const LossParams& a, Body body) {
  for_type_and_channels(a.prediction.type, a.codes.channels, [&]<class T, int C>() {
    for_transform(a.correction.transform, [&]<Transform kTransform>() { body(loss<T, C, kTransform>, kCorrectionPixels<T, C>); });
  });
}

// Fills in the sizes of the launches. `partials` then needs loss_blocks + count_blocks entries.
template <class Launch>
void plan_loss(LossParams& a, const Launch& launch) {
  const int64_t pixels = a.prediction.height * a.prediction.width;
  const auto tile = [&](int pixels_per_thread, unsigned& tiles, unsigned& tiles_per_image) {
    const int64_t per_image = blocks_per_image(pixels, pixels_per_thread);
    tiles_per_image = static_cast<unsigned>(per_image);
    tiles = static_cast<unsigned>(per_image * a.prediction.batch);
    return per_image * a.prediction.batch;
  };
  for_loss_kernel(a, [&](auto kernel, int pixels_per_thread) {
    a.loss_blocks = launch.resident_blocks(kernel, tile(pixels_per_thread, a.tiles, a.tiles_per_image));
  });
  if (a.residual_is_divided) {
    a.count_blocks = launch.resident_blocks(count_valid, tile(kCountPixels, a.count_tiles, a.count_tiles_per_image));
  }
}

template <class Launch>
void launch_loss(const LossParams& a, const Launch& launch) {
  if (a.residual_is_divided) launch(count_valid, a.count_blocks, 0, a);
  for_loss_kernel(a, [&](auto kernel, int) { launch(kernel, a.loss_blocks, 0, a); });
  launch(finish_loss, 1, 0, a);
}

template <class Launch>
void launch_scale(ScaleParams a, const Launch& launch) {
  const int64_t blocks = blocks_per_image(a.out.pixels, kScalePixels);
  a.blocks_per_image = static_cast<unsigned>(blocks);
  for_type(a.residual.type, [&]<class T>() { launch(scale<T>, blocks * a.residual.batch, 0, a); });
}

}  // namespace flowseg::cuda
