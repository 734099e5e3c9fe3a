// The distance-aware correction of one pixel (or one vector of pixels): closed forms shared by every compiled backend.
//
// V is float, double or a vector of them, I the integers of the same lanes. What depends on the machine (reciprocal, logarithm,
// exponential, square_root, choose) is found by overload. Formulas: arXiv 2603.19218; derivation in docs/ops/distance_correction.md.
//
// Sums leave the pixel's own class out and it is added last: next to its centroid 1 - p_y would otherwise cancel.
#pragma once

#include <cstdint>

#include "flowseg/macros.h"

namespace flowseg {

enum class Transform : int { neg_log = 0, neg_sq = 1, neg_dist = 2, inverse = 3 };

// Centroids summed in one run before it is added to the total: keeps fp32 sums as accurate as pairwise summation.
constexpr int64_t kRun = 32;

template <int C, class V>
FLOWSEG_INLINE V squared_norm(const V (&v)[C]) {
  V sum = v[0] * v[0];
  for (int c = 1; c < C; ++c) sum += v[c] * v[c];
  return sum;
}

// neg_log at temperature 1: p_k is proportional to r_k = 1 / (d_k + eps), so one reciprocal a centroid is all it takes.
// grad = 2 [ (1 - p_y) r_y (x - mu_y) - sum_{k != y} p_k r_k (x - mu_k) ]
template <int C, class V, class I, class T>
FLOWSEG_INLINE void correct_by_reciprocals(const V (&x)[C], const I& y, const V (&own)[C], const T* FLOWSEG_RESTRICT mu,
                                           int64_t classes, T eps, V (&grad)[C]) {
  V rivals{}, pull[C] = {};
  for (int64_t first = 0; first < classes; first += kRun) {
    const int64_t last = first + kRun < classes ? first + kRun : classes;
    V run{}, run_pull[C] = {};
    for (int64_t k = first; k < last; ++k) {
      V diff[C];
      V d = V{} + eps;
      for (int c = 0; c < C; ++c) {
        diff[c] = x[c] - mu[k * C + c];
        d += diff[c] * diff[c];
      }
      const V r = zero_where_equal(reciprocal(d), y, k);
      run += r;
      const V weight = r * r;
      for (int c = 0; c < C; ++c) run_pull[c] += weight * diff[c];
    }
    rivals += run;
    for (int c = 0; c < C; ++c) pull[c] += run_pull[c];
  }
  V diff[C];
  for (int c = 0; c < C; ++c) diff[c] = x[c] - own[c];
  const V r = T(1) / (squared_norm<C>(diff) + eps);
  const V share = T(1) / (rivals + r);
  for (int c = 0; c < C; ++c) grad[c] = T(2) * (diff[c] * (r * (rivals * share)) - pull[c] * share);
}

// Logit T(d) / tau and slope T'(d).
template <Transform kind, class V, class T>
FLOWSEG_INLINE void transform_distance(const V& d, T eps, T inverse_temperature, V& logit, V& slope) {
  if constexpr (kind == Transform::neg_log) {
    logit = -logarithm(d + eps) * inverse_temperature;
    slope = T(-1) / (d + eps);
  } else if constexpr (kind == Transform::neg_sq) {
    logit = -d * inverse_temperature;
    slope = V{} - T(1);
  } else if constexpr (kind == Transform::neg_dist) {
    const V root = square_root(d + eps);
    logit = -root * inverse_temperature;
    slope = T(-0.5) / root;
  } else {
    const V r = T(1) / (d + eps);
    logit = r * inverse_temperature;
    slope = -r * r;
  }
}

// Any transform and temperature, any magnitude: T decreases in d, so the largest logit is that of the smallest distance.
// grad = (2 / tau) sum_{k != y} p_k [T'(d_k) (x - mu_k) - T'(d_y) (x - mu_y)]; far from all codes the two nearly cancel, and
// taking the difference class by class keeps what is left.
template <Transform kind, int C, class V, class I, class T>
FLOWSEG_INLINE void correct_by_softmax(const V (&x)[C], const I& y, const V (&own)[C], const T* FLOWSEG_RESTRICT mu,
                                       int64_t classes, T eps, T inverse_temperature, V (&grad)[C]) {
  V diff[C];
  V smallest = V{} + infinity<T>();
  for (int64_t k = 0; k < classes; ++k) {
    for (int c = 0; c < C; ++c) diff[c] = x[c] - mu[k * C + c];
    const V d = squared_norm<C>(diff);
    smallest = choose(d < smallest, d, smallest);
  }
  V largest, own_logit, logit, slope;
  transform_distance<kind>(smallest, eps, inverse_temperature, largest, slope);
  V home[C];
  for (int c = 0; c < C; ++c) diff[c] = x[c] - own[c];
  transform_distance<kind>(squared_norm<C>(diff), eps, inverse_temperature, own_logit, slope);
  for (int c = 0; c < C; ++c) home[c] = slope * diff[c];
  V total = exponential(own_logit - largest), push[C] = {};
  for (int64_t first = 0; first < classes; first += kRun) {
    const int64_t last = first + kRun < classes ? first + kRun : classes;
    V run{}, run_push[C] = {};
    for (int64_t k = first; k < last; ++k) {
      for (int c = 0; c < C; ++c) diff[c] = x[c] - mu[k * C + c];
      transform_distance<kind>(squared_norm<C>(diff), eps, inverse_temperature, logit, slope);
      const V e = zero_where_equal(exponential(logit - largest), y, k);
      run += e;
      for (int c = 0; c < C; ++c) run_push[c] += e * (slope * diff[c] - home[c]);
    }
    total += run;
    for (int c = 0; c < C; ++c) push[c] += run_push[c];
  }
  // A distance that is not finite (NaN or overflow) makes the result NaN instead of something that looks right.
  const V poison = smallest * T(0) + squared_norm<C>(x) * T(0);
  for (int c = 0; c < C; ++c) grad[c] = T(2) * inverse_temperature * (push[c] / total) + poison;
}

// Cap on the norm of the correction.
template <int C, class V, class T>
FLOWSEG_INLINE void cap_norm(V (&grad)[C], T max_norm) {
  const V norm = square_root(squared_norm<C>(grad));
  const V factor = choose(norm > max_norm, max_norm / norm, V{} + T(1));
  for (int c = 0; c < C; ++c) grad[c] *= factor;
}

}  // namespace flowseg
