// The nearest centroids of the pixels of a block: looked up in the decode grid, or found by a search through all centroids.
#pragma once

#include <cstring>

#include "cuda/block.cuh"
#include "cuda/pixels.cuh"
#include "shared/decode_grid.h"

namespace flowseg::cuda {

// Pixels per thread of a search and of a lookup.
template <class T, int C>
constexpr int kSearchPixels = (C <= 4 ? 4 : C <= 8 ? 2 : 1) / (sizeof(T) == 8 && C <= 8 ? 2 : 1);
constexpr int kLookupPixels = 4;

// Loads a run of pixels; channels that the image does not have are 0.
template <class T, int C, int P>
__device__ __forceinline__ void load_points(const InputImage& from, int channels, const PixelRun& run, T (&x)[C][P]) {
  const Offsets<P> offsets = offsets_of<P>(run, from);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (c < channels) {
      load_plane(from, c, run, offsets, x[c]);
    } else {
#pragma unroll
      for (int p = 0; p < P; ++p) x[c][p] = 0;
    }
  }
}

// The squared distance from pixel p to a centroid. Every search uses it, so equal distances are equal bit for bit.
template <class T, int C, int P>
__device__ __forceinline__ T squared_distance(const T (&x)[C][P], int p, const CodeRow<T, C>& row) {
  T d = 0;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const T diff = x[c][p] - row[c];
    d = c ? multiply_add(diff, diff, d) : diff * diff;
  }
  return d;
}

// Finds labels (-1 for NaN) and the squared distances to the nearest and, with kSecond, to the second nearest centroid. Every
// thread of the block calls it. kInLoop: as for `stage`.
template <bool kSecond, bool kInLoop = false, class T, int C, int P>
__device__ __forceinline__ void search(const InputCodes& codes, const CodeTile<T, C>& tile, const T (&x)[C][P], int (&label)[P],
                                       T (&nearest)[P], T (&second)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    label[p] = 0;
    nearest[p] = second[p] = infinity<T>();
  }
  bool staged = false;
  for_each_part<kInLoop>(codes, tile, staged, [&](int first, int count) {
    FLOWSEG_UNROLL_CLASSES
    for (int k = 0; k < count; ++k) {
      const CodeRow<T, C> row = tile[k];
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const T d = squared_distance(x, p, row);
        const bool closer = d < nearest[p];
        if constexpr (kSecond) second[p] = std::fmax(nearest[p], std::fmin(d, second[p]));  // two instructions, no branch
        nearest[p] = closer ? d : nearest[p];
        label[p] = closer ? first + k : label[p];
      }
    }
  });
#pragma unroll
  for (int p = 0; p < P; ++p) {
    bool is_nan = false;
#pragma unroll
    for (int c = 0; c < C; ++c) is_nan |= x[c][p] != x[c][p];
    if (is_nan) {
      label[p] = -1;
      nearest[p] = static_cast<T>(NAN);
    }
  }
}

__device__ __forceinline__ float squared_length(float dx, float dy, float dz) {
  return multiply_add(dz, dz, multiply_add(dy, dy, dx * dx));
}

// The nearest of the candidates offered so far; the first of equals wins. `second`: the second smallest squared distance.
template <bool kSecond>
struct Nearest {
  float distance = infinity<float>(), second = infinity<float>();
  float label = 0;  // exact: there are fewer than 2^24 classes

  __device__ __forceinline__ void offer(float dx, float dy, float dz, float candidate) {
    const float d = squared_length(dx, dy, dz);
    const bool closer = d < distance;
    if constexpr (kSecond) second = std::fmax(distance, std::fmin(d, second));
    distance = closer ? d : distance;
    label = closer ? candidate : label;
  }
};

// Searches the candidate list of a cell. A record holds eight candidates, read four at a time.
template <bool kSecond>
__device__ __forceinline__ Nearest<kSecond> search_list(const Grid& grid, int first, float x, float y, float z) {
  Nearest<kSecond> found;
  const auto offer_four = [&](const Packed<float, 4>* four) {
    const Packed<float, 4> xs = four[0], ys = four[2], zs = four[4], labels = four[6];
#pragma unroll
    for (int i = 0; i < 4; ++i) found.offer(x - xs.at[i], y - ys.at[i], z - zs.at[i], labels.at[i]);
  };
  const auto* record = reinterpret_cast<const Packed<float, 4>*>(grid.records) + static_cast<int64_t>(first) * 8;
  for (int left = grid.records_left[first] + FLOWSEG_PLANTED(list); left > 0; --left, record += 8) {
    offer_four(record);
    if (record[1].at[0] == infinity<float>()) break;  // most lists have at most four candidates; the rest is padding
    offer_four(record + 1);
  }
  return found;
}

// Loads a vector of pixels that is read only once, and evicts it from the L1 cache first: the cells need the cache. In fp32 this is
// 4 to 10 % faster on an H100, in 16 bits it is not.
template <class S, int P>
__device__ __forceinline__ void load_once(const S* at, Packed<S, P>& to) {
#ifdef __CUDACC__
  if constexpr (sizeof(Packed<S, P>) == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(at));
    memcpy(&to, &bits, sizeof bits);
    return;
  }
