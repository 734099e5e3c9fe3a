// The distance-aware correction of a block of pixels.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cpu/pixel/blocks.h"
#include "shared/correction.h"

namespace flowseg::cpu {
namespace {

// Whether the codes are below 1e4, and every coordinate of the block is within 8 times the largest of the codes and not NaN. Only
// then is the fast formula as accurate as the general one, and only then do its squares stay in the range of fp32.
template <class T, int C>
bool is_moderate(const Block<T, C>& x, double max_abs) {
  using I = typename Lanes<T>::I;
  using Int = typename Lanes<T>::Int;
  // Compare the bits as integers: they have the order of the magnitudes, NaN is larger than every number, and the integer units are
  // idle.
  I largest{};
  for (int c = 0; c < C; ++c) {
    for (int i = 0; i < kBlock; i += Lanes<T>::width) {
      const I magnitude = (I)lanes(&x.at[c][i]) & std::numeric_limits<Int>::max();
      largest = choose(magnitude > largest, magnitude, largest);
    }
  }
  const T limit = static_cast<T>(8 * max_abs);
  Int bits;
  std::memcpy(&bits, &limit, sizeof bits);
  bool moderate = max_abs < 1e4;
  for (int i = 0; i < Lanes<T>::width; ++i) moderate &= largest[i] <= bits;
  return moderate;
}

template <class T, int C, class Step>
FLOWSEG_INLINE void for_each_vector(const Block<T, C>& x, const Classes<typename Lanes<T>::Int>& classes,
                                    const Block<T, C>& own, T max_norm, const Prefetcher& prefetch, Block<T, C>& grad, Step step) {
  using V = typename Lanes<T>::V;
  for (int i = 0; i < kBlock; i += Lanes<T>::width) {
    prefetch(i);
    V point[C], code[C], result[C];
    for (int c = 0; c < C; ++c) {
      point[c] = lanes(&x.at[c][i]);
      code[c] = lanes(&own.at[c][i]);
    }
    const auto y = integer_lanes<T>(&classes.at[i]);
    step(point, y, code, result);
    if (max_norm < infinity<T>()) cap_norm<C>(result, max_norm);
    for (int c = 0; c < C; ++c) lanes(&grad.at[c][i]) = choose(y >= 0, result[c], V{});
  }
}

// Channels whose sums the registers hold next to the point. Sixteen channels are summed in two groups.
template <int C>
constexpr int kGroup = C > 8 ? 8 : C;

// |x - row|^2 + eps. With more than four channels in partial sums: one sum would be a chain of dependent additions that takes
// longer than the arithmetic.
template <int C, class V, class R, class T>
FLOWSEG_INLINE V distance_plus(const V (&x)[C], const R& row, T eps) {
  constexpr int kParts = C <= 4 ? 1 : C / 4;
  V part[kParts]{};
  part[0] += eps;
  for (int c = 0; c < C; ++c) {
    const V diff = x[c] - row[c];
    part[c % kParts] += diff * diff;
  }
  for (int n = kParts / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) part[i] += part[i + n];
  }
  return part[0];
}

// add_reciprocals_of_run for up to kRun classes. With more than four channels the weights of the run come first, then the pull of
// each group of channels: in one loop, sixteen channels would spill.
template <bool kOwn, int C, class V, class I, class M, class T>
FLOWSEG_INLINE void add_run(const V (&x)[C], const I& y, const M& mu, int64_t first, int64_t last, T eps, Rivals<C, V>& total) {
  if constexpr (C <= 4) {
    add_reciprocals_of_run<kOwn, C>(x, y, mu, first, last, eps, total);
  } else {
    V square[kRun], weight{};
    for (int64_t k = first; k < last; ++k) {
      V r = reciprocal(distance_plus<C>(x, mu[k], eps));
      if constexpr (kOwn) r = zero_where_equal(r, y, k);
      weight += r;
      square[k - first] = r * r;
    }
    total.weight += weight;
    for (int group = 0; group < C; group += kGroup<C>) {
      V pull[kGroup<C>]{};
      for (int64_t k = first; k < last; ++k) {
        const auto& row = mu[k];
        for (int c = 0; c < kGroup<C>; ++c) pull[c] += square[k - first] * (x[group + c] - row[group + c]);
      }
      for (int c = 0; c < kGroup<C>; ++c) total.pull[group + c] += pull[c];
    }
  }
}

// Sums over all classes, then subtracts the own class. Saves one compare per class; as accurate unless the own weight dominates.
template <int C, class V, class M, class T>
FLOWSEG_INLINE void add_all_but_own(const V (&x)[C], const V (&own)[C], const M& mu, int64_t classes, T eps, V& own_weight,
                                    Rivals<C, V>& total) {
  for (int64_t first = 0; first < classes; first += kRun) {
    add_run<false, C>(x, V{}, mu, first, std::min(first + kRun, classes), eps, total);
  }
  own_weight = reciprocal(distance_plus<C>(x, own, eps));
  total.weight -= own_weight;
  for (int c = 0; c < C; ++c) total.pull[c] -= own_weight * own_weight * (x[c] - own[c]);
}

// The own weight may be subtracted from the sum over all classes if it is at most kMaxOwnToRivals times the sum of the rivals. The
// error is then at most 4 ulp of that sum. Near a centroid with a small eps the own weight is millions of times larger.
constexpr int kMaxOwnToRivals = 4;

// A class whose logit is this much below the largest one has weight 0: exp underflows.
template <class T>
constexpr T kVanishes = sizeof(T) == 4 ? T(-87) : T(-745);

// The softmax of the rivals in one pass over the classes, in runs of kRun. A run first computes its distances. If one of them is
// the smallest so far, the sums are scaled down to it. Then come the weights of the run, and the pull of the classes whose weight
// is not 0 in all lanes. Each of the three steps needs fewer registers than one loop over the classes with all of them. With up to
// four channels one loop fits the registers, and the two passes of add_softmax are as fast.
template <Transform transform, int C, class V, class I, class M, class T>
void add_softmax_of_runs(const V (&x)[C], const V (&own)[C], const I& y, const M& mu, int64_t classes, T eps, T inverse_temperature,
                         V& smallest, Softmax<C, V>& state) {
  V diff[C], own_logit, slope;
  for (int c = 0; c < C; ++c) diff[c] = x[c] - own[c];
  smallest = distance_plus<C>(x, own, T(0));
  transform_distance<transform>(smallest, eps, inverse_temperature, own_logit, slope);
  state.largest = own_logit;
  for (int c = 0; c < C; ++c) state.own_pull[c] = slope * diff[c];
  for (int64_t first = 0; first < classes; first += kRun) {
    const int count = static_cast<int>(std::min(kRun, classes - first));
    V distance[kRun], weight[kRun], slopes[kRun];
    int64_t kept[kRun];
    V low = V{} + infinity<T>();
    for (int i = 0; i < count; ++i) {
      const V d = distance_plus<C>(x, mu[first + i], T(0));
      distance[i] = d;
      low = choose(d < low, d, low);
    }
    if (!none((I)(low < smallest))) {
      const auto lower = low < smallest;
      smallest = choose(lower, low, smallest);
      V logit;
      transform_distance<transform>(smallest, eps, inverse_temperature, logit, slope);
      const V factor = choose(lower, exponential(state.largest - logit), V{} + T(1));
      state.sum.weight *= factor;
      for (int c = 0; c < C; ++c) state.sum.pull[c] *= factor;
      state.largest = logit;
    }
    V highest;
    transform_distance<transform>(low, eps, inverse_temperature, highest, slope);
    if (none((I)(highest - state.largest >= kVanishes<T>))) continue;
    const bool has_own = may_hold(y, first, first + count);
    V total{};
    int used = 0;
    for (int i = 0; i < count; ++i) {
      V logit;
      transform_distance<transform>(distance[i], eps, inverse_temperature, logit, slope);
      const V below = logit - state.largest;
      const auto counts = below >= kVanishes<T>;
      V e = choose(counts, exponential(below), V{});
      if (has_own) e = zero_where_equal(e, y, first + i);
      total += e;
      weight[used] = e;
      slopes[used] = slope;
      kept[used] = first + i;
      used += !none((I)counts);
    }
    state.sum.weight += total;
    for (int group = 0; group < C; group += kGroup<C>) {
      V pull[kGroup<C>]{};
      for (int i = 0; i < used; ++i) {
        const auto& row = mu[kept[i]];
        for (int c = 0; c < kGroup<C>; ++c) {
          pull[c] += weight[i] * (slopes[i] * (x[group + c] - row[group + c]) - state.own_pull[group + c]);
        }
      }
      for (int c = 0; c < kGroup<C>; ++c) state.sum.pull[group + c] += pull[c];
    }
  }
  state.sum.weight += exponential(own_logit - state.largest);
}

template <class T, int C>
void correct_block(const Correction& options, const Codes& codes, const Block<T, C>& x,
                   const Classes<typename Lanes<T>::Int>& classes, const Block<T, C>& own, const Prefetcher& prefetch,
                   Block<T, C>& grad) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  const auto* mu = static_cast<const T(*)[C]>(codes.data);
  const T eps = static_cast<T>(options.eps), max_norm = static_cast<T>(options.max_norm);
  const T inverse_temperature = static_cast<T>(1 / options.temperature);
  const auto transform = static_cast<Transform>(options.transform);
  // The bound on eps keeps the weights 1 / (d + eps) at 1e12 or less, so their squares stay in the range of fp32. With is_moderate
  // no weight is more than 1.3e15 times another.
  if (transform == Transform::neg_log && options.temperature == 1 &&
      options.eps >= 1e-12 * std::max(1.0, codes.max_abs * codes.max_abs) && is_moderate(x, codes.max_abs)) {
    // If the own weight dominates in one vector, it may do so in the rest of the block. With few classes subtracting saves nothing.
    bool may_subtract_own = codes.classes > kRun;
    return for_each_vector(x, classes, own, max_norm, prefetch, grad, [&](const V(&p)[C], const I& y, const V(&m)[C], V(&g)[C]) {
      Rivals<C, V> sum;
      if (may_subtract_own) {
        V weight;
        add_all_but_own<C>(p, m, mu, codes.classes, eps, weight, sum);
        may_subtract_own = none((I)((y >= 0) & (weight > T(kMaxOwnToRivals) * sum.weight)));
      }
      if (!may_subtract_own) {
        sum = {};
        for (int64_t first = 0; first < codes.classes; first += kRun) {
          const int64_t last = std::min(first + kRun, codes.classes);
          if (may_hold(y, first, last)) {
            add_run<true, C>(p, y, mu, first, last, eps, sum);
          } else {
            add_run<false, C>(p, y, mu, first, last, eps, sum);
          }
        }
      }
      finish_reciprocals<C>(p, m, sum, eps, g);
    });
  }
  const auto by_softmax = [&](auto chosen) {
    for_each_vector(x, classes, own, max_norm, prefetch, grad, [&](const V(&p)[C], const I& y, const V(&m)[C], V(&g)[C]) {
      constexpr Transform transform = decltype(chosen)::value;
      V smallest = V{} + infinity<T>();
      Softmax<C, V> state;
      if constexpr (C <= 4) {
        find_smallest_distance<C>(p, mu, codes.classes, smallest);
        begin_softmax<transform, C>(p, m, smallest, eps, inverse_temperature, state);
        add_softmax<transform, C>(p, y, mu, codes.classes, eps, inverse_temperature, state);
      } else {
        add_softmax_of_runs<transform, C>(p, m, y, mu, codes.classes, eps, inverse_temperature, smallest, state);
      }
      finish_softmax<C>(p, smallest, state, inverse_temperature, g);
    });
  };
  switch (transform) {
    case Transform::neg_log: return by_softmax(std::integral_constant<Transform, Transform::neg_log>{});
    case Transform::neg_sq: return by_softmax(std::integral_constant<Transform, Transform::neg_sq>{});
    case Transform::neg_dist: return by_softmax(std::integral_constant<Transform, Transform::neg_dist>{});
    case Transform::inverse: return by_softmax(std::integral_constant<Transform, Transform::inverse>{});
  }
}

}  // namespace
}  // namespace flowseg::cpu
