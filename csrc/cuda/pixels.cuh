// Runs of neighbouring pixels between memory of any dtype and strides, and the registers of a thread.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cuda/arguments.h"
#include "cuda/platform.cuh"
#include "shared/half.h"

namespace flowseg::cuda {

// The pixels of one thread: `count` of one image from flat position `first` on. Blocks never cross images, so a block knows its t.
struct Place {
  int64_t image, first;
  int count;
};

inline int64_t blocks_an_image(int64_t pixels, int pixels_a_thread) {
  const int64_t each = int64_t{kThreads} * pixels_a_thread;
  return (pixels + each - 1) / each;
}

// A thread's place in part `part` of an image: P pixels per thread.
template <int P>
__device__ __forceinline__ Place place_in(int64_t pixels, unsigned image, unsigned part, int threads) {
  Place place{image, (static_cast<int64_t>(part) * threads + threadIdx.x) * P, 0};
  if (FLOWSEG_PLANTED(overrun)) pixels += P;
  const int64_t left = pixels - place.first;
  place.count = left >= P ? P : left > 0 ? static_cast<int>(left) : 0;
  return place;
}

// One part per block: that of block `block` of its grid.
template <int P>
__device__ __forceinline__ Place place_at(int64_t pixels, unsigned blocks_an_image, unsigned block) {
  const unsigned image = block / blocks_an_image;
  return place_in<P>(pixels, image, block - image * blocks_an_image, kThreads);
}

// The same of this block.
template <int P>
__device__ __forceinline__ Place place_of(int64_t pixels, unsigned blocks_an_image) {
  return place_at<P>(pixels, blocks_an_image, blockIdx.x);
}

// Makes the compiler read what was just written, and find out anew what follows from `tile`, instead of keeping it in registers.
__device__ __forceinline__ void forget([[maybe_unused]] unsigned& tile) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(tile)::"memory");
#endif
}

// All images in parts of one run a thread, of which a block takes `steps` that follow each other, also from one image to the next.
// 2^31 parts would be pixels of more than a terabyte.
struct Parts {
  unsigned an_image, count;
  unsigned steps;
};

// As many blocks as the GPU runs at once where `most` steps allow it.
inline Parts parts_of(int64_t images, int64_t pixels, int64_t pixels_a_part, int64_t blocks_at_once, int64_t most) {
  const int64_t an_image = (pixels + pixels_a_part - 1) / pixels_a_part, count = an_image * images;
  const int64_t wanted = (count + blocks_at_once - 1) / blocks_at_once;
  return {static_cast<unsigned>(an_image), static_cast<unsigned>(count),
          static_cast<unsigned>(std::max<int64_t>(1, std::min(wanted, most)))};
}
inline int64_t blocks_of(const Parts& parts) { return (int64_t{parts.count} + parts.steps - 1) / parts.steps; }

// Calls use(place) for each of the block's parts.
template <int kBlock, int P, class Use>
__device__ __forceinline__ void for_each_place(const Parts& parts, int64_t pixels, Use use) {
  const unsigned first = blockIdx.x * parts.steps, left = parts.count - first;
  unsigned image = first / parts.an_image, part = first - image * parts.an_image;
#pragma unroll 1
  for (unsigned steps = left < parts.steps ? left : parts.steps; steps > 0; --steps) {
    use(place_in<P>(pixels, image, part, kBlock));
    if (++part == parts.an_image) {
      part = 0;
      ++image;
    }
  }
}

// P neighbouring elements as one or two loads of up to 16 bytes.
template <class S, int P>
struct alignas(sizeof(S) * P < 16 ? sizeof(S) * P : 16) Packed {
  S at[P];
};

// Where the pixels of a place are in a plane, in elements. Needed unless they are read as one vector.
template <int P>
struct Offsets {
  int64_t at[P];
};

