// nearest_centroid on a GPU.
#pragma once

#include <algorithm>

#include "cuda/decode.cuh"
#include "cuda/decode_guesses.cuh"
#include "cuda/params.h"

namespace flowseg::cuda {

struct DecodeParams {
  InputImage x;      // (B, C, H, W)
  InputCodes codes;  // (K, C)
  Tables tables;
  int64_t ignore;
  void* labels;  // (B, H, W) contiguous
  Integer label_type;
  bool label_vector;                 // every run of labels starts at a multiple of 16 bytes
  OutputImage distance{}, margin{};  // (B, H, W); data null if not needed
  unsigned blocks_per_image = 0;     // of decode_by_search and decode_by_guesses
  Tiling tiling{};                   // of decode_by_grid
};

template <class S, int P>
__device__ __forceinline__ void store_labels_as(const DecodeParams& a, const PixelRun& run, const int (&label)[P]) {
  Packed<S, P> packed;
#pragma unroll
  for (int p = 0; p < P; ++p) packed.at[p] = static_cast<S>(label[p] < 0 ? a.ignore : label[p]);
  store_run<S, P>(static_cast<S*>(a.labels) + run.image * a.x.height * a.x.width, a.label_vector, run, packed);
}

template <int P>
__device__ __forceinline__ void store_labels(const DecodeParams& a, const PixelRun& run, const int (&label)[P]) {
  switch (a.label_type) {
    case Integer::u8: return store_labels_as<uint8_t>(a, run, label);
    case Integer::i16: return store_labels_as<int16_t>(a, run, label);
    case Integer::i32: return store_labels_as<int32_t>(a, run, label);
    case Integer::i64: return store_labels_as<int64_t>(a, run, label);
  }
}

// Stores the labels and the wanted ones of distance and margin, from squared distances.
template <bool kSecond, class T, int P>
__device__ __forceinline__ void store_results(const DecodeParams& a, const PixelRun& run, const int (&label)[P], T (&nearest)[P],
                                              T (&second)[P]) {
  store_labels(a, run, label);
  if (!kSecond && !a.distance.data) return;
#pragma unroll
  for (int p = 0; p < P; ++p) {
    nearest[p] = std::sqrt(nearest[p]);
    if constexpr (kSecond) second[p] = std::sqrt(second[p]) - nearest[p];
  }
  if (a.distance.data) store_plane(a.distance, 0, run, nearest);
  if constexpr (kSecond) store_plane(a.margin, 0, run, second);
}

// The results of decoding by grid, besides the label.
enum class Measure { none, distance, margin };

// A thread that measures needs some more registers than two blocks of kGridThreads have.
template <Measure kMeasure>
constexpr int kDecodeThreads = kMeasure == Measure::none ? kGridThreads : kMeasuredThreads;

template <Measure kMeasure, bool kWords, class S>
__global__ void __launch_bounds__(kDecodeThreads<kMeasure>, kMeasure == Measure::none ? 2 : 3)
    decode_by_grid(const DecodeParams a) {
  constexpr bool kSecond = kMeasure == Measure::margin;
  constexpr int kBlock = kDecodeThreads<kMeasure>;
  FLOWSEG_DYNAMIC_CODES(rows);
  if constexpr (kWords) stage_rows<kBlock>(a.codes, rows);
  for_each_run<kBlock, kLookupPixels>(a.tiling, a.x.height * a.x.width, [&](const PixelRun& run) {
    RawPixels<S> x;
    int label[kLookupPixels];
    float nearest[kLookupPixels], second[kLookupPixels];
    x.load(a.x, run);
    look_up<kSecond, kWords>(a.tables.grid, a.codes, rows, x, label, nearest, second);
    if constexpr (kMeasure == Measure::none) {
      store_labels(a, run, label);
    } else {
      if constexpr (kMeasure == Measure::distance) distances_to_classes<kWords>(a.codes, rows, x, label, nearest);
      store_results<kSecond>(a, run, label, nearest, second);
    }
  });
}

template <class T, int C, bool kSecond>
__global__ void __launch_bounds__(kThreads) decode_by_search(const DecodeParams a) {
  constexpr int P = kSearchPixels<T, C>;
  FLOWSEG_CODE_TILE(T, C, tile);
  const PixelRun run = run_of_block<P>(a.x.height * a.x.width, a.blocks_per_image);
  T x[C][P], nearest[P], second[P];
  int label[P];
  load_points(a.x, a.codes.channels, run, x);
  search<kSecond>(a.codes, tile, x, label, nearest, second);
  store_results<kSecond>(a, run, label, nearest, second);
}

// ptxas would spill to fit more blocks: a thread takes up to 96 registers, more with the second nearest or with 16 channels.
template <class T, int C, bool kSecond>
__global__ void __launch_bounds__(kThreads, C > 8 ? 3 : kSecond ? 4 : 5) decode_by_guesses(const DecodeParams a) {
  FLOWSEG_CODE_TILE(T, C, tile);
  FLOWSEG_AXES(C, axes);
  stage_axes<C>(a.tables.guesses, a.codes.channels, axes);
  const auto first = run_of_block<kGuessPixels<C>>(a.x.height * a.x.width, a.blocks_per_image);
  decode_tile<kSecond, false>(GuessTables<C>{a.codes, a.tables.guesses, axes}, a.x, tile, first,
                              [&](const PixelRun& run, const auto& label, auto& nearest, auto& second) {
                                store_results<kSecond>(a, run, label, nearest, second);
                              });
}

template <Measure kMeasure, class Launch>
void launch_decode_by_grid(DecodeParams a, const Launch& launch) {
  // Give each block many tiles: it first copies the codes to shared memory, and it ends only when its slowest warp ends.
  constexpr int64_t kMaxTilesPerBlock = 64;
  constexpr int kBlock = kDecodeThreads<kMeasure>;
  const Device device = launch.device();
  const int64_t resident_blocks = std::max<int64_t>(1, device.threads / kBlock) * device.multiprocessors;
  a.tiling = tiling_of(a.x.batch, a.x.height * a.x.width, int64_t{kBlock} * kLookupPixels, resident_blocks, kMaxTilesPerBlock);
  for_half_or_float(a.x.type, [&]<class S>() {
    if constexpr (kMeasure != Measure::margin) {  // a grid for the margin has no words
      if (has_words(a.codes)) {
        return launch.with_threads(kBlock, decode_by_grid<kMeasure, true, S>, blocks_of(a.tiling), staged_bytes(a.codes), a);
      }
    }
    launch.with_threads(kBlock, decode_by_grid<kMeasure, false, S>, blocks_of(a.tiling), 0, a);
  });
}

template <class Launch>
void launch_decode(DecodeParams a, const Launch& launch) {
  if (a.tables.grid.cells && a.x.type != Real::f64) {
    return a.margin.data     ? launch_decode_by_grid<Measure::margin>(a, launch)
           : a.distance.data ? launch_decode_by_grid<Measure::distance>(a, launch)
                             : launch_decode_by_grid<Measure::none>(a, launch);
  }
  const auto launch_tiles = [&](auto kernel, int pixels_per_thread) {
    const int64_t blocks = blocks_per_image(a.x.height * a.x.width, pixels_per_thread);
    a.blocks_per_image = static_cast<unsigned>(blocks);
    launch(kernel, blocks * a.x.batch, 0, a);
  };
  if (has_guesses(a.tables.guesses, a.x)) {
    return for_guessed_channels(a.codes.channels, [&]<class T, int C>() {
      a.margin.data ? launch_tiles(decode_by_guesses<T, C, true>, kGuessPixels<C>)
                    : launch_tiles(decode_by_guesses<T, C, false>, kGuessPixels<C>);
    });
  }
  for_type_and_channels(a.x.type, a.codes.channels, [&]<class T, int C>() {
    a.margin.data ? launch_tiles(decode_by_search<T, C, true>, kSearchPixels<T, C>)
                  : launch_tiles(decode_by_search<T, C, false>, kSearchPixels<T, C>);
  });
}

}  // namespace flowseg::cuda
