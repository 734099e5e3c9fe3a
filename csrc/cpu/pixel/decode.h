// Nearest centroids of a block of pixels; shared by nearest_centroid and decode_confusion.
//
// Without a decode grid, search_block compares every pixel with every centroid. With a grid (fp32, three channels, and neither
// distance nor margin wanted) most pixels need one look-up instead:
//   1. look_up_cells reads the word of each pixel's cell. A word >= 0 is the class. A negative word names a list of candidate
//      classes: such pixels are collected in `pending`. Pixels outside the grid are collected in `outside`.
//   2. search_one compares a pixel outside the grid with every centroid.
//   3. search_lists compares the pending pixels with their candidates, eight at a time. Collecting the pixels first keeps the
//      first loop free of branches and lets step 3 prefetch the lists of later pixels.
// flowseg_kernels/decode_grid.py says why the result is exact.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "cpu/pixel/blocks.h"
#include "shared/decode_grid.h"

namespace flowseg::cpu {
namespace {

template <class T>
struct alignas(64) Nearest {
  typename Lanes<T>::Int label[kBlock];         // -1 for NaN
  T squared[kBlock], second_squared[kBlock];  // squared distances; only search_block sets them, the second one only with kSecond
};

template <bool kSecond, class T, int C>
void search_block(const Codes& codes, const Block<T, C>& x, Nearest<T>& nearest) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  const T* FLOWSEG_RESTRICT mu = static_cast<const T*>(codes.data);
  // Two vectors at a time: the latency of compare and select of one hides behind the other.
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
      *reinterpret_cast<I*>(&nearest.label[at]) = choose(unknown, I{} - 1, index[u]);
      lanes(&nearest.squared[at]) = choose(unknown, V{} + static_cast<T>(__builtin_nanf("")), best[u]);
      if constexpr (kSecond) lanes(&nearest.second_squared[at]) = second[u];
    }
  }
}

// Stores the classes of a block: `ignore` where they are negative.
template <class S, class Int>
void store_labels(const Int* FLOWSEG_RESTRICT from, void* to, int64_t offset, int length, int64_t ignore) {
  S* FLOWSEG_RESTRICT out = static_cast<S*>(to) + offset;
  const S unknown = static_cast<S>(ignore);
  for (int i = 0; i < length; ++i) out[i] = from[i] < 0 ? unknown : static_cast<S>(from[i]);
}

// Distance of the prefetch of list records, in pixels.
constexpr int kPrefetchPixels = 10;
// Slack behind the collected pixels: stores write whole vectors, and the prefetch reads past the end.
constexpr int kSlack = 16;

typedef float F8 __attribute__((vector_size(32)));

// The smallest of eight squared distances, and the first lane that has it.
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

// The squared distances to eight points, stored by coordinate.
FLOWSEG_INLINE F8 distance8(float x, float y, float z, const float* xs, const float* ys, const float* zs) {
  const F8 dx = x - load8(xs), dy = y - load8(ys), dz = z - load8(zs);
  F8 d = dx * dx;
  d = d + dy * dy;
  return d + dz * dz;
}

// The squared distances to eight consecutive rows of three channels.
FLOWSEG_INLINE F8 distance_of_rows(float x, float y, float z, const float* FLOWSEG_RESTRICT rows) {
  float d[8];
  for (int i = 0; i < 8; ++i) {
    const float dx = x - rows[3 * i], dy = y - rows[3 * i + 1], dz = z - rows[3 * i + 2];
    d[i] = dx * dx;
    d[i] = d[i] + dy * dy;
    d[i] = d[i] + dz * dz;
  }
  return load8(d);
}

// The class of one point, by a search through all centroids; -1 for NaN.
FLOWSEG_INLINE int search_one(const Codes& codes, float x, float y, float z) {
  if (x != x || y != y || z != z) return -1;
  const float* rows = static_cast<const float*>(codes.data);
  float best = infinity<float>();
  int label = 0;
  const auto look = [&](int64_t k, const float* at) {
    float smallest;
    int lane;
    first_smallest(distance_of_rows(x, y, z, at), smallest, lane);
    if (smallest < best) {
      best = smallest;
      label = static_cast<int>(k) + lane;
    }
  };
  int64_t k = 0;
  for (; k + 8 <= codes.classes; k += 8) look(k, rows + 3 * k);
  if (k < codes.classes) {
    float last[24];
    for (int i = 0; i < 24; ++i) last[i] = k + i / 3 < codes.classes ? rows[3 * k + i] : infinity<float>();
    look(k, last);
  }
  return label;
}