template <int P>
__device__ __forceinline__ Offsets<P> offsets_of(const Place& place, const Layout& layout, int64_t width, int64_t stride_row,
                                                 int64_t stride_column) {
  Offsets<P> offsets{};
  if (layout.vector && place.count == P) return offsets;
  // Flat planes save the division.
  const int64_t row = layout.flat ? 0 : place.first / width;
  int64_t column = place.first - row * width, start = row * stride_row;
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
__device__ __forceinline__ Offsets<P> offsets_of(const Place& place, const Source& from) {
  return offsets_of<P>(place, from.layout, from.width, from.stride[2], from.stride[3]);
}
template <int P>
__device__ __forceinline__ Offsets<P> offsets_of(const Place& place, const Labels& from) {
  return offsets_of<P>(place, from.layout, from.width, from.stride[1], from.stride[2]);
}

template <class S, int P, class Use>
__device__ __forceinline__ void load_run(const S* __restrict__ plane, const Place& place, const Offsets<P>& offsets, bool vector,
                                         Use use) {
  if (vector && place.count == P) {
    const auto run = *reinterpret_cast<const Packed<S, P>*>(plane + place.first);
#pragma unroll
    for (int p = 0; p < P; ++p) use(p, run.at[p]);
  } else {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      if (p < place.count) use(p, plane[offsets.at[p]]);
    }
  }
}

// Asks for pixels that are read later: they are then waited for in the second cache, and not in memory.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* at) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}
__device__ __forceinline__ void prefetch_run(const void* plane, const Layout& layout, const Place& place, int64_t size) {
  if (layout.flat && place.count > 0) prefetch(static_cast<const char*>(plane) + place.first * size);
}
__device__ __forceinline__ void prefetch_labels(const Labels& from, const Place& place) {
  const int64_t size = size_of(from.type);
  prefetch_run(static_cast<const char*>(from.data) + place.image * from.stride[0] * size, from.layout, place, size);
}
template <int C>
__device__ __forceinline__ void prefetch_planes(const Source& from, int channels, const Place& place) {
  const int64_t size = size_of(from.type);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int64_t start = place.image * from.stride[0] + c * from.stride[1];
    if (c < channels) prefetch_run(static_cast<const char*>(from.data) + start * size, from.layout, place, size);
  }
}

template <class S, class T, int P>
__device__ __forceinline__ void load_plane_as(const Source& from, int64_t channel, const Place& place, const Offsets<P>& offsets,
                                              T (&to)[P]) {
  const S* plane = static_cast<const S*>(from.data) + place.image * from.stride[0] + channel * from.stride[1];
  load_run<S, P>(plane, place, offsets, from.layout.vector, [&](int p, S v) { to[p] = static_cast<T>(widen(v)); });
}

// One channel of a run of pixels; 0 past the end. An image of doubles is computed in double, every other one in float; kAny: the
// dtype does not depend on T.
template <bool kAny = false, class T, int P>
__device__ __forceinline__ void load_plane(const Source& from, int64_t channel, const Place& place, const Offsets<P>& offsets,
                                           T (&to)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) to[p] = 0;
  if constexpr (kAny || sizeof(T) == 8) {
    if (!kAny || from.type == Real::f64) return load_plane_as<double>(from, channel, place, offsets, to);
  }
  if constexpr (kAny || sizeof(T) == 4) {
    switch (from.type) {
      case Real::f32: return load_plane_as<float>(from, channel, place, offsets, to);
      case Real::f16: return load_plane_as<Half>(from, channel, place, offsets, to);
      case Real::bf16: return load_plane_as<BFloat>(from, channel, place, offsets, to);
      case Real::f64: return;
    }
  }
}

template <class S, class T, int C, int P>
__device__ __forceinline__ void load_planes_as(const Source& from, int channels, const Place& place, const Offsets<P>& offsets,
                                               T (&to)[C][P]) {
  const S* __restrict__ first = static_cast<const S*>(from.data) + place.image * from.stride[0];
  if (from.layout.vector && place.count == P) {
    Packed<S, P> runs[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (c < channels) runs[c] = *reinterpret_cast<const Packed<S, P>*>(first + c * from.stride[1] + place.first);
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int p = 0; p < P; ++p) to[c][p] = c < channels ? static_cast<T>(widen(runs[c].at[p])) : T(0);
    }
  } else {
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const bool inside = c < channels && p < place.count;
        to[c][p] = inside ? static_cast<T>(widen(first[c * from.stride[1] + offsets.at[p]])) : T(0);
      }
    }
  }
}

