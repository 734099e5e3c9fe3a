// nearest_centroid on a GPU.
#pragma once

#include "cuda/decode.cuh"
#include "cuda/dispatch.h"

namespace flowseg::cuda {

struct Decode {
  Source x;
  Codes codes;
  Grid grid;
  int64_t ignore;
  void* labels;  // contiguous (B, H, W)
  Integer label_type;
  bool label_vector;
  Target distance, margin;  // (B, H, W); data null when not needed
  unsigned blocks;          // an image
};

template <class S, int P>
__device__ __forceinline__ void store_labels_as(const Decode& a, const Place& place, const int (&label)[P]) {
  Packed<S, P> run;
#pragma unroll
  for (int p = 0; p < P; ++p) run.at[p] = static_cast<S>(label[p] < 0 ? a.ignore : label[p]);
  store_run<S, P>(static_cast<S*>(a.labels) + place.image * a.x.height * a.x.width, a.label_vector, place, run);
}

template <int P>
__device__ __forceinline__ void store_labels(const Decode& a, const Place& place, const int (&label)[P]) {
  switch (a.label_type) {
    case Integer::u8: return store_labels_as<uint8_t>(a, place, label);
    case Integer::i16: return store_labels_as<int16_t>(a, place, label);
    case Integer::i32: return store_labels_as<int32_t>(a, place, label);
    case Integer::i64: return store_labels_as<int64_t>(a, place, label);
  }
}

static __global__ void __launch_bounds__(kThreads) decode_by_grid(const Decode a) {
  const Place place = place_of<kLookedUp>(a.x.height * a.x.width, a.blocks);
  float x[3][kLookedUp];
  int label[kLookedUp];
  load_points(a.x, 3, place, x);
  look_up(a.grid, a.codes, x, label);
  store_labels(a, place, label);
}

template <class T, int C, bool kSecond>
__global__ void __launch_bounds__(kThreads) decode_by_search(const Decode a) {
  constexpr int P = kSearched<T, C>;
  FLOWSEG_TILE(T, C, tile);
  const Place place = place_of<P>(a.x.height * a.x.width, a.blocks);
  T x[C][P], nearest[P], second[P];
  int label[P];
  load_points(a.x, a.codes.channels, place, x);
  search<kSecond>(a.codes, tile, x, label, nearest, second);
  store_labels(a, place, label);
#pragma unroll
  for (int p = 0; p < P; ++p) {
    nearest[p] = std::sqrt(nearest[p]);
    if constexpr (kSecond) second[p] = std::sqrt(second[p]) - nearest[p];
  }
  if (a.distance.data) store_plane(a.distance, 0, place, nearest);
  if constexpr (kSecond) store_plane(a.margin, 0, place, second);
}

template <class Launch>
void launch_decode(Decode a, Launch launch) {
  const int64_t pixels = a.x.height * a.x.width;
  const auto go = [&](auto kernel, int pixels_a_thread) {
    const int64_t blocks = blocks_an_image(pixels, pixels_a_thread);
    a.blocks = static_cast<unsigned>(blocks);
    launch(kernel, blocks * a.x.batch, 0, a);
  };
  if (a.grid.cells && a.x.type != Real::f64 && !a.distance.data && !a.margin.data) return go(decode_by_grid, kLookedUp);
  for_type_and_channels(a.x.type, a.codes.channels, [&]<class T, int C>() {
    a.margin.data ? go(decode_by_search<T, C, true>, kSearched<T, C>) : go(decode_by_search<T, C, false>, kSearched<T, C>);
  });
}

}  // namespace flowseg::cuda
