// Nearest centroids of the pixels of a block: by the decode grid where there is one, else a search through all of them.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/pack.cuh"
#include "cuda/pixels.cuh"
#include "flowseg/decode_grid.h"

namespace flowseg::cuda {

template <class T, int C>
constexpr int kSearched = (C <= 4 ? 4 : C <= 8 ? 2 : 1) / (sizeof(T) == 8 && C <= 8 ? 2 : 1);
constexpr int kLookedUp = 8;

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

__device__ __forceinline__ void look_up(const Grid& grid, const Codes& codes, const float (&x)[3][kLookedUp],
                                        int (&label)[kLookedUp]) {
  constexpr int kOutside = INT32_MIN;
#pragma unroll
  for (int p = 0; p < kLookedUp; ++p) {
    const int cell = cell_of(x[0][p], x[1][p], x[2][p], grid.low, grid.scale, grid.size);
    label[p] = cell < 0 ? kOutside : grid.cells[cell];
  }
#pragma unroll
  for (int p = 0; p < kLookedUp; ++p) {
    if (label[p] == kOutside) {
      label[p] = search_all(codes, x[0][p], x[1][p], x[2][p]);
    } else if (label[p] < 0) {
      label[p] = search_list(grid, -1 - label[p], x[0][p], x[1][p], x[2][p]);
    }
  }
}

}  // namespace flowseg::cuda
