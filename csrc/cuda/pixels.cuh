// Loads and stores runs of neighbouring pixels, of any dtype and strides, between memory and the registers of a thread.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/params.h"
#include "shared/types.h"

namespace flowseg::cuda {

// The pixels of one thread: `count` pixels of one image from flat position `first` on. A tile is the runs of all threads of a
// block. A tile lies in one image, so its pixels share one t.
struct PixelRun {
  int64_t image, first;
  int count;
};

inline int64_t blocks_per_image(int64_t pixels, int pixels_per_thread) {
  const int64_t pixels_per_block = int64_t{kThreads} * pixels_per_thread;
  return (pixels + pixels_per_block - 1) / pixels_per_block;
}

// The thread's run in tile `tile` of an image, P pixels per thread.
template <int P>
__device__ __forceinline__ PixelRun run_in_image(int64_t pixels, unsigned image, unsigned tile, int threads) {
  PixelRun run{image, (static_cast<int64_t>(tile) * threads + threadIdx.x) * P, 0};
  if (FLOWSEG_PLANTED(overrun)) pixels += P;
  const int64_t left = pixels - run.first;
  run.count = left >= P ? P : left > 0 ? static_cast<int>(left) : 0;
  return run;
}

// The thread's run in a tile that is counted over the whole batch.
template <int P>
__device__ __forceinline__ PixelRun run_in_batch(int64_t pixels, unsigned tiles_per_image, unsigned tile) {
  const unsigned image = tile / tiles_per_image;
  return run_in_image<P>(pixels, image, tile - image * tiles_per_image, kThreads);
}

// The thread's run where each block has one tile.
template <int P>
__device__ __forceinline__ PixelRun run_of_block(int64_t pixels, unsigned blocks_per_image) {
  return run_in_batch<P>(pixels, blocks_per_image, blockIdx.x);
}

// A batch cut into tiles. Each block processes `tiles_per_block` consecutive tiles, which may belong to different images. 32 bits
// are enough: 2^31 tiles would be more than a terabyte of pixels.
struct Tiling {
  unsigned tiles_per_image, tiles;
  unsigned tiles_per_block;
};

// Return the tiling with `resident_blocks` blocks, or with more if a block would otherwise exceed `max_tiles_per_block`.
inline Tiling tiling_of(int64_t images, int64_t pixels, int64_t pixels_per_tile, int64_t resident_blocks,
                        int64_t max_tiles_per_block) {
  const int64_t tiles_per_image = (pixels + pixels_per_tile - 1) / pixels_per_tile, tiles = tiles_per_image * images;
  const int64_t wanted = (tiles + resident_blocks - 1) / resident_blocks;
  return {.tiles_per_image = static_cast<unsigned>(tiles_per_image),
          .tiles = static_cast<unsigned>(tiles),
          .tiles_per_block = static_cast<unsigned>(std::max<int64_t>(1, std::min(wanted, max_tiles_per_block)))};
}
inline int64_t blocks_of(const Tiling& tiling) {
  return (int64_t{tiling.tiles} + tiling.tiles_per_block - 1) / tiling.tiles_per_block;
}

// Calls use(run) for the thread's run in each of the block's tiles.
template <int kBlock, int P, class Use>
__device__ __forceinline__ void for_each_run(const Tiling& tiling, int64_t pixels, Use use) {
  const unsigned first = blockIdx.x * tiling.tiles_per_block, left = tiling.tiles - first;
  unsigned image = first / tiling.tiles_per_image, tile = first - image * tiling.tiles_per_image;
#pragma unroll 1
  for (unsigned steps = left < tiling.tiles_per_block ? left : tiling.tiles_per_block; steps > 0; --steps) {
    use(run_in_image<P>(pixels, image, tile, kBlock));
    if (++tile == tiling.tiles_per_image) {
      tile = 0;
      ++image;
    }
  }
}

// P neighbouring elements, aligned for loads of up to 16 bytes.
template <class S, int P>
struct alignas(sizeof(S) * P < 16 ? sizeof(S) * P : 16) Packed {
  S at[P];
};

// Positions of a run's pixels in a plane, in elements. Not filled in where the run is read as one vector.
template <int P>
struct Offsets {
  int64_t at[P];
};

template <int P>
__device__ __forceinline__ Offsets<P> offsets_of(const PixelRun& run, const Layout& layout, int64_t width, int64_t stride_row,
                                                 int64_t stride_column) {
  Offsets<P> offsets{};
  if (layout.vector && run.count == P) return offsets;
  const int64_t row = layout.flat ? 0 : run.first / width;  // a flat plane saves the division
  int64_t column = run.first - row * width, start = row * stride_row;
  const int64_t step = layout.flat ? 1 : stride_column;
#pragma unroll
  for (int p = 0; p < P; ++p) {
    offsets.at[p] = start + column * step;
    if (++column == width && !layout.flat) {
      column = 0;
      start += stride_row;
    }
  }
  return offsets;
}
template <int P>
__device__ __forceinline__ Offsets<P> offsets_of(const PixelRun& run, const InputImage& from) {
  return offsets_of<P>(run, from.layout, from.width, from.stride[2], from.stride[3]);
}
template <int P>
__device__ __forceinline__ Offsets<P> offsets_of(const PixelRun& run, const InputLabels& from) {
  return offsets_of<P>(run, from.layout, from.width, from.stride[1], from.stride[2]);
}

// Calls use(p, element) with each element of a run in a plane.
template <class S, int P, class Use>
__device__ __forceinline__ void load_run(const S* __restrict__ plane, const PixelRun& run, const Offsets<P>& offsets, bool vector,
                                         Use use) {
  if (vector && run.count == P) {
    const auto packed = *reinterpret_cast<const Packed<S, P>*>(plane + run.first);
#pragma unroll
    for (int p = 0; p < P; ++p) use(p, packed.at[p]);
  } else {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      if (p < run.count) use(p, plane[offsets.at[p]]);
    }
  }
}

