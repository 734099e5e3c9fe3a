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
  unsigned blocks;  // an image
};

template <class T, int C, Transform kind>
__global__ void __launch_bounds__(kThreads, C == 8 ? 3 : 0) correct(const Correct a) {
  constexpr int P = kPixels<T, C>;
  FLOWSEG_TILE(T, C, tile);
  const Place place = place_of<P>(a.out.pixels, a.blocks);
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
  correct_pixels<kind>(a.correction, a.codes, tile, x, y, grad);
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
      const int64_t blocks = blocks_an_image(a.out.pixels, kPixels<T, C>);
      a.blocks = static_cast<unsigned>(blocks);
      launch(correct<T, C, kind>, blocks * a.x.batch, 0, a);
    });
  });
}

}  // namespace flowseg::cuda
