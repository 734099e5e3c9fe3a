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

// Sums over all classes, then subtracts the own class. Saves one compare per class; as accurate unless the own weight dominates.
template <int C, class V, class M, class T>
FLOWSEG_INLINE void add_all_but_own(const V (&x)[C], const V (&own)[C], const M& mu, int64_t classes, T eps, V& own_weight,
                                    Rivals<C, V>& total) {
  for (int64_t first = 0; first < classes; first += kRun) {
    add_reciprocals_of_run<false, C>(x, V{}, mu, first, std::min(first + kRun, classes), eps, total);
  }
  V diff[C];
  V d = V{} + eps;
  for (int c = 0; c < C; ++c) {
    diff[c] = x[c] - own[c];
    d += diff[c] * diff[c];
  }
  own_weight = reciprocal(d);
  total.weight -= own_weight;
  for (int c = 0; c < C; ++c) total.pull[c] -= own_weight * own_weight * diff[c];
}

// The own weight may be subtracted from the sum over all classes if it is at most kMaxOwnToRivals times the sum of the rivals. The
// error is then at most 4 ulp of that sum. Near a centroid with a small eps the own weight is millions of times larger.
constexpr int kMaxOwnToRivals = 4;

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
        add_reciprocals<C>(p, y, mu, codes.classes, eps, sum);
      }
      finish_reciprocals<C>(p, m, sum, eps, g);
    });
  }
  const auto by_softmax = [&](auto chosen) {
    for_each_vector(x, classes, own, max_norm, prefetch, grad, [&](const V(&p)[C], const I& y, const V(&m)[C], V(&g)[C]) {
      constexpr Transform transform = decltype(chosen)::value;
      V smallest = V{} + infinity<T>();
      find_smallest_distance<C>(p, mu, codes.classes, smallest);
      Softmax<C, V> state;
      begin_softmax<transform, C>(p, m, smallest, eps, inverse_temperature, state);
      add_softmax<transform, C>(p, y, mu, codes.classes, eps, inverse_temperature, state);
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
