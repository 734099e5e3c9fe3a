// Nearest centroids of a block of pixels: by the decode grid where there is one, else a search through all.
#pragma once

#include "blocks.h"
#include "flowseg/decode_grid.h"

namespace flowseg::cpu {
namespace {

template <class T>
struct alignas(64) Found {
  typename Lanes<T>::Int label[kBlock];  // -1 for NaN
  T nearest[kBlock], second[kBlock];     // squared distances; second only from search_block<.., true>
};

template <bool kSecond, class T, int C>
void search_block(const Codes& codes, const Block<T, C>& x, Found<T>& found) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  const T* FLOWSEG_RESTRICT mu = static_cast<const T*>(codes.data);
  // Two vectors at once hide the latency of compare and select.
  constexpr int U = C <= 8 ? 2 : 1;
  constexpr int W = Lanes<T>::width;
  for (int i = 0; i < kBlock; i += U * W) {
    V point[U][C], best[U], second[U];
    I index[U];
    for (int u = 0; u < U; ++u) {
      for (int c = 0; c < C; ++c) point[u][c] = lanes(&x.at[c][i + u * W]);
      best[u] = second[u] = V{} + infinity<T>();
      index[u] = I{};
    }
    I current{};
    for (int64_t k = 0; k < codes.classes; ++k) {
      for (int u = 0; u < U; ++u) {
        V d{};
        for (int c = 0; c < C; ++c) {
          const V diff = point[u][c] - mu[k * C + c];
          d = c ? d + diff * diff : diff * diff;
        }
        const I closer = d < best[u];
        if constexpr (kSecond) second[u] = choose(closer, best[u], choose(d < second[u], d, second[u]));
        best[u] = choose(closer, d, best[u]);
        index[u] = choose(closer, current, index[u]);
      }
      current += 1;
    }
    for (int u = 0; u < U; ++u) {
      I unknown{};
      for (int c = 0; c < C; ++c) unknown |= point[u][c] != point[u][c];
      const int at = i + u * W;
      *reinterpret_cast<I*>(&found.label[at]) = choose(unknown, I{} - 1, index[u]);
      lanes(&found.nearest[at]) = choose(unknown, V{} + static_cast<T>(__builtin_nanf("")), best[u]);
      if constexpr (kSecond) lanes(&found.second[at]) = second[u];
    }
  }
}

typedef float F8 __attribute__((vector_size(32)));

// Smallest of eight squared distances and the first lane that has it.
FLOWSEG_INLINE void first_smallest(F8 d, float& smallest, int& lane) {
#if defined(__AVX2__)
  __m256 v = (__m256)d;
  __m256 m = _mm256_min_ps(v, _mm256_permute2f128_ps(v, v, 1));
  m = _mm256_min_ps(m, _mm256_shuffle_ps(m, m, 0x4e));
  m = _mm256_min_ps(m, _mm256_shuffle_ps(m, m, 0xb1));
  smallest = _mm256_cvtss_f32(m);
  lane = __builtin_ctz(_mm256_movemask_ps(_mm256_cmp_ps(v, m, _CMP_EQ_OQ)) | 256);
#else
  smallest = d[0];
  lane = 0;
  for (int i = 1; i < 8; ++i) {
    if (d[i] < smallest) {
      smallest = d[i];
      lane = i;
    }
  }
#endif
}

FLOWSEG_INLINE F8 load8(const float* p) {
  F8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FLOWSEG_INLINE F8 distance8(float x, float y, float z, const float* xs, const float* ys, const float* zs) {
  const F8 dx = x - load8(xs), dy = y - load8(ys), dz = z - load8(zs);
  F8 d = dx * dx;
  d = d + dy * dy;
  return d + dz * dz;
}

FLOWSEG_INLINE int search_one(const Grid& grid, float x, float y, float z) {
  if (x != x || y != y || z != z) return -1;
  const float* columns = grid.columns;
  const int64_t n = grid.column_length;
  float best = infinity<float>();
  int label = 0;
  for (int64_t k = 0; k < n; k += 8) {
    float smallest;
    int lane;
    first_smallest(distance8(x, y, z, columns + k, columns + n + k, columns + 2 * n + k), smallest, lane);
    if (smallest < best) {
      best = smallest;
      label = static_cast<int>(k) + lane;
    }
  }
  return label;
}

FLOWSEG_INLINE int search_list(const Grid& grid, int first, float x, float y, float z) {
  float best = infinity<float>();
  int label = 0;
  for (int r = first, end = first + grid.groups[first]; r < end; ++r) {
    const float* record = grid.records + static_cast<int64_t>(r) * 32;
    float smallest;
    int lane;
    first_smallest(distance8(x, y, z, record, record + 8, record + 16), smallest, lane);
    if (smallest < best) {
      best = smallest;
      label = static_cast<int>(record[24 + lane]);
    }
  }
  return label;
}

void look_up_block(const Grid& grid, const Block<float, 3>& x, Found<float>& found) {
  alignas(64) int32_t cell[kBlock];
  int16_t open[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    cell[i] = cell_of(x.at[0][i], x.at[1][i], x.at[2][i], grid.low, grid.scale, grid.size);
  }
  int count = 0;
  for (int i = 0; i < kBlock; ++i) {
    const int word = cell[i] < 0 ? INT32_MIN : grid.cells[cell[i]];
    found.label[i] = word;
    open[count] = static_cast<int16_t>(i);
    count += word < 0;
  }
  for (int j = 0; j < count; ++j) {
    const int i = open[j];
    const int word = found.label[i];
    const float a = x.at[0][i], b = x.at[1][i], c = x.at[2][i];
    found.label[i] = word == INT32_MIN ? search_one(grid, a, b, c) : search_list(grid, -1 - word, a, b, c);
  }
}

template <class T, int C>
void decode_block(const Decode& a, const Block<T, C>& x, Found<T>& found) {
  if constexpr (std::is_same_v<T, float> && C == 3) {
    if (a.grid.cells && !a.distance && !a.margin) return look_up_block(a.grid, x, found);
  }
  if (a.margin) {
    search_block<true>(a.codes, x, found);
  } else {
    search_block<false>(a.codes, x, found);
  }
}

}  // namespace
}  // namespace flowseg::cpu