// Prefetches into the L2 cache what a later tile reads.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* at) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}
__device__ __forceinline__ void prefetch_run(const void* plane, const Layout& layout, const PixelRun& run, int64_t size) {
  if (layout.flat && run.count > 0) prefetch(static_cast<const char*>(plane) + run.first * size);
}
__device__ __forceinline__ void prefetch_labels(const InputLabels& from, const PixelRun& run) {
  const int64_t size = size_of(from.type);
  prefetch_run(static_cast<const char*>(from.data) + run.image * from.stride[0] * size, from.layout, run, size);
}
template <int C>
__device__ __forceinline__ void prefetch_planes(const InputImage& from, int channels, const PixelRun& run) {
  const int64_t size = size_of(from.type);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int64_t start = run.image * from.stride[0] + c * from.stride[1];
    if (c < channels) prefetch_run(static_cast<const char*>(from.data) + start * size, from.layout, run, size);
  }
}

template <class S, class T, int P>
__device__ __forceinline__ void load_plane_as(const InputImage& from, int64_t channel, const PixelRun& run,
                                              const Offsets<P>& offsets, T (&to)[P]) {
  const S* plane = static_cast<const S*>(from.data) + run.image * from.stride[0] + channel * from.stride[1];
  load_run<S, P>(plane, run, offsets, from.layout.vector, [&](int p, S v) { to[p] = static_cast<T>(widen(v)); });
}

// Loads one channel of a run; pixels past the end are 0. T is double for images of doubles and float for all others, so one of the
// two groups of dtypes is compiled out. kAny: compile all dtypes, for an image whose dtype does not determine T.
template <bool kAny = false, class T, int P>
__device__ __forceinline__ void load_plane(const InputImage& from, int64_t channel, const PixelRun& run, const Offsets<P>& offsets,
                                           T (&to)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) to[p] = 0;
  if constexpr (kAny || sizeof(T) == 8) {
    if (!kAny || from.type == Real::f64) return load_plane_as<double>(from, channel, run, offsets, to);
  }
  if constexpr (kAny || sizeof(T) == 4) {
    switch (from.type) {
      case Real::f32: return load_plane_as<float>(from, channel, run, offsets, to);
      case Real::f16: return load_plane_as<Half>(from, channel, run, offsets, to);
      case Real::bf16: return load_plane_as<BFloat>(from, channel, run, offsets, to);
      case Real::f64: return;
    }
  }
}

