// Functions that class_probabilities and top_classes share on a GPU. P pixels of one thread are one value, a Pack of
// cuda/correction.cuh.
#pragma once

#include "cuda/correction.cuh"
#include "shared/probabilities.h"

namespace flowseg::cuda {

// Calls body.template operator()<transform>() in a kernel. All threads take the same branch, and a kernel per transform would
// make the library four times as large for transforms that are rarely used.
template <class Body>
__device__ __forceinline__ void for_transform_of(const Correction& options, Body body) {
  switch (static_cast<Transform>(options.transform)) {
    case Transform::neg_log: return body.template operator()<Transform::neg_log>();
    case Transform::neg_sq: return body.template operator()<Transform::neg_sq>();
    case Transform::neg_dist: return body.template operator()<Transform::neg_dist>();
    case Transform::inverse: return body.template operator()<Transform::inverse>();
  }
}

// Loads a run of pixels; channels that the image does not have are 0.
template <class T, int C, int P>
__device__ __forceinline__ void load_packs(const InputImage& from, int channels, const PixelRun& run, Pack<T, P> (&x)[C]) {
  const Offsets<P> offsets = offsets_of<P>(run, from);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (c < channels) {
      load_plane(from, c, run, offsets, x[c].at);
    } else {
      x[c] = Pack<T, P>{};
    }
  }
}

}  // namespace flowseg::cuda
