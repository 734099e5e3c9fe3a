// Nearest centroids of the pixels of a block: by the decode grid where there is one, else a search through all of them.
#pragma once

#include <cstring>

#include "cuda/codes.cuh"
#include "cuda/pack.cuh"
#include "cuda/pixels.cuh"
#include "shared/decode_grid.h"

namespace flowseg::cuda {

template <class T, int C>
constexpr int kSearched = (C <= 4 ? 4 : C <= 8 ? 2 : 1) / (sizeof(T) == 8 && C <= 8 ? 2 : 1);
constexpr int kLookedUp = 4;

template <class T, int C, int P>
__device__ __forceinline__ void load_points(const Source& from, int channels, const Place& place, T (&x)[C][P]) {
  const Offsets<P> offsets = offsets_of<P>(place, from);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (c < channels) {
      load_plane(from, c, place, offsets, x[c]);
    } else {
#pragma unroll
      for (int p = 0; p < P; ++p) x[c][p] = 0;
    }
  }
}

// Labels (-1 for NaN) and squared distances of the nearest and, with kSecond, of the second nearest. Every thread of the block
// calls it.
template <bool kSecond, class T, int C, int P>
__device__ __forceinline__ void search(const Codes& codes, const Tile<T, C>& tile, const T (&x)[C][P], int (&label)[P],
                                       T (&nearest)[P], T (&second)[P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    label[p] = 0;
    nearest[p] = second[p] = infinity<T>();
  }
  bool staged = false;
  for_each_part(codes, tile, staged, [&](int first, int count) {
    FLOWSEG_UNROLL_CLASSES
    for (int k = 0; k < count; ++k) {
      const Row<T, C> row = tile[k];
#pragma unroll
      for (int p = 0; p < P; ++p) {
        T d = 0;
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const T diff = x[c][p] - row[c];
          d = c ? d + diff * diff : diff * diff;
        }
        const bool closer = d < nearest[p];
        if constexpr (kSecond) second[p] = std::fmax(nearest[p], std::fmin(d, second[p]));  // two instructions, no branch
        nearest[p] = closer ? d : nearest[p];
        label[p] = closer ? first + k : label[p];
      }
    }
  });
#pragma unroll
  for (int p = 0; p < P; ++p) {
    bool unknown = false;
#pragma unroll
    for (int c = 0; c < C; ++c) unknown |= x[c][p] != x[c][p];
    if (unknown) {
      label[p] = -1;
      nearest[p] = static_cast<T>(NAN);
    }
  }
}

// One candidate after the other.
struct Nearest {
  float distance = infinity<float>();
  float label = 0;  // exact: classes are below 2^24

  __device__ __forceinline__ void offer(float dx, float dy, float dz, float candidate) {
    const float d = dx * dx + dy * dy + dz * dz;
    const bool closer = d < distance;
    distance = closer ? d : distance;
    label = closer ? candidate : label;
  }
};

// The candidates of a cell: records of eight, four at a time.
__device__ __forceinline__ int search_list(const Grid& grid, int first, float x, float y, float z) {
  Nearest found;
  const auto offer_four = [&](const Packed<float, 4>* four) {
    const Packed<float, 4> xs = four[0], ys = four[2], zs = four[4], labels = four[6];
#pragma unroll
    for (int i = 0; i < 4; ++i) found.offer(x - xs.at[i], y - ys.at[i], z - zs.at[i], labels.at[i]);
  };
  const auto* record = reinterpret_cast<const Packed<float, 4>*>(grid.records) + static_cast<int64_t>(first) * 8;
  for (int left = grid.groups[first] + FLOWSEG_PLANTED(list); left > 0; --left, record += 8) {
    offer_four(record);
    if (record[1].at[0] == infinity<float>()) break;  // most lists have at most four candidates; the rest is padding
    offer_four(record + 1);
  }
  return static_cast<int>(found.label);
}

// Points outside the grid meet every centroid. The codes start at a multiple of 16 bytes.
__device__ __forceinline__ int search_all(const Codes& codes, float x, float y, float z) {
  if (x != x || y != y || z != z) return -1;
  Nearest found;
  const float* __restrict__ mu = static_cast<const float*>(codes.data);
  int k = 0;
#pragma unroll 2
  for (; k + 4 <= codes.classes; k += 4, mu += 12) {
    const auto* four = reinterpret_cast<const Packed<float, 4>*>(mu);
    const Packed<float, 4> a = four[0], b = four[1], c = four[2];
    const float label = static_cast<float>(k);
    found.offer(x - a.at[0], y - a.at[1], z - a.at[2], label);
    found.offer(x - a.at[3], y - b.at[0], z - b.at[1], label + 1);
    found.offer(x - b.at[2], y - b.at[3], z - c.at[0], label + 2);
    found.offer(x - c.at[1], y - c.at[2], z - c.at[3], label + 3);
  }
#pragma unroll 1
  for (; k < codes.classes; ++k, mu += 3) found.offer(x - mu[0], y - mu[1], z - mu[2], static_cast<float>(k));
  return static_cast<int>(found.label);
}

// Pixels that are read once leave the first cache first, which the cells need: 4 to 10 % faster on an H100. Not so in 16 bits.
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

// Three channels as they are in memory: all loads leave before one is waited for. Widened channel by channel, or behind a branch
// for each, bf16 pixels would wait for memory three times.
template <class S>
struct Points {
  Packed<S, kLookedUp> run[3];