#endif
  to = *reinterpret_cast<const Packed<S, P>*>(at);
}

// A run of pixels of three channels in their dtype in memory. All loads are issued before the first is waited for. Converting each
// channel after its load, or a branch per channel, would wait for memory three times.
template <class S>
struct RawPixels {
  Packed<S, kLookupPixels> channel[3];

  __device__ __forceinline__ void load(const InputImage& from, const PixelRun& run) {
    const S* __restrict__ plane = static_cast<const S*>(from.data) + run.image * from.stride[0];
    if (from.layout.vector && run.count == kLookupPixels) {
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        load_once(plane + c * from.stride[1] + run.first, channel[c]);
      }
    } else {
      const Offsets<kLookupPixels> offsets = offsets_of<kLookupPixels>(run, from);
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        channel[c] = {};
        load_run<S, kLookupPixels>(plane + c * from.stride[1], run, offsets, false, [&](int p, S v) { channel[c].at[p] = v; });
      }
    }
  }

  __device__ __forceinline__ float operator()(int c, int p) const { return widen(channel[c].at[p]); }
};

// Calls body.template operator()<S>() with the dtype of pixels that are looked up in a grid.
template <class Body>
void for_half_or_float(Real type, Body body) {
  if (type == Real::f16) return body.template operator()<Half>();
  if (type == Real::bf16) return body.template operator()<BFloat>();
  body.template operator()<float>();
}

// Whether the grid has words that hold the candidates themselves. The kernel then stages all codes in shared memory.
inline bool has_words(const InputCodes& codes) { return codes.classes <= kWordClasses; }
using GridCode = CodeRow<float, 3>;
inline int64_t staged_bytes(const InputCodes& codes) {
  return has_words(codes) ? codes.classes * static_cast<int64_t>(sizeof(GridCode)) : 0;
}
#define FLOWSEG_DYNAMIC_CODES(name) FLOWSEG_DYNAMIC_SHARED(GridCode, name)

// Copies all codes to shared memory, one row per code. Every thread of the block calls it.
template <int kBlock>
__device__ __forceinline__ void stage_rows(const InputCodes& codes, GridCode* rows) {
  const float* __restrict__ mu = static_cast<const float*>(codes.data);
#pragma unroll 1
  for (int k = threadIdx.x; k < codes.classes; k += kBlock) rows[k] = {{mu[3 * k], mu[3 * k + 1], mu[3 * k + 2], 0}};
  __syncthreads();
}

// Searches all centroids for one point outside the grid, which every lane of the warp has. Each lane searches every 32nd centroid.
template <bool kSecond, bool kWords>
__device__ __forceinline__ Nearest<kSecond> search_all(const InputCodes& codes, const GridCode* rows, float x, float y, float z) {
  Nearest<kSecond> found;
  if (x != x || y != y || z != z) {
    found.label = -1;
    found.distance = NAN;
    return found;
  }
  const float* __restrict__ mu = static_cast<const float*>(codes.data);
#pragma unroll 1
  for (int k = threadIdx.x % 32; k < codes.classes; k += 32) {
    if constexpr (kWords) {
      const GridCode row = rows[k];
      found.offer(x - row[0], y - row[1], z - row[2], static_cast<float>(k));
    } else {
      found.offer(x - mu[3 * k], y - mu[3 * k + 1], z - mu[3 * k + 2], static_cast<float>(k));
    }
  }
  const unsigned distance = same_bits<unsigned>(found.distance);  // bits of non-negative floats compare like integers
  const unsigned smallest = __reduce_min_sync(kAllLanes, distance), own = static_cast<unsigned>(found.label);
  const unsigned label = __reduce_min_sync(kAllLanes, distance == smallest ? own : UINT32_MAX);
  if constexpr (kSecond) {
    const unsigned other = distance == smallest && own == label ? same_bits<unsigned>(found.second) : distance;
    found.second = same_bits<float>(__reduce_min_sync(kAllLanes, other));
    found.distance = same_bits<float>(smallest);
  }
  found.label = static_cast<float>(label);
  return found;
}

// The nearest of the up to three classes in a cell's word. They are sorted; first and last are equal if there is only one.
__device__ __forceinline__ int search_word(const GridCode* rows, int word, float x, float y, float z) {
  constexpr int kMask = kWordClasses - 1;
  const int first = word & kMask, second = word >> kWordBits & kMask, third = word >> 2 * kWordBits;
  if (first == third) return first;
  const auto distance = [&](const GridCode& row) {
    return squared_length(x - row[0], y - row[1], z - row[2]);
  };
  const float a = distance(rows[first]), b = distance(rows[second]), c = distance(rows[third]);
  const int label = b < a ? second : first;
  return c < std::fmin(a, b) ? third : label;
}