// The class of one point, by a search through the candidate list whose first record is `first`.
FLOWSEG_INLINE int search_list(const Grid& grid, int first, float x, float y, float z) {
  float best = infinity<float>();
  int label = 0;
  for (int r = first, end = first + grid.records_left[first]; r < end; ++r) {
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

#if defined(__AVX512F__)
// Searches the first records of two lists in one vector. Bits 0 to 7 of the result mark the nearest candidates of the first pixel,
// bits 8 to 15 those of the second.
FLOWSEG_INLINE unsigned nearest_of_two(const Block<float, 3>& x, int i, int j, const float* a, const float* b) {
  F d{};
  for (int c = 0; c < 3; ++c) {
    const __m512 point = _mm512_mask_mov_ps(_mm512_set1_ps(x.at[c][i]), 0xff00, _mm512_set1_ps(x.at[c][j]));
    const __m512 codes = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a + 8 * c)), _mm256_loadu_ps(b + 8 * c), 1);
    const F diff = (F)point - (F)codes;
    d = c ? d + diff * diff : diff * diff;
  }
  __m512 m = _mm512_min_ps((__m512)d, _mm512_shuffle_f32x4((__m512)d, (__m512)d, 0xb1));
  m = _mm512_min_ps(m, _mm512_permute_ps(m, 0x4e));
  m = _mm512_min_ps(m, _mm512_permute_ps(m, 0xb1));
  return _mm512_cmp_ps_mask((__m512)d, m, _CMP_EQ_OQ);
}
#endif

// Replaces the words in nearest.label of the pixels pending[0..count) by their classes.
FLOWSEG_INLINE void search_lists(const Grid& grid, const Block<float, 3>& x, int16_t (&pending)[kBlock + kSlack], int count,
                                 Nearest<float>& nearest) {
  const auto search = [&](int i) {
    nearest.label[i] = search_list(grid, -1 - nearest.label[i], x.at[0][i], x.at[1][i], x.at[2][i]);
  };
  int j = 0;
#if defined(__AVX512F__)
  const auto record = [&](int i) { return grid.records + static_cast<int64_t>(-1 - nearest.label[i]) * 32; };
  // The classes are written back at the end: until then the prefetches and the long lists need the words.
  int32_t label[kBlock];
  int16_t long_lists[kBlock];
  int long_count = 0;
  for (int i = 0; i < kPrefetchPixels; ++i) pending[count + i] = pending[0];
  for (; j + 1 < count; j += 2) {
    for (int next : {pending[j + kPrefetchPixels - 2], pending[j + kPrefetchPixels - 1]}) {
      __builtin_prefetch(record(next));
      __builtin_prefetch(record(next) + 16);
    }
    const float *a = record(pending[j]), *b = record(pending[j + 1]);
    const unsigned mask = nearest_of_two(x, pending[j], pending[j + 1], a, b);
    label[j] = static_cast<int32_t>(a[24 + __builtin_ctz(mask | 1u << 7)]);
    label[j + 1] = static_cast<int32_t>(b[24 + __builtin_ctz(mask >> 8 | 1u << 7)]);
    // A list may continue only behind a full record.
    long_lists[long_count] = static_cast<int16_t>(j);
    long_count += a[31] >= 0;
    long_lists[long_count] = static_cast<int16_t>(j + 1);
    long_count += b[31] >= 0;
  }
  // Long lists are rare. Searching them last keeps the loop above free of branches.
  for (int i = 0; i < long_count; ++i) {
    const int at = long_lists[i];
    search(pending[at]);
    label[at] = nearest.label[pending[at]];
  }
  for (int i = 0; i < j; ++i) nearest.label[pending[i]] = label[i];
#endif
  for (; j < count; ++j) search(pending[j]);
}

