// nearest_centroid on a GPU.
#pragma once

#include <algorithm>

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
  Parts parts;              // by the grid
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

template <bool kWords, class S>
__global__ void __launch_bounds__(kWide, 2) decode_by_grid(const Decode a) {
  FLOWSEG_DYNAMIC_ROWS(rows);
  if constexpr (kWords) stage_rows<kWide>(a.codes, rows);
  for_each_place<kWide, kLookedUp>(a.parts, a.x.height * a.x.width, [&](const Place& place) {
    Points<S> x;
    int label[kLookedUp];
    x.load(a.x, place);
    look_up<kWords>(a.grid, a.codes, rows, x, label);
    store_labels(a, place, label);
  });
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
void launch_decode_by_grid(Decode a, const Launch& launch) {
  // Blocks stay, as each begins by reading codes into shared memory and ends when its slowest warp does.
  constexpr int64_t kMostParts = 64;
  const Device device = launch.device();
  const bool words = has_words(a.codes);
  const int64_t at_once = std::max<int64_t>(1, device.threads / kWide) * device.multiprocessors;
  a.parts = parts_of(a.x.batch, a.x.height * a.x.width, int64_t{kWide} * kLookedUp, at_once, kMostParts);
  for_half_or_float(a.x.type, [&]<class S>() {
    launch.of_threads(kWide, words ? decode_by_grid<true, S> : decode_by_grid<false, S>, blocks_of(a.parts), row_bytes(a.codes), a);
  });
}

template <class Launch>
void launch_decode(Decode a, const Launch& launch) {
  if (a.grid.cells && a.x.type != Real::f64 && !a.distance.data && !a.margin.data) return launch_decode_by_grid(a, launch);
  const int64_t pixels = a.x.height * a.x.width;
  const auto go = [&](auto kernel, int pixels_a_thread) {
    const int64_t blocks = blocks_an_image(pixels, pixels_a_thread);
    a.blocks = static_cast<unsigned>(blocks);
    launch(kernel, blocks * a.x.batch, 0, a);
  };
  for_type_and_channels(a.x.type, a.codes.channels, [&]<class T, int C>() {
    a.margin.data ? go(decode_by_search<T, C, true>, kSearched<T, C>) : go(decode_by_search<T, C, false>, kSearched<T, C>);
  });
}

}  // namespace flowseg::cuda
