// Nearest centroids of a block of pixels; shared by nearest_centroid and decode_confusion.
//
// Without a decode grid, search_block compares every pixel with every centroid. With a grid (fp32, three channels) most pixels need
// one look-up instead:
//   1. look_up_cells reads the word of each pixel's cell. A word >= 0 is the class. A negative word names a list of candidate
//      classes: such pixels are collected in `pending`. Pixels outside the grid are collected in `outside`.
//   2. search_point compares a pixel outside the grid with every centroid.
//   3. search_lists compares the pending pixels with their candidates, eight at a time. Collecting the pixels first keeps the
//      first loop free of branches and lets step 3 prefetch the lists of later pixels.
// If the distance is wanted, it is computed from the label afterwards. If the margin is wanted, the grid is of order 2: every cell
// has a list, of all classes that can be nearest or second nearest. look_up_two_block searches the lists of all pixels in order.
// flowseg_kernels/decode_grid.py says why the result is exact. Distances have the arithmetic of search_block, bit for bit.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "cpu/pixel/decode_guesses.h"
#include "cpu/pixel/search.h"
#include "shared/decode_grid.h"

namespace flowseg::cpu {
namespace {

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

using flowseg::multiply_add;
#if defined(__AVX512F__)
FLOWSEG_INLINE F8 multiply_add(F8 a, F8 b, F8 c) { return (F8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif !defined(__AVX2__)  // with AVX2, F8 is F
FLOWSEG_INLINE F8 multiply_add(F8 a, F8 b, F8 c) {
  F half[3][2];
  std::memcpy(half[0], &a, sizeof a);
  std::memcpy(half[1], &b, sizeof b);
  std::memcpy(half[2], &c, sizeof c);
  for (int i = 0; i < 2; ++i) half[2][i] = multiply_add(half[0][i], half[1][i], half[2][i]);
  std::memcpy(&c, half[2], sizeof c);
  return c;
}
#endif

// The squared distances to eight points, stored by coordinate.
FLOWSEG_INLINE F8 distance8(float x, float y, float z, const float* xs, const float* ys, const float* zs) {
  const F8 dx = x - load8(xs), dy = y - load8(ys), dz = z - load8(zs);
  return multiply_add(dz, dz, multiply_add(dy, dy, dx * dx));
}

// The two smallest of the squared distances offered so far, per lane, and the class of the smallest. The first of equals wins.
struct TwoNearest {
  F8 squared = F8{} + infinity<float>(), second_squared = squared;
  F8 label{};  // exact: there are fewer than 2^24 classes

  FLOWSEG_INLINE void offer(F8 d, F8 candidate) {
    const auto closer = d < squared;
    second_squared = closer ? squared : (d < second_squared ? d : second_squared);
    squared = closer ? d : squared;
    label = closer ? candidate : label;
  }

  // Stores the result over all lanes for pixel i.
  FLOWSEG_INLINE void store(Nearest<float>& nearest, int i) const {
    float smallest, ignored;
    int lane, other;
    first_smallest(squared, smallest, lane);
    F8 rest = squared;
    rest[lane] = infinity<float>();
    float lowest = label[lane];
    first_smallest(rest, ignored, other);
    if (ignored == smallest) {  // lanes hold classes of several records, so a later lane may have a lower class
      for (int l = lane + 1; l < 8; ++l) {
        if (squared[l] == smallest && label[l] < lowest) lowest = label[l];
      }
    }
    const float in_lane = second_squared[lane];
    nearest.squared[i] = smallest;
    nearest.second_squared[i] = in_lane < ignored ? in_lane : ignored;
    nearest.label[i] = static_cast<int32_t>(lowest);
  }
};

// The squared distances to eight consecutive rows of three channels.
FLOWSEG_INLINE F8 distance_of_rows(float x, float y, float z, const float* FLOWSEG_RESTRICT rows) {
  float at[3][8];
  for (int i = 0; i < 8; ++i) {
    for (int c = 0; c < 3; ++c) at[c][i] = rows[3 * i + c];
  }
  return distance8(x, y, z, at[0], at[1], at[2]);
}

// Calls use(first class, squared distances) for each eight centroids in turn.
template <class Use>
FLOWSEG_INLINE void for_all_distances(const Codes& codes, float x, float y, float z, Use use) {
  const float* rows = static_cast<const float*>(codes.data);
  int64_t k = 0;
  for (; k + 8 <= codes.classes; k += 8) use(k, distance_of_rows(x, y, z, rows + 3 * k));
  if (k < codes.classes) {
    float last[24];
    for (int i = 0; i < 24; ++i) last[i] = k + i / 3 < codes.classes ? rows[3 * k + i] : infinity<float>();
    use(k, distance_of_rows(x, y, z, last));
  }
}

// The class of one point, by a search through all centroids; -1 for NaN.
FLOWSEG_INLINE int search_point(const Codes& codes, float x, float y, float z) {
  if (x != x || y != y || z != z) return -1;
  float best = infinity<float>();
  int label = 0;
  for_all_distances(codes, x, y, z, [&](int64_t k, F8 d) {
    float smallest;
    int lane;
    first_smallest(d, smallest, lane);
    if (smallest < best) {
      best = smallest;
      label = static_cast<int>(k) + lane;
    }
  });
  return label;
}

// The class and the two smallest squared distances of pixel i, by a search through all centroids.
FLOWSEG_INLINE void search_two_of_all(const Codes& codes, const Block<float, 3>& x, int i, Nearest<float>& nearest) {
  TwoNearest found;
  for_all_distances(codes, x.at[0][i], x.at[1][i], x.at[2][i], [&](int64_t k, F8 d) {
    found.offer(d, static_cast<float>(k) + F8{0, 1, 2, 3, 4, 5, 6, 7});
  });
  found.store(nearest, i);
  if (x.at[0][i] != x.at[0][i] || x.at[1][i] != x.at[1][i] || x.at[2][i] != x.at[2][i]) {
    nearest.label[i] = -1;
    nearest.squared[i] = static_cast<float>(__builtin_nanf(""));
  }
}

// The class and the two smallest squared distances of pixel i, by a search through the list whose first record is `first`.
FLOWSEG_INLINE void search_two_of_list(const Grid& grid, int first, const Block<float, 3>& x, int i, Nearest<float>& nearest) {
  TwoNearest found;
  const float* record = grid.records + static_cast<int64_t>(first) * 32;
  for (int left = grid.records_left[first]; left > 0; --left, record += 32) {
    found.offer(distance8(x.at[0][i], x.at[1][i], x.at[2][i], record, record + 8, record + 16), load8(record + 24));
  }
  found.store(nearest, i);
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
    d = c ? multiply_add(diff, diff, d) : diff * diff;
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
    nearest.label[i] = search_point(codes, x.at[0][i], x.at[1][i], x.at[2][i]);
  }
  if (pending_count) search_lists(grid, x, pending, pending_count, nearest);
}

// The squared distance of each pixel to the code of its class.
void distances_to_classes(const Codes& codes, const Block<float, 3>& x, Nearest<float>& nearest) {
  Block<float, 3> code;
  const float* FLOWSEG_RESTRICT mu = static_cast<const float*>(codes.data);
  for (int i = 0; i < kBlock; ++i) {
    const float* row = mu + 3 * static_cast<int64_t>(nearest.label[i] < 0 ? 0 : nearest.label[i]);
    for (int c = 0; c < 3; ++c) code.at[c][i] = row[c];
  }
  constexpr int W = Lanes<float>::width;
  for (int i = 0; i < kBlock; i += W) {
    F d{};
    for (int c = 0; c < 3; ++c) {
      const F diff = lanes(&x.at[c][i]) - lanes(&code.at[c][i]);
      d = c ? multiply_add(diff, diff, d) : diff * diff;
    }
    lanes(&nearest.squared[i]) = d;
  }
}

#if defined(__AVX512F__)
// The smaller of two sorted pairs of vectors, lane by lane: the two smallest of four numbers.
FLOWSEG_INLINE void merge(__m512& smallest, __m512& second, __m512 other, __m512 other_second) {
  second = _mm512_min_ps(_mm512_max_ps(smallest, other), _mm512_min_ps(second, other_second));
  smallest = _mm512_min_ps(smallest, other);
}

// Searches the first records of the lists of sixteen pixels. Two lists share a vector, and eight such vectors are reduced together,
// with three levels of shuffles instead of three per vector. `full` gets a bit for each pixel whose list may have more records.
FLOWSEG_INLINE unsigned search_two_of_sixteen(const Grid& grid, const int32_t* first, const Block<float, 3>& x, int i,
                                              Nearest<float>& nearest) {
  // Vector v has the lists of pixels 8 (v / 4) + v % 4 and four further on. The reduction then ends in the order of the pixels.
  const __m512i pixels = _mm512_inserti32x8(_mm512_setzero_si512(), _mm256_set1_epi32(4), 1);
  const __m512 point[3] = {(__m512)lanes(&x.at[0][i]), (__m512)lanes(&x.at[1][i]), (__m512)lanes(&x.at[2][i])};
  const float* record[16];
  F d[8];
  for (int v = 0; v < 8; ++v) {
    const int own = v / 4 * 8 + v % 4;
    const float* a = record[own] = grid.records + static_cast<int64_t>(first[own]) * 32;
    const float* b = record[own + 4] = grid.records + static_cast<int64_t>(first[own + 4]) * 32;
    const __m512i which = _mm512_add_epi32(pixels, _mm512_set1_epi32(own));
    for (int c = 0; c < 3; ++c) {
      const __m512 codes = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a + 8 * c)), _mm256_loadu_ps(b + 8 * c), 1);
      const F diff = (F)_mm512_permutexvar_ps(which, point[c]) - (F)codes;
      d[v] = c ? multiply_add(diff, diff, d[v]) : diff * diff;
    }
  }
  __m512 smallest[4], second[4];
  for (int v = 0; v < 4; ++v) {
    const __m512 p = (__m512)d[2 * v], q = (__m512)d[2 * v + 1], low = _mm512_unpacklo_ps(p, q), high = _mm512_unpackhi_ps(p, q);
    smallest[v] = _mm512_min_ps(low, high);
    second[v] = _mm512_max_ps(low, high);
  }
  const auto as_pairs = [](__m512 v) { return _mm512_castps_pd(v); };
  for (int v = 0; v < 2; ++v) {
    const auto low = [&](const __m512* of) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(as_pairs(of[2 * v]), as_pairs(of[2 * v + 1])));
    };
    const auto high = [&](const __m512* of) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(as_pairs(of[2 * v]), as_pairs(of[2 * v + 1])));
    };
    __m512 a = low(smallest), b = low(second);
    merge(a, b, high(smallest), high(second));
    smallest[v] = a;
    second[v] = b;
  }
  __m512 a = _mm512_shuffle_f32x4(smallest[0], smallest[1], 0x88), b = _mm512_shuffle_f32x4(second[0], second[1], 0x88);
  merge(a, b, _mm512_shuffle_f32x4(smallest[0], smallest[1], 0xdd), _mm512_shuffle_f32x4(second[0], second[1], 0xdd));
  _mm512_store_ps(&nearest.squared[i], a);
  _mm512_store_ps(&nearest.second_squared[i], b);
  unsigned full = 0;
  for (int v = 0; v < 8; ++v) {
    const int own = v / 4 * 8 + v % 4;
    const __m512i which = _mm512_add_epi32(pixels, _mm512_set1_epi32(own));
    const unsigned mask = _mm512_cmp_ps_mask((__m512)d[v], _mm512_permutexvar_ps(which, a), _CMP_EQ_OQ);
    nearest.label[i + own] = static_cast<int32_t>(record[own][24 + __builtin_ctz(mask | 1u << 7)]);
    nearest.label[i + own + 4] = static_cast<int32_t>(record[own + 4][24 + __builtin_ctz(mask >> 8 | 1u << 7)]);
    full |= (record[own][31] >= 0 ? 1u : 0u) << own | (record[own + 4][31] >= 0 ? 1u : 0u) << (own + 4);
  }
  return full;
}
#endif