#if defined(__AVX512F__)
// Writes the word of each pixel's cell to nearest.label; collects the pixels with a list, and the pixels outside the grid.
FLOWSEG_INLINE void look_up_cells(const Grid& grid, const Block<float, 3>& x, const Prefetcher& prefetch, Nearest<float>& nearest,
                                  int16_t (&pending)[kBlock + kSlack], int& pending_count,
                                  int16_t (&outside)[kBlock + kSlack], int& outside_count) {
  const __m512 low = _mm512_set1_ps(grid.low), scale = _mm512_set1_ps(grid.scale);
  const __m512i size = _mm512_set1_epi32(grid.size);
  const __m512i limit = _mm512_castps_si512(_mm512_set1_ps(static_cast<float>(grid.size)));
  __m512i pixel = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto collect = [&](__mmask16 which, int16_t* to, int& n) {
    const __m512i packed = _mm512_maskz_compress_epi32(which, pixel);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + n), _mm512_cvtepi32_epi16(packed));
    n += __builtin_popcount(which);
  };
  for (int i = 0; i < kBlock; i += 16) {
    prefetch(i);
    __m512i at = _mm512_setzero_si512(), largest = at;
    for (int c = 2; c >= 0; --c) {
      const __m512 position = _mm512_mul_ps(_mm512_sub_ps((__m512)lanes(&x.at[c][i]), low), scale);
      at = _mm512_add_epi32(_mm512_mullo_epi32(at, size), _mm512_cvttps_epi32(position));
      largest = _mm512_max_epu32(largest, _mm512_castps_si512(position));
    }
    // Compared as unsigned integers, which for positive floats have the same order; negative floats and NaN are above all.
    const __mmask16 inside = _mm512_cmplt_epu32_mask(largest, limit);
    const __m512i cell_word = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), inside, at, grid.cells, 4);
    _mm512_store_si512(&nearest.label[i], cell_word);
    collect(_mm512_movepi32_mask(cell_word), pending, pending_count);
    if (inside != 0xffff) collect(~inside, outside, outside_count);
    pixel = _mm512_add_epi32(pixel, _mm512_set1_epi32(16));
  }
}
#else
FLOWSEG_INLINE void look_up_cells(const Grid& grid, const Block<float, 3>& x, const Prefetcher& prefetch, Nearest<float>& nearest,
                                  int16_t (&pending)[kBlock + kSlack], int& pending_count,
                                  int16_t (&outside)[kBlock + kSlack], int& outside_count) {
  alignas(64) int32_t cell[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    cell[i] = cell_of(x.at[0][i], x.at[1][i], x.at[2][i], grid.low, grid.scale, grid.size);
  }
  for (int i = 0; i < kBlock; ++i) {
    if (i % 16 == 0) prefetch(i);
    const bool inside = cell[i] >= 0;
    const int cell_word = grid.cells[inside ? cell[i] : 0];
    nearest.label[i] = cell_word;
    pending[pending_count] = static_cast<int16_t>(i);
    pending_count += inside & (cell_word < 0);
    outside[outside_count] = static_cast<int16_t>(i);
    outside_count += !inside;
  }
}
#endif

void look_up_block(const Grid& grid, const Codes& codes, const Block<float, 3>& x, const Prefetcher& prefetch,
                   Nearest<float>& nearest) {
  int16_t pending[kBlock + kSlack], outside[kBlock + kSlack];
  int pending_count = 0, outside_count = 0;
  look_up_cells(grid, x, prefetch, nearest, pending, pending_count, outside, outside_count);
  for (int j = 0; j < outside_count; ++j) {
    const int i = outside[j];
    nearest.label[i] = search_one(codes, x.at[0][i], x.at[1][i], x.at[2][i]);
  }
  if (pending_count) search_lists(grid, x, pending, pending_count, nearest);
}

template <class T, int C>
void decode_block(const Decode& a, const PixelRange& p, const Block<T, C>& x, Nearest<T>& nearest) {
  if constexpr (std::is_same_v<T, float> && C == 3) {
    if (a.grid.cells && !a.distance && !a.margin) {
      Prefetcher prefetch(p);
      prefetch.read(a.x);
      return look_up_block(a.grid, a.codes, x, prefetch, nearest);
    }
  }
  if (a.margin) {
    search_block<true>(a.codes, x, nearest);
  } else {
    search_block<false>(a.codes, x, nearest);
  }
}

}  // namespace
}  // namespace flowseg::cpu
