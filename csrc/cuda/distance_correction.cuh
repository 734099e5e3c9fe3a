// distance_correction on a GPU.
#pragma once

#include "cuda/correction.cuh"
#include "cuda/params.h"
#include "cuda/pixels.cuh"

namespace flowseg::cuda {

struct CorrectionParams {
  InputImage x;        // (B, C, H, W)
  InputLabels labels;  // (B, H, W)
  InputCodes codes;    // (K, C)
  Correction correction;
  OutputImage out;  // (B, C, H, W)
  unsigned tiles_per_image = 0;
};

// One block per tile of pixels. Fewer blocks that loop over tiles would stage the codes less often, but took 4 % longer in a
// program that timed both on an H100: all blocks have the same number of tiles, so the GPU idles while the last ones finish.
template <class T, int C, Transform kTransform>
__global__ void __launch_bounds__(kThreads, kMinBlocks<T, C>) correct(const CorrectionParams a) {
  FLOWSEG_CODE_TILE(T, C, rows);
  auto staged = stage_codes<kTransform>(a.correction, a.codes, rows);
  constexpr int P = kCorrectionPixels<T, C>;
  unsigned tile = blockIdx.x;
  PixelRun run = run_in_batch<P>(a.out.pixels, a.tiles_per_image, tile);
  Pack<T, P> x[C], grad[C];
  Pack<int, P> y;
  const Offsets<P> offsets = offsets_of<P>(run, a.x);
  load_labels(a.labels, a.codes.classes, run, y.at);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (c < a.codes.channels) {
      load_plane(a.x, c, run, offsets, x[c].at);
    } else {
      x[c] = Pack<T, P>{};
    }
  }
  compiler_barrier(tile);
  correct_pixels<kTransform>(a.correction, a.codes, staged, x, y, grad);
  run = run_in_batch<P>(a.out.pixels, a.tiles_per_image, tile);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    FLOWSEG_EACH(P) grad[c].at[p] = y.at[p] >= 0 ? grad[c].at[p] : T(0);
    if (c < a.codes.channels) store_plane(a.out, c, run, grad[c].at);
  }
}

template <class Launch>
void launch_correction(CorrectionParams a, const Launch& launch) {
  for_type_and_channels(a.x.type, a.codes.channels, [&]<class T, int C>() {
    for_transform(a.correction.transform, [&]<Transform kTransform>() {
      const int64_t tiles = blocks_per_image(a.out.pixels, kCorrectionPixels<T, C>);
      a.tiles_per_image = static_cast<unsigned>(tiles);
      launch(correct<T, C, kTransform>, tiles * a.x.batch, 0, a);
    });
  });
}

}  // namespace flowseg::cuda
