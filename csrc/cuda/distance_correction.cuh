// distance_correction on a GPU.
#pragma once

#include "cuda/correct.cuh"
#include "cuda/dispatch.h"
#include "cuda/pixels.cuh"

namespace flowseg::cuda {

struct Correct {
  Source x;
  Labels labels;
  Codes codes;
  Correction correction;
  Target out;
  unsigned tiles_an_image;
};

// One block per tile of pixels. Fewer blocks that go from tile to tile stage the codes less often, but took 4 % longer in a program
// that timed both on an H100: each has the same number of tiles, and the last ones to end keep the others waiting.
template <class T, int C, Transform kind>
__global__ void __launch_bounds__(kThreads, kResident<T, C>) correct(const Correct a) {
  FLOWSEG_TILE(T, C, rows);
  auto staged = stage_codes<kind>(a.correction, a.codes, rows);
  constexpr int P = kPixels<T, C>;
  unsigned tile = blockIdx.x;
  Place place = place_at<P>(a.out.pixels, a.tiles_an_image, tile);
  Pack<T, P> x[C], grad[C];
  Pack<int, P> y;
  const Offsets<P> offsets = offsets_of<P>(place, a.x);
  load_labels(a.labels, a.codes.classes, place, y.at);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (c < a.codes.channels) {
      load_plane(a.x, c, place, offsets, x[c].at);
    } else {
      x[c] = Pack<T, P>{};
    }
  }
  forget(tile);
  correct_pixels<kind>(a.correction, a.codes, staged, x, y, grad);
  place = place_at<P>(a.out.pixels, a.tiles_an_image, tile);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    FLOWSEG_EACH(P) grad[c].at[p] = y.at[p] >= 0 ? grad[c].at[p] : T(0);
    if (c < a.codes.channels) store_plane(a.out, c, place, grad[c].at);
  }
}

template <class Launch>
void launch_correct(Correct a, Launch launch) {
  for_type_and_channels(a.x.type, a.codes.channels, [&]<class T, int C>() {
    for_transform(a.correction.transform, [&]<Transform kind>() {
      const int64_t tiles = blocks_an_image(a.out.pixels, kPixels<T, C>);
      a.tiles_an_image = static_cast<unsigned>(tiles);
      launch(correct<T, C, kind>, tiles * a.x.batch, 0, a);
    });
  });
}

}  // namespace flowseg::cuda