// The cell of a point, or -1: equals cell_of of shared/decode_grid.h for grid sizes that are powers of two. Adding 2^23 to a number
// puts its integral part into the low bits without a conversion; negative, too large and NaN values set higher bits.
__device__ __forceinline__ int cell_at(const Grid& grid, float x, float y, float z) {
  constexpr float kIntegers = 8388608.0f;
  const auto along = [&](float v) {
    return same_bits<unsigned>(__fadd_rd((v - grid.low) * grid.scale, kIntegers)) - same_bits<unsigned>(kIntegers);
  };
  const unsigned a = along(x), b = along(y), c = along(z), size = static_cast<unsigned>(grid.size);
  return (a | b | c) < size ? static_cast<int>((c * size + b) * size + a) : -1;
}

// Looks up a run of pixels. All table loads are issued before the first is waited for. A pixel that no word answers is pending.
// Each thread searches the lists of its pending pixels one by one. A warp makes as many passes as its thread with the most. The
// lanes of a warp share the search for a point outside the grid, which takes longer than all else. Every thread calls it.
//
// kSecond: the grid is of order 2, and its cells have no words. Then every pixel is pending or outside, and the two smallest
// squared distances are set too.
template <bool kSecond, bool kWords, class S>
__device__ __forceinline__ void look_up(const Grid& grid, const InputCodes& codes, const GridCode* rows, const RawPixels<S>& x,
                                        int (&label)[kLookupPixels], [[maybe_unused]] float (&nearest)[kLookupPixels],
                                        [[maybe_unused]] float (&second)[kLookupPixels]) {
  static_assert(!(kSecond && kWords));
  constexpr int kOutside = INT32_MIN;
  const int32_t* __restrict__ table = kWords ? grid.words : grid.cells;
#pragma unroll
  for (int p = 0; p < kLookupPixels; ++p) {
    const int cell = cell_at(grid, x(0, p), x(1, p), x(2, p));
    label[p] = cell < 0 ? kOutside : table[cell];
  }
  int pending = 0, outside = 0;  // bit p: pixel p
#pragma unroll
  for (int p = 0; p < kLookupPixels; ++p) {
    if (label[p] < 0) {
      (label[p] == kOutside ? outside : pending) |= 1 << p;
    } else if constexpr (kWords) {
      label[p] = search_word(rows, label[p], x(0, p), x(1, p), x(2, p));
    }
  }
  float point[3];
  int entry;
  const auto take = [&](int at) {
#pragma unroll
    for (int c = 0; c < 3; ++c) point[c] = x(c, 0);
    entry = label[0];
#pragma unroll
    for (int p = 1; p < kLookupPixels; ++p) {
#pragma unroll
      for (int c = 0; c < 3; ++c) point[c] = p == at ? x(c, p) : point[c];
      entry = p == at ? label[p] : entry;
    }
  };
  const auto answer = [&](int at, const Nearest<kSecond>& found) {
#pragma unroll
    for (int p = 0; p < kLookupPixels; ++p) {
      label[p] = p == at ? static_cast<int>(found.label) : label[p];
      if constexpr (kSecond) {
        nearest[p] = p == at ? found.distance : nearest[p];
        second[p] = p == at ? found.second : second[p];
      }
    }
  };
#pragma unroll 1
  for (; pending; pending &= pending - 1) {
    const int at = __ffs(pending) - 1;
    take(at);
    answer(at, search_list<kSecond>(grid, -1 - entry, point[0], point[1], point[2]));
  }
#pragma unroll 1
  while (const unsigned lanes = __ballot_sync(kAllLanes, outside)) {
    const int lane = __ffs(static_cast<int>(lanes)) - 1, at = __ffs(outside) - 1;
    take(at);
#pragma unroll
    for (int c = 0; c < 3; ++c) point[c] = __shfl_sync(kAllLanes, point[c], lane);
    const auto found = search_all<kSecond, kWords>(codes, rows, point[0], point[1], point[2]);
    if (threadIdx.x % 32 == static_cast<unsigned>(lane)) {
      answer(at, found);
      outside &= outside - 1;
    }
  }
}

// The labels alone.
template <bool kWords, class S>
__device__ __forceinline__ void look_up(const Grid& grid, const InputCodes& codes, const GridCode* rows, const RawPixels<S>& x,
                                        int (&label)[kLookupPixels]) {
  float nearest[kLookupPixels], second[kLookupPixels];
  look_up<false, kWords>(grid, codes, rows, x, label, nearest, second);
}

// The squared distances of pixels to the codes of their classes, NaN for class -1.
template <bool kWords, class S>
__device__ __forceinline__ void distances_to_classes(const InputCodes& codes, const GridCode* rows, const RawPixels<S>& x,
                                                     const int (&label)[kLookupPixels], float (&nearest)[kLookupPixels]) {
  const float* __restrict__ mu = static_cast<const float*>(codes.data);
#pragma unroll
  for (int p = 0; p < kLookupPixels; ++p) {
    const int k = label[p] < 0 ? 0 : label[p];
    if constexpr (kWords) {
      const GridCode row = rows[k];
      nearest[p] = squared_length(x(0, p) - row[0], x(1, p) - row[1], x(2, p) - row[2]);
    } else {
      nearest[p] = squared_length(x(0, p) - mu[3 * k], x(1, p) - mu[3 * k + 1], x(2, p) - mu[3 * k + 2]);
    }
  }
}

}  // namespace flowseg::cuda
