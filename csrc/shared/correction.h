// The distance-aware correction of one pixel, or of one vector of pixels: the formulas that every compiled backend shares.
//
// V is a vector or a small array of floats or doubles, I is a vector of integers with the same lanes, and mu[k][c] is channel c of
// class k. Each backend provides the functions that depend on the machine as overloads for its V: reciprocal, logarithm,
// exponential, square_root, choose, zero_where_equal and may_hold. The formulas are those of arXiv 2603.19218;
// docs/ops/distance_correction.md derives them.
//
// The sums leave out the pixel's own class, which is added last: near its centroid, 1 - p_y would cancel otherwise.
#pragma once

#include "shared/types.h"

namespace flowseg {

// The positions in TRANSFORMS of flowseg_kernels.
enum class Transform : int { neg_log = 0, neg_sq = 1, neg_dist = 2, inverse = 3 };

// Centroids per partial sum. Adding up partial sums keeps fp32 sums as accurate as pairwise summation.
constexpr int64_t kRun = 32;

template <int C, class V>
FLOWSEG_INLINE V squared_norm(const V (&v)[C]) {
  V sum = v[0] * v[0];
  for (int c = 1; c < C; ++c) sum += v[c] * v[c];
  return sum;
}

// Sums over the rivals, which are the classes other than the pixel's own: their weights, and their pull per channel.
template <int C, class V>
struct Rivals {
  V weight{};
  V pull[C] = {};
};

template <int C, class V>
FLOWSEG_INLINE void add_reciprocal(const V& r, const V (&diff)[C], Rivals<C, V>& sum) {
  sum.weight += r;
  const V weight = r * r;
  for (int c = 0; c < C; ++c) sum.pull[c] += weight * diff[c];
}

// Adds class k unless it is the pixel's own. A GPU overloads this function: there a predicate costs less than zeroing.
template <int C, class V, class I>
FLOWSEG_INLINE void add_rival(const V& r, const V (&diff)[C], const I& y, int64_t k, Rivals<C, V>& sum) {
  add_reciprocal<C>(zero_where_equal(r, y, k), diff, sum);
}

// Adds the classes [first, last). kOwn: the pixel's own class may be one of them.
template <bool kOwn, int C, class V, class I, class M, class N, class T>
FLOWSEG_INLINE void add_reciprocals_of_run(const V (&x)[C], const I& y, const M& mu, N first, N last, T eps,
                                           Rivals<C, V>& total) {
  Rivals<C, V> run;
  FLOWSEG_UNROLL_CLASSES
  for (N k = first; k < last; ++k) {
    const auto& row = mu[k];
    V diff[C];
    V d = V{} + eps;
    for (int c = 0; c < C; ++c) {
      diff[c] = x[c] - row[c];
      d += diff[c] * diff[c];
    }
    if constexpr (kOwn) {
      add_rival<C>(reciprocal(d), diff, y, k, run);
    } else {
      add_reciprocal<C>(reciprocal(d), diff, run);
    }
  }
  total.weight += run.weight;
  for (int c = 0; c < C; ++c) total.pull[c] += run.pull[c];
}

// The fast formula, for neg_log at temperature 1: p_k is proportional to r_k = 1 / (d_k + eps), which takes one reciprocal per
// centroid. `y` counts from the first row of `mu`, so a kernel can process the classes in parts.
template <int C, class V, class I, class M, class N, class T>
FLOWSEG_INLINE void add_reciprocals(const V (&x)[C], const I& y, const M& mu, N classes, T eps, Rivals<C, V>& total) {
  for (N first = 0; first < classes; first += kRun) {
    const N last = first + static_cast<N>(kRun) < classes ? first + static_cast<N>(kRun) : classes;
    if (may_hold(y, first, last)) {
      add_reciprocals_of_run<true, C>(x, y, mu, first, last, eps, total);
    } else {
      add_reciprocals_of_run<false, C>(x, y, mu, first, last, eps, total);
    }
  }
}

// grad = 2 [ (1 - p_y) r_y (x - mu_y) - sum_{k != y} p_k r_k (x - mu_k) ]
template <int C, class V, class T>
FLOWSEG_INLINE void finish_reciprocals(const V (&x)[C], const V (&own)[C], const Rivals<C, V>& sum, T eps, V (&grad)[C]) {
  V diff[C];
  for (int c = 0; c < C; ++c) diff[c] = x[c] - own[c];
  const V r = reciprocal(squared_norm<C>(diff) + eps);
  const V share = reciprocal(sum.weight + r);
  for (int c = 0; c < C; ++c) grad[c] = T(2) * (diff[c] * (r * (sum.weight * share)) - sum.pull[c] * share);
}

// Logit T(d) / tau and slope T'(d).
template <Transform transform, class V, class T>
FLOWSEG_INLINE void transform_distance(const V& d, T eps, T inverse_temperature, V& logit, V& slope) {
  if constexpr (transform == Transform::neg_log) {
    logit = -logarithm(d + eps) * inverse_temperature;
    slope = T(-1) / (d + eps);
  } else if constexpr (transform == Transform::neg_sq) {
    logit = -d * inverse_temperature;
    slope = V{} - T(1);
  } else if constexpr (transform == Transform::neg_dist) {
    const V root = square_root(d + eps);
    logit = -root * inverse_temperature;
    slope = T(-0.5) / root;
  } else {
    static_assert(transform == Transform::inverse);
    const V r = T(1) / (d + eps);
    logit = r * inverse_temperature;
    slope = -r * r;
  }
}

// The general formula, for any transform, temperature and magnitude, takes two passes over the classes. The first pass finds the
// smallest distance: T decreases in d, so its logit is the largest.
template <int C, class V, class M, class N>
FLOWSEG_INLINE void find_smallest_distance(const V (&x)[C], const M& mu, N classes, V& smallest) {
  FLOWSEG_UNROLL_CLASSES
  for (N k = 0; k < classes; ++k) {
    const auto& row = mu[k];
    V diff[C];
    for (int c = 0; c < C; ++c) diff[c] = x[c] - row[c];
    const V d = squared_norm<C>(diff);
    smallest = choose(d < smallest, d, smallest);
  }
}

// The second pass: grad = (2 / tau) sum_{k != y} p_k [T'(d_k) (x - mu_k) - T'(d_y) (x - mu_y)]. Far from all codes the two terms
// nearly cancel. Subtracting them per class, before the sum, keeps the difference accurate.
template <int C, class V>
struct Softmax {
  V largest;      // logit
  V own_pull[C];  // T'(d_y) (x - mu_y)
  Rivals<C, V> sum{};
};

template <Transform transform, int C, class V, class T>
FLOWSEG_INLINE void begin_softmax(const V (&x)[C], const V (&own)[C], const V& smallest, T eps, T inverse_temperature,
                                  Softmax<C, V>& state) {
  V diff[C], logit, slope;
  transform_distance<transform>(smallest, eps, inverse_temperature, state.largest, slope);
  for (int c = 0; c < C; ++c) diff[c] = x[c] - own[c];
  transform_distance<transform>(squared_norm<C>(diff), eps, inverse_temperature, logit, slope);
  for (int c = 0; c < C; ++c) state.own_pull[c] = slope * diff[c];
  state.sum.weight = exponential(logit - state.largest);
}

template <Transform transform, int C, class V, class I, class M, class N, class T>
FLOWSEG_INLINE void add_softmax(const V (&x)[C], const I& y, const M& mu, N classes, T eps, T inverse_temperature,
                                Softmax<C, V>& state) {
  for (N first = 0; first < classes; first += kRun) {
    const N last = first + static_cast<N>(kRun) < classes ? first + static_cast<N>(kRun) : classes;
    Rivals<C, V> run;
    FLOWSEG_ONE_CLASS_AT_A_TIME
    for (N k = first; k < last; ++k) {
      const auto& row = mu[k];
      V diff[C], logit, slope;
      for (int c = 0; c < C; ++c) diff[c] = x[c] - row[c];
      transform_distance<transform>(squared_norm<C>(diff), eps, inverse_temperature, logit, slope);
      const V e = zero_where_equal(exponential(logit - state.largest), y, k);
      run.weight += e;
      for (int c = 0; c < C; ++c) run.pull[c] += e * (slope * diff[c] - state.own_pull[c]);
    }
    state.sum.weight += run.weight;
    for (int c = 0; c < C; ++c) state.sum.pull[c] += run.pull[c];
  }
}

template <int C, class V, class T>
FLOWSEG_INLINE void finish_softmax(const V (&x)[C], const V& smallest, const Softmax<C, V>& state, T inverse_temperature,
                                   V (&grad)[C]) {
  // A distance that is NaN or overflows makes the result NaN, not a number that looks valid.
  const V poison = smallest * T(0) + squared_norm<C>(x) * T(0);
  for (int c = 0; c < C; ++c) grad[c] = T(2) * inverse_temperature * (state.sum.pull[c] / state.sum.weight) + poison;
}

// Scales the correction down to max_norm if its norm is larger.
template <int C, class V, class T>
FLOWSEG_INLINE void cap_norm(V (&grad)[C], T max_norm) {
  const V norm = square_root(squared_norm<C>(grad));
  const V factor = choose(norm > max_norm, max_norm / norm, V{} + T(1));
  for (int c = 0; c < C; ++c) grad[c] *= factor;
}

}  // namespace flowseg