// A plain store of a whole run would be split again: the compiler merges it with the stores of single elements in the other branch.
template <class Run>
__device__ __forceinline__ void store_whole(void* to, const Run& packed) {
#ifdef __CUDACC__
  constexpr int kBytes = sizeof(Run);
  using Word = std::conditional_t<kBytes % 16 == 0, uint4, std::conditional_t<kBytes == 8, uint2, unsigned>>;
  if constexpr (kBytes >= 4) {
    Word words[kBytes / sizeof(Word)];
    memcpy(words, &packed, kBytes);
#pragma unroll
    for (int i = 0; i < static_cast<int>(kBytes / sizeof(Word)); ++i) __stwb(static_cast<Word*>(to) + i, words[i]);
    return;
  }
#endif
  *static_cast<Run*>(to) = packed;
}

template <class S, int P>
__device__ __forceinline__ void store_run(S* plane, bool vector, const PixelRun& run, const Packed<S, P>& packed) {
  if (vector && run.count == P) {
    store_whole(plane + run.first, packed);
  } else {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      if (p < run.count) plane[run.first + p] = packed.at[p];
    }
  }
}

template <class S, class T, int P>
__device__ __forceinline__ void store_plane_as(const OutputImage& to, int64_t channel, const PixelRun& run, const T (&from)[P]) {
  Packed<S, P> packed;
#pragma unroll
  for (int p = 0; p < P; ++p) narrow(from[p], packed.at[p]);
  store_run<S, P>(static_cast<S*>(to.data) + (run.image * to.channels + channel) * to.pixels, to.vector, run, packed);
}

// Stores one channel of a run. kAny: as for load_plane.
template <bool kAny = false, class T, int P>
__device__ __forceinline__ void store_plane(const OutputImage& to, int64_t channel, const PixelRun& run, const T (&from)[P]) {
  if constexpr (kAny || sizeof(T) == 8) {
    if (!kAny || to.type == Real::f64) return store_plane_as<double>(to, channel, run, from);
  }
  if constexpr (kAny || sizeof(T) == 4) {
    switch (to.type) {
      case Real::f32: return store_plane_as<float>(to, channel, run, from);
      case Real::f16: return store_plane_as<Half>(to, channel, run, from);
      case Real::bf16: return store_plane_as<BFloat>(to, channel, run, from);
      case Real::f64: return;
    }
  }
}

template <class S, int P>
__device__ __forceinline__ void load_labels_as(const InputLabels& from, int classes, const PixelRun& run, int (&y)[P]) {
  const S* plane = static_cast<const S*>(from.data) + run.image * from.stride[0];
  load_run<S, P>(plane, run, offsets_of<P>(run, from), from.layout.vector, [&](int p, S v) {
    const int64_t label = v;
    y[p] = label >= 0 && label < classes && label != from.ignore ? static_cast<int>(label) : -1;
  });
}

// Loads the classes of a run: -1 for ignored labels, for labels outside [0, K), and past the end.
template <int P>
__device__ __forceinline__ void load_labels(const InputLabels& from, int classes, const PixelRun& run, int (&y)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) y[p] = -1;
  switch (from.type) {
    case Integer::u8: return load_labels_as<uint8_t>(from, classes, run, y);
    case Integer::i16: return load_labels_as<int16_t>(from, classes, run, y);
    case Integer::i32: return load_labels_as<int32_t>(from, classes, run, y);
    case Integer::i64: return load_labels_as<int64_t>(from, classes, run, y);
  }
}

// Loads coordinate c of the code of each pixel's class; 0 for pixels without a class.
template <class T, int P>
__device__ __forceinline__ void load_code(const InputCodes& codes, const int (&y)[P], int c, T (&to)[P]) {
  const T* __restrict__ mu = static_cast<const T*>(codes.data);
#pragma unroll
  for (int p = 0; p < P; ++p) to[p] = y[p] >= 0 ? mu[static_cast<int64_t>(y[p]) * codes.channels + c] : T(0);
}

__device__ __forceinline__ double time_of(const InputTimes& times, int64_t image) {
  const int64_t at = image * times.stride;
  switch (times.type) {
    case Real::f32: return static_cast<const float*>(times.data)[at];
    case Real::f64: return static_cast<const double*>(times.data)[at];
    case Real::f16: return widen(static_cast<const Half*>(times.data)[at]);
    case Real::bf16: return widen(static_cast<const BFloat*>(times.data)[at]);
  }
  return 0;
}

}  // namespace flowseg::cuda
