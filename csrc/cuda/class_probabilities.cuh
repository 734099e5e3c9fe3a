// class_probabilities on a GPU.
#pragma once

#include "cuda/params.h"
#include "cuda/probabilities.cuh"

namespace flowseg::cuda {

struct ProbabilityParams {
  InputImage x;      // (B, C, H, W)
  InputCodes codes;  // (K, C)
  Correction correction;
  int form;         // a Form
  OutputImage out;  // (B, K, H, W)
  bool fast = false;
  unsigned blocks_per_image = 0;
};

// Writes value(row of centroids) for every class.
template <class T, int C, int P, class Value>
__device__ __forceinline__ void write_classes(const ProbabilityParams& a, const CodeTile<T, C>& tile, const PixelRun& run,
                                              bool& staged, Value value) {
  for_each_part(a.codes, tile, staged, [&](int first, int count) {
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      const Pack<T, P> found = value(tile[k]);
      store_plane(a.out, first + k, run, found.at);
    }
  });
}

template <Transform transform, class T, int C, int P>
__device__ __forceinline__ void write_exponentials(const ProbabilityParams& a, const CodeTile<T, C>& tile, const PixelRun& run,
                                                   const Pack<T, P> (&x)[C]) {
  using V = Pack<T, P>;
  const T eps = static_cast<T>(a.correction.eps), inverse_temperature = static_cast<T>(1 / a.correction.temperature);
  const auto form = static_cast<Form>(a.form);
  bool staged = false;
  // The term to subtract from a logit, and the factor after the exponential. Both carry NaN of pixels that are not finite.
  V shift = squared_norm<C>(x) * T(0), share{};
  if (form != Form::logits) {
    V smallest = V{} + infinity<T>(), total{};
    for_each_part(a.codes, tile, staged, [&](int, int count) { find_smallest_distance<C>(x, tile, count, smallest); });
    const V largest = logit_of<transform>(smallest, eps, inverse_temperature);
    for_each_part(a.codes, tile, staged, [&](int, int count) {
      add_exponentials<transform, C>(x, tile, count, eps, inverse_temperature, largest, total);
    });
    share = V{} + T(1);
    share = share / total + shift;
    shift = form == Form::probabilities ? largest : shift + largest + logarithm(total);
  }
  write_classes<T, C, P>(a, tile, run, staged, [&](const CodeRow<T, C>& row) {
    const V logit = logit_of<transform>(squared_distance<C>(x, row), eps, inverse_temperature) - shift;
    return form == Form::probabilities ? exponential(logit) * share : logit;
  });
}

template <class T, int C>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 4) write_probabilities(const ProbabilityParams a) {
  constexpr int P = kCorrectionPixels<T, C>;
  using V = Pack<T, P>;
  FLOWSEG_CODE_TILE(T, C, tile);
  const PixelRun run = run_of_block<P>(a.out.pixels, a.blocks_per_image);
  V x[C];
  load_packs(a.x, a.codes.channels, run, x);
  if (a.fast) {
    const T eps = static_cast<T>(a.correction.eps);
    bool staged = false;
    V total{};
    for_each_part(a.codes, tile, staged, [&](int, int count) { add_weights<C>(x, tile, count, eps, total); });
    // A true division: the sum of far points may lie beyond the range of the fast reciprocal.
    const V share = T(1) / total;
    write_classes<T, C, P>(a, tile, run, staged, [&](const CodeRow<T, C>& row) {
      return reciprocal(squared_distance<C>(x, row) + eps) * share;
    });
  } else {
    for_transform_of(a.correction, [&]<Transform transform>() { write_exponentials<transform>(a, tile, run, x); });
  }
}

template <class Launch>
void launch_probabilities(ProbabilityParams a, const Launch& launch) {
  a.fast = a.form == static_cast<int>(Form::probabilities) && takes_reciprocals(a.correction);
  for_type_and_channels(a.x.type, a.codes.channels, [&]<class T, int C>() {
    const int64_t blocks = blocks_per_image(a.out.pixels, kCorrectionPixels<T, C>);
    a.blocks_per_image = static_cast<unsigned>(blocks);
    launch(write_probabilities<T, C>, blocks * a.x.batch, 0, a);
  });
}

}  // namespace flowseg::cuda