// Looks up a block in a grid of order 2.
void look_up_two_block(const Grid& grid, const Codes& codes, const Block<float, 3>& x, const Prefetcher& prefetch,
                       Nearest<float>& nearest) {
  int16_t pending[kBlock + kSlack], outside[kBlock + kSlack];
  int pending_count = 0, outside_count = 0;
  look_up_cells(grid, x, prefetch, nearest, pending, pending_count, outside, outside_count);
  // Pixels outside the grid look at any list first. A branch would cost more.
  alignas(64) int32_t first[kBlock + 16];
  for (int i = 0; i < kBlock; ++i) first[i] = nearest.label[i] < 0 ? -1 - nearest.label[i] : 0;
#if defined(__AVX512F__)
  for (int i = 0; i < 16; ++i) first[kBlock + i] = 0;
  for (int i = 0; i < kBlock; i += 16) {
    for (int j = i + 16; j < i + 32; ++j) {
      const float* record = grid.records + static_cast<int64_t>(first[j]) * 32;
      __builtin_prefetch(record);
      __builtin_prefetch(record + 16);
    }
    for (unsigned full = search_two_of_sixteen(grid, first + i, x, i, nearest); full; full &= full - 1) {
      const int at = i + __builtin_ctz(full);
      search_two_of_list(grid, first[at], x, at, nearest);
    }
  }
#else
  for (int i = 0; i < kBlock; ++i) search_two_of_list(grid, first[i], x, i, nearest);
#endif
  for (int j = 0; j < outside_count; ++j) search_two_of_all(codes, x, outside[j], nearest);
}