  __device__ __forceinline__ void load(const Source& from, const Place& place) {
    const S* __restrict__ plane = static_cast<const S*>(from.data) + place.image * from.stride[0];
    if (from.layout.vector && place.count == kLookedUp) {
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        load_once(plane + c * from.stride[1] + place.first, run[c]);
      }
    } else {
      const Offsets<kLookedUp> offsets = offsets_of<kLookedUp>(place, from);
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        run[c] = {};
        load_run<S, kLookedUp>(plane + c * from.stride[1], place, offsets, false, [&](int p, S v) { run[c].at[p] = v; });
      }
    }
  }

  __device__ __forceinline__ float operator()(int c, int p) const { return widen(run[c].at[p]); }
};

// Calls body.template operator()<S>() with the dtype of pixels that a grid takes.
template <class Body>
void for_half_or_float(Real type, Body body) {
  if (type == Real::f16) return body.template operator()<Half>();
  if (type == Real::bf16) return body.template operator()<BFloat>();
  body.template operator()<float>();
}

// Whether words of the grid name their candidates; their codes are in shared memory then.
inline bool has_words(const Codes& codes) { return codes.classes <= kWordClasses; }
inline int64_t row_bytes(const Codes& codes) {
  return has_words(codes) ? codes.classes * static_cast<int64_t>(sizeof(Row<float, 3>)) : 0;
}
using CodeRow = Row<float, 3>;
#define FLOWSEG_DYNAMIC_ROWS(name) FLOWSEG_DYNAMIC_SHARED(CodeRow, name)

// The codes, a row each in shared memory, by the whole block.
template <int kBlock>
__device__ __forceinline__ void stage_rows(const Codes& codes, CodeRow* rows) {
  const float* __restrict__ mu = static_cast<const float*>(codes.data);
#pragma unroll 1
  for (int k = threadIdx.x; k < codes.classes; k += kBlock) rows[k] = {{mu[3 * k], mu[3 * k + 1], mu[3 * k + 2], 0}};
  __syncthreads();
}

// The nearest of the classes in a cell's word, which are in order: the first and the last are equal where there is one.
__device__ __forceinline__ int search_word(const CodeRow* rows, int word, float x, float y, float z) {
  constexpr int kMask = kWordClasses - 1;
  const int first = word & kMask, second = word >> kWordBits & kMask, third = word >> 2 * kWordBits;
  if (first == third) return first;
  const auto distance = [&](const CodeRow& row) {
    const float dx = x - row[0], dy = y - row[1], dz = z - row[2];
    return dx * dx + dy * dy + dz * dz;
  };
  const float a = distance(rows[first]), b = distance(rows[second]), c = distance(rows[third]);
  const int label = b < a ? second : first;
  return c < std::fmin(a, b) ? third : label;
}

// The cell of a point, or -1, as cell_of has it, for sizes that are powers of two. Added to 2^23 a number leaves its integral part
// in the low bits, which costs no conversion; what is negative, too large or NaN has other bits set.
__device__ __forceinline__ int cell_at(const Grid& grid, float x, float y, float z) {
  constexpr float kIntegers = 8388608.0f;
  const auto along = [&](float v) {
    return same_bits<unsigned>(__fadd_rd((v - grid.low) * grid.scale, kIntegers)) - same_bits<unsigned>(kIntegers);
  };
  const unsigned a = along(x), b = along(y), c = along(z), size = static_cast<unsigned>(grid.size);
  return (a | b | c) < size ? static_cast<int>((c * size + b) * size + a) : -1;
}

// All loads of the table leave before one is waited for. The few pixels that a word does not answer take turns, each thread with
// its own, so that a warp goes through them as often as its fullest thread.
template <bool kWords, class S>
__device__ __forceinline__ void look_up(const Grid& grid, const Codes& codes, const CodeRow* rows, const Points<S>& x,
                                        int (&label)[kLookedUp]) {
  constexpr int kOutside = INT32_MIN;
  const int32_t* __restrict__ table = kWords ? grid.words : grid.cells;
#pragma unroll
  for (int p = 0; p < kLookedUp; ++p) {
    const int cell = cell_at(grid, x(0, p), x(1, p), x(2, p));
    label[p] = cell < 0 ? kOutside : table[cell];
  }
  int open = 0;
#pragma unroll
  for (int p = 0; p < kLookedUp; ++p) {
    if (label[p] < 0) {
      open |= 1 << p;
    } else if constexpr (kWords) {
      label[p] = search_word(rows, label[p], x(0, p), x(1, p), x(2, p));
    }
  }
#pragma unroll 1
  for (; open; open &= open - 1) {
    const int at = __ffs(open) - 1;
    float point[3] = {x(0, 0), x(1, 0), x(2, 0)};
    int word = label[0];
#pragma unroll
    for (int p = 1; p < kLookedUp; ++p) {
#pragma unroll
      for (int c = 0; c < 3; ++c) point[c] = p == at ? x(c, p) : point[c];
      word = p == at ? label[p] : word;
    }
    const int found = word == kOutside ? search_all(codes, point[0], point[1], point[2])
                                       : search_list(grid, -1 - word, point[0], point[1], point[2]);
#pragma unroll
    for (int p = 0; p < kLookedUp; ++p) label[p] = p == at ? found : label[p];
  }
}

}  // namespace flowseg::cuda
