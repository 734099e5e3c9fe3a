// Comparison of pixels with all codes, and with one code each.
#pragma once

#include "cpu/pixel/blocks.h"

namespace flowseg::cpu {
namespace {

template <class T>
struct alignas(64) Nearest {
  typename Lanes<T>::Int label[kBlock];         // -1 for NaN
  T squared[kBlock], second_squared[kBlock];  // squared distances; set if the distance or the margin is wanted
};

// Squared distances of a vector of pixels to one code. Every search adds in this order, so all find the same bits.
template <class V, class T, size_t C>
FLOWSEG_INLINE V squared_to(const V (&point)[C], const T* code) {
  V d{};
  for (size_t c = 0; c < C; ++c) {
    const V diff = point[c] - code[c];
    d = c ? multiply_add(diff, diff, d) : diff * diff;
  }
  return d;
}

// Squared distances of a vector of pixels to one code each.
template <size_t C>
FLOWSEG_INLINE F squared_to(const F (&point)[C], const F (&code)[C]) {
  F d{};
  for (size_t c = 0; c < C; ++c) {
    const F diff = point[c] - code[c];
    d = c ? multiply_add(diff, diff, d) : diff * diff;
  }
  return d;
}

// Compares the first `length` pixels of a block with all codes.
template <bool kSecond, class T, int C>
void search_block(const T* FLOWSEG_RESTRICT mu, int64_t classes, const Block<T, C>& x, int length, Nearest<T>& nearest) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  // Two vectors at a time: the latency of compare and select of one hides behind the other.
  constexpr int U = C <= 8 ? 2 : 1;
  constexpr int W = Lanes<T>::width;
  for (int i = 0; i < length; i += U * W) {
    V point[U][C], best[U], second[U];
    I index[U];
    for (int u = 0; u < U; ++u) {
      for (int c = 0; c < C; ++c) point[u][c] = lanes(&x.at[c][i + u * W]);
      best[u] = second[u] = V{} + infinity<T>();
      index[u] = I{};
    }
    I current{};
    for (int64_t k = 0; k < classes; ++k) {
      for (int u = 0; u < U; ++u) {
        const V d = squared_to(point[u], mu + k * C);
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

#if defined(__AVX512F__)
// Four channels of one row per lane: four lanes of 128 bits, each transposed.
FLOWSEG_INLINE void four_channels(const float* mu, const int32_t* row, int C, F* out) {
  __m512 v[4];
  for (int i = 0; i < 4; ++i) {
    const auto part = [&](int j) { return _mm_loadu_ps(mu + static_cast<int64_t>(row[i + 4 * j]) * C); };
    v[i] = _mm512_castps128_ps512(part(0));
    v[i] = _mm512_insertf32x4(v[i], part(1), 1);
    v[i] = _mm512_insertf32x4(v[i], part(2), 2);
    v[i] = _mm512_insertf32x4(v[i], part(3), 3);
  }
  const __m512d a = (__m512d)_mm512_unpacklo_ps(v[0], v[1]), b = (__m512d)_mm512_unpacklo_ps(v[2], v[3]);
  const __m512d c = (__m512d)_mm512_unpackhi_ps(v[0], v[1]), d = (__m512d)_mm512_unpackhi_ps(v[2], v[3]);
  out[0] = (F)_mm512_unpacklo_pd(a, b);
  out[1] = (F)_mm512_unpackhi_pd(a, b);
  out[2] = (F)_mm512_unpacklo_pd(c, d);
  out[3] = (F)_mm512_unpackhi_pd(c, d);
}
#elif defined(__AVX2__)
FLOWSEG_INLINE void four_channels(const float* mu, const int32_t* row, int C, F* out) {
  __m256 v[4];
  for (int i = 0; i < 4; ++i) {
    const auto part = [&](int j) { return _mm_loadu_ps(mu + static_cast<int64_t>(row[i + 4 * j]) * C); };
    v[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(part(0)), part(1), 1);
  }
  const __m256d a = (__m256d)_mm256_unpacklo_ps(v[0], v[1]), b = (__m256d)_mm256_unpacklo_ps(v[2], v[3]);
  const __m256d c = (__m256d)_mm256_unpackhi_ps(v[0], v[1]), d = (__m256d)_mm256_unpackhi_ps(v[2], v[3]);
  out[0] = (F)_mm256_unpacklo_pd(a, b);
  out[1] = (F)_mm256_unpackhi_pd(a, b);
  out[2] = (F)_mm256_unpacklo_pd(c, d);
  out[3] = (F)_mm256_unpackhi_pd(c, d);
}
#else
FLOWSEG_INLINE void four_channels(const float* mu, const int32_t* row, int C, F* out) {
  for (int i = 0; i < Lanes<float>::width; ++i) {
    for (int c = 0; c < 4; ++c) out[c][i] = mu[static_cast<int64_t>(row[i]) * C + c];
  }
}
#endif

// The codes of one class per lane, by channel.
template <size_t C>
FLOWSEG_INLINE void codes_of(const float* mu, const int32_t* label, F (&code)[C]) {
  static_assert(C % 4 == 0);
  for (size_t c = 0; c < C; c += 4) four_channels(mu + c, label, C, &code[c]);
}

// Compares pixel i of a block with all codes, a vector of codes at a time.
template <bool kSecond, int C>
void search_one(const float* mu, int64_t classes, const Block<float, C>& x, int i, Nearest<float>& nearest) {
  constexpr int W = Lanes<float>::width;
  F point[C], code[C];
  bool unknown = false;
  for (int c = 0; c < C; ++c) {
    point[c] = F{} + x.at[c][i];
    unknown |= x.at[c][i] != x.at[c][i];
  }
  F best = F{} + infinity<float>(), second = best;
  FI index{};
  for (int64_t k = 0; k < classes; k += W) {
    alignas(64) int32_t label[W];
    for (int l = 0; l < W; ++l) label[l] = static_cast<int32_t>(k + l < classes ? k + l : classes - 1);
    codes_of(mu, label, code);
    F d = squared_to(point, code);
    for (int l = static_cast<int>(classes - k); l < W; ++l) d[l] = infinity<float>();
    const FI closer = d < best;
    if constexpr (kSecond) second = choose(closer, best, choose(d < second, d, second));
    best = choose(closer, d, best);
    index = choose(closer, integer_lanes<float>(label), index);
  }
  float smallest = infinity<float>(), next = smallest;
  int32_t first = 0;
  for (int l = 0; l < W; ++l) {
    if (best[l] < smallest || (best[l] == smallest && best[l] < infinity<float>() && index[l] < first)) {
      next = smallest < next ? smallest : next;
      smallest = best[l];
      first = index[l];
    } else {
      next = best[l] < next ? best[l] : next;
    }
    if constexpr (kSecond) next = second[l] < next ? second[l] : next;
  }
  nearest.label[i] = unknown ? -1 : first;
  nearest.squared[i] = unknown ? __builtin_nanf("") : smallest;
  nearest.second_squared[i] = next;
}

}  // namespace
}  // namespace flowseg::cpu