// Decodes the blocks of a chunk, in order; `recent` is the same for all of them.
template <class T, int C>
void decode_block(const Decode& a, const PixelRange& p, Recent& recent, Nearest<T>& nearest) {
  if constexpr (std::is_same_v<T, float> && C >= 4) {
    if (a.tables.guesses.projection && !recent.guesses_fail) {
      guess_block<C>(a, p, recent, nearest);
      return recent.add(nearest.label, p.length);
    }
  }
  Block<T, C> x;
  load(a.x, p, x);
  if constexpr (std::is_same_v<T, float> && C == 3) {
    if (a.tables.grid.cells) {
      Prefetcher prefetch(p);
      prefetch.read(a.x);
      if (a.margin) return look_up_two_block(a.tables.grid, a.codes, x, prefetch, nearest);
      look_up_block(a.tables.grid, a.codes, x, prefetch, nearest);
      if (a.distance) distances_to_classes(a.codes, x, nearest);
      return;
    }
  }
  const T* mu = static_cast<const T*>(a.codes.data);
  if (a.margin) {
    search_block<true>(mu, a.codes.classes, x, p.length, nearest);
  } else {
    search_block<false>(mu, a.codes.classes, x, p.length, nearest);
  }
}

}  // namespace
}  // namespace flowseg::cpu