// Every channel of a run of pixels; 0 past the end, and in channels that there are not. All are asked for before the first is waited
// for, which one channel after the other is not: the branch on the dtype is between them.
template <bool kAny = false, class T, int C, int P>
__device__ __forceinline__ void load_planes(const Source& from, int channels, const Place& place, const Offsets<P>& offsets,
                                            T (&to)[C][P]) {
  if constexpr (kAny || sizeof(T) == 8) {
    if (!kAny || from.type == Real::f64) return load_planes_as<double>(from, channels, place, offsets, to);
  }
  if constexpr (kAny || sizeof(T) == 4) {
    switch (from.type) {
      case Real::f32: return load_planes_as<float>(from, channels, place, offsets, to);
      case Real::f16: return load_planes_as<Half>(from, channels, place, offsets, to);
      case Real::bf16: return load_planes_as<BFloat>(from, channels, place, offsets, to);
      case Real::f64: return;
    }
  }
}

// A plain store of the whole would be split again: the compiler merges it with the stores of single elements beside it.
template <class Run>
__device__ __forceinline__ void store_whole(void* to, const Run& run) {
#ifdef __CUDACC__
  constexpr int kBytes = sizeof(Run);
  using Word = std::conditional_t<kBytes % 16 == 0, uint4, std::conditional_t<kBytes == 8, uint2, unsigned>>;
  if constexpr (kBytes >= 4) {
    Word words[kBytes / sizeof(Word)];
    memcpy(words, &run, kBytes);
#pragma unroll
    for (int i = 0; i < static_cast<int>(kBytes / sizeof(Word)); ++i) __stwb(static_cast<Word*>(to) + i, words[i]);
    return;
  }
#endif
  *static_cast<Run*>(to) = run;
}

template <class S, int P>
__device__ __forceinline__ void store_run(S* plane, bool vector, const Place& place, const Packed<S, P>& run) {
  if (vector && place.count == P) {
    store_whole(plane + place.first, run);
  } else {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      if (p < place.count) plane[place.first + p] = run.at[p];
    }
  }
}

template <class S, class T, int P>
__device__ __forceinline__ void store_plane_as(const Target& to, int64_t channel, const Place& place, const T (&from)[P]) {
  Packed<S, P> run;
#pragma unroll
  for (int p = 0; p < P; ++p) narrow(from[p], run.at[p]);
  store_run<S, P>(static_cast<S*>(to.data) + (place.image * to.channels + channel) * to.pixels, to.vector, place, run);
}

template <bool kAny = false, class T, int P>
__device__ __forceinline__ void store_plane(const Target& to, int64_t channel, const Place& place, const T (&from)[P]) {
  if constexpr (kAny || sizeof(T) == 8) {
    if (!kAny || to.type == Real::f64) return store_plane_as<double>(to, channel, place, from);
  }
  if constexpr (kAny || sizeof(T) == 4) {
    switch (to.type) {
      case Real::f32: return store_plane_as<float>(to, channel, place, from);
      case Real::f16: return store_plane_as<Half>(to, channel, place, from);
      case Real::bf16: return store_plane_as<BFloat>(to, channel, place, from);
      case Real::f64: return;
    }
  }
}

template <class S, int P>
__device__ __forceinline__ void load_labels_as(const Labels& from, int classes, const Place& place, int (&y)[P]) {
  const S* plane = static_cast<const S*>(from.data) + place.image * from.stride[0];
  load_run<S, P>(plane, place, offsets_of<P>(place, from), from.layout.vector, [&](int p, S v) {
    const int64_t label = v;
    y[p] = label >= 0 && label < classes && label != from.ignore ? static_cast<int>(label) : -1;
  });
}

// Classes of a run of pixels; -1 where ignored, outside [0, K) or past the end.
template <int P>
__device__ __forceinline__ void load_labels(const Labels& from, int classes, const Place& place, int (&y)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) y[p] = -1;
  switch (from.type) {
    case Integer::u8: return load_labels_as<uint8_t>(from, classes, place, y);
    case Integer::i16: return load_labels_as<int16_t>(from, classes, place, y);
    case Integer::i32: return load_labels_as<int32_t>(from, classes, place, y);
    case Integer::i64: return load_labels_as<int64_t>(from, classes, place, y);
  }
}

// Coordinate c of the code of each pixel's class; 0 where there is none.
template <class T, int P>
__device__ __forceinline__ void load_code(const Codes& codes, const int (&y)[P], int c, T (&to)[P]) {
  const T* __restrict__ mu = static_cast<const T*>(codes.data);
#pragma unroll
  for (int p = 0; p < P; ++p) to[p] = y[p] >= 0 ? mu[static_cast<int64_t>(y[p]) * codes.channels + c] : T(0);
}

__device__ __forceinline__ double time_of(const Times& times, int64_t image) {
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
