// The distance-aware correction of a block of pixels.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "blocks.h"
#include "shared/correction.h"

namespace flowseg::cpu {
namespace {

// True when no point is far out compared with the codes. Only then is the fast formula as exact as the general one, and its
// squares inside the range of fp32. False for NaN too.
template <class T, int C>
bool is_moderate(const Block<T, C>& x, double reach) {
  using I = typename Lanes<T>::I;
  using Int = typename Lanes<T>::Int;
  // Magnitudes have the order of their bits, NaN above all, and integers are compared on pipes that are idle here.
  I largest{};
  for (int c = 0; c < C; ++c) {
    for (int i = 0; i < kBlock; i += Lanes<T>::width) {
      const I magnitude = (I)lanes(&x.at[c][i]) & std::numeric_limits<Int>::max();
      largest = choose(magnitude > largest, magnitude, largest);
    }
  }
  const T limit = static_cast<T>(8 * reach);
  Int bits;
  std::memcpy(&bits, &limit, sizeof bits);
  bool moderate = reach < 1e4;
  for (int i = 0; i < Lanes<T>::width; ++i) moderate &= largest[i] <= bits;
  return moderate;
}

template <class T, int C, class Step>
FLOWSEG_INLINE void for_each_vector(const Block<T, C>& x, const Classes<typename Lanes<T>::Int>& classes,
                                    const Block<T, C>& own, T max_norm, const Ahead& ahead, Block<T, C>& grad, Step step) {
  using V = typename Lanes<T>::V;
  for (int i = 0; i < kBlock; i += Lanes<T>::width) {
    ahead(i);
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

// The sums over all classes, less the own one's part: without a compare a class, and as exact where the own weight does not dominate.
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

// Own weights up to so many times the others' together are taken off their sum afterwards: with rounding of 4 units of that sum at
// most. Near a centroid and with a small eps they are millions of times as large.
constexpr int kSmallOwn = 4;

template <class T, int C>
void correct_block(const Correction& options, const Codes& codes, const Block<T, C>& x,
                   const Classes<typename Lanes<T>::Int>& classes, const Block<T, C>& own, const Ahead& ahead,
                   Block<T, C>& grad) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  const auto* mu = static_cast<const T(*)[C]>(codes.data);
  const T eps = static_cast<T>(options.eps), max_norm = static_cast<T>(options.max_norm);
  const T inverse_temperature = static_cast<T>(1 / options.temperature);
  const auto kind = static_cast<Transform>(options.transform);
  if (kind == Transform::neg_log && options.temperature == 1 &&
      options.eps >= 1e-12 * std::max(1.0, codes.reach * codes.reach) && is_moderate(x, codes.reach)) {
    // Once it dominates in one vector it may in the next ones; few classes gain nothing.
    bool own_is_small = codes.classes > kRun;
    return for_each_vector(x, classes, own, max_norm, ahead, grad, [&](const V(&p)[C], const I& y, const V(&m)[C], V(&g)[C]) {
      Rivals<C, V> sum;
      if (own_is_small) {
        V weight;
        add_all_but_own<C>(p, m, mu, codes.classes, eps, weight, sum);
        own_is_small = none((I)((y >= 0) & (weight > T(kSmallOwn) * sum.weight)));
      }
      if (!own_is_small) {
        sum = {};
        add_reciprocals<C>(p, y, mu, codes.classes, eps, sum);
      }
      finish_reciprocals<C>(p, m, sum, eps, g);
    });
  }
  const auto by_softmax = [&](auto transform) {
    for_each_vector(x, classes, own, max_norm, ahead, grad, [&](const V(&p)[C], const I& y, const V(&m)[C], V(&g)[C]) {
      constexpr Transform kind = decltype(transform)::value;
      V smallest = V{} + infinity<T>();
      find_smallest_distance<C>(p, mu, codes.classes, smallest);
      Softmax<C, V> state;
      begin_softmax<kind, C>(p, m, smallest, eps, inverse_temperature, state);
      add_softmax<kind, C>(p, y, mu, codes.classes, eps, inverse_temperature, state);
      finish_softmax<C>(p, smallest, state, inverse_temperature, g);
    });
  };
  switch (kind) {
    case Transform::neg_log: return by_softmax(std::integral_constant<Transform, Transform::neg_log>{});
    case Transform::neg_sq: return by_softmax(std::integral_constant<Transform, Transform::neg_sq>{});
    case Transform::neg_dist: return by_softmax(std::integral_constant<Transform, Transform::neg_dist>{});
    case Transform::inverse: return by_softmax(std::integral_constant<Transform, Transform::inverse>{});
  }
}

}  // namespace
}  // namespace flowseg::cpu
