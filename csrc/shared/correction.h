// The distance-aware correction of one pixel (or one vector of pixels): closed forms shared by every compiled backend.
//
// V is a vector or a small array of floats or doubles, I the integers of the same lanes, M anything whose mu[k][c] is channel c
// of class k. What depends on the machine (reciprocal, logarithm, exponential, square_root, choose, zero_where_equal, may_hold) is
// found by overload. Formulas: arXiv 2603.19218; derivation in docs/ops/distance_correction.md.
//
// Sums leave the pixel's own class out and it is added last: next to its centroid 1 - p_y would otherwise cancel.
#pragma once

#include "shared/types.h"

namespace flowseg {

// Centroids summed in one run before it is added to the total: keeps fp32 sums as accurate as pairwise summation.
constexpr int64_t kRun = 32;

template <int C, class V>
FLOWSEG_INLINE V squared_norm(const V (&v)[C]) {
  V sum = v[0] * v[0];
  for (int c = 1; c < C; ++c) sum += v[c] * v[c];
  return sum;
}

// What is summed over the rivals of a pixel's class: their weights, and the pull of each channel.
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

// The same where class k is not the pixel's own. Overloaded where predicates cost less than zeroing.
template <int C, class V, class I>
FLOWSEG_INLINE void add_rival(const V& r, const V (&diff)[C], const I& y, int64_t k, Rivals<C, V>& sum) {
  add_reciprocal<C>(zero_where_equal(r, y, k), diff, sum);
}

// Classes [first, last) of rows mu[k][c]; kOwn: the pixel's own class may be one of them.
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

// neg_log at temperature 1: p_k is proportional to r_k = 1 / (d_k + eps), so one reciprocal a centroid is all it takes.
// `y` counts from the first row of `mu`, so that a kernel may go through the classes in parts.
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

// Any transform and temperature, any magnitude, in two passes over the classes: the first finds the smallest distance, whose
// logit is the largest, as T decreases in d.
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

// grad = (2 / tau) sum_{k != y} p_k [T'(d_k) (x - mu_k) - T'(d_y) (x - mu_y)]; far from all codes the two nearly cancel, and
// taking the difference class by class keeps what is left.
template <int C, class V>
struct Softmax {
  V largest, home[C];   // largest logit; T'(d_y) (x - mu_y)
  Rivals<C, V> sum{};
};

template <Transform kind, int C, class V, class T>
FLOWSEG_INLINE void begin_softmax(const V (&x)[C], const V (&own)[C], const V& smallest, T eps, T inverse_temperature,
                                  Softmax<C, V>& state) {
  V diff[C], logit, slope;
  transform_distance<kind>(smallest, eps, inverse_temperature, state.largest, slope);
  for (int c = 0; c < C; ++c) diff[c] = x[c] - own[c];
  transform_distance<kind>(squared_norm<C>(diff), eps, inverse_temperature, logit, slope);
  for (int c = 0; c < C; ++c) state.home[c] = slope * diff[c];
  state.sum.weight = exponential(logit - state.largest);
}

template <Transform kind, int C, class V, class I, class M, class N, class T>
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
      transform_distance<kind>(squared_norm<C>(diff), eps, inverse_temperature, logit, slope);
      const V e = zero_where_equal(exponential(logit - state.largest), y, k);
      run.weight += e;
      for (int c = 0; c < C; ++c) run.pull[c] += e * (slope * diff[c] - state.home[c]);
    }
    state.sum.weight += run.weight;
    for (int c = 0; c < C; ++c) state.sum.pull[c] += run.pull[c];
  }
}

template <int C, class V, class T>
FLOWSEG_INLINE void finish_softmax(const V (&x)[C], const V& smallest, const Softmax<C, V>& state, T inverse_temperature,
                                   V (&grad)[C]) {
  // A distance that is not finite (NaN or overflow) makes the result NaN instead of something that looks right.
  const V poison = smallest * T(0) + squared_norm<C>(x) * T(0);
  for (int c = 0; c < C; ++c) grad[c] = T(2) * inverse_temperature * (state.sum.pull[c] / state.sum.weight) + poison;
}

// Cap on the norm of the correction.
template <int C, class V, class T>
FLOWSEG_INLINE void cap_norm(V (&grad)[C], T max_norm) {
  const V norm = square_root(squared_norm<C>(grad));
  const V factor = choose(norm > max_norm, max_norm / norm, V{} + T(1));
  for (int c = 0; c < C; ++c) grad[c] *= factor;
}

}  // namespace flowseg
