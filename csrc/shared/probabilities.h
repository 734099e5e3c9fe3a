// Class probabilities of one pixel, or of one vector of pixels: the formulas that every compiled backend shares for
// class_probabilities and top_classes. V and mu are as in shared/correction.h. This header uses the same functions of V, and
// multiply_add.
#pragma once

#include "shared/correction.h"

namespace flowseg {

// The positions in FORMS of flowseg_kernels.
enum class Form : int { probabilities = 0, log_probabilities = 1, logits = 2 };

// The most classes per pixel that top_classes keeps.
constexpr int kMostKept = 16;

// Whether p_k is computed as r_k / sum r with r_k = 1 / (d_k + eps), in one pass over the classes without exponentials. The
// bound on eps keeps the sum of 65536 weights in the range of fp32.
inline bool takes_reciprocals(const Correction& options) {
  return options.transform == static_cast<int>(Transform::neg_log) && options.temperature == 1 && options.eps >= 1e-30;
}

// The squared distance, by the operations of nearest_centroid: the nearest class is then the same. The multiply-adds are explicit,
// because a compiler may fuse the product of either side of a sum.
template <int C, class V, class Row>
FLOWSEG_INLINE V squared_distance(const V (&x)[C], const Row& row) {
  V d{};
  for (int c = 0; c < C; ++c) {
    const V diff = x[c] - row[c];
    d = c ? multiply_add(diff, diff, d) : diff * diff;
  }
  return d;
}

template <Transform transform, class V, class T>
FLOWSEG_INLINE V logit_of(const V& d, T eps, T inverse_temperature) {
  V logit, slope;
  transform_distance<transform>(d, eps, inverse_temperature, logit, slope);
  return logit;
}

// Adds 1 / (d + eps) of the classes [0, classes) to total, kRun classes per partial sum.
template <int C, class V, class M, class N, class T>
FLOWSEG_INLINE void add_weights(const V (&x)[C], const M& mu, N classes, T eps, V& total) {
  for (N first = 0; first < classes; first += kRun) {
    const N last = first + static_cast<N>(kRun) < classes ? first + static_cast<N>(kRun) : classes;
    V run{};
    FLOWSEG_UNROLL_CLASSES
    for (N k = first; k < last; ++k) run += reciprocal(squared_distance<C>(x, mu[k]) + eps);
    total += run;
  }
}

// Adds exp(logit - largest) of the classes [0, classes) to total, kRun classes per partial sum.
template <Transform transform, int C, class V, class M, class N, class T>
FLOWSEG_INLINE void add_exponentials(const V (&x)[C], const M& mu, N classes, T eps, T inverse_temperature, const V& largest,
                                     V& total) {
  for (N first = 0; first < classes; first += kRun) {
    const N last = first + static_cast<N>(kRun) < classes ? first + static_cast<N>(kRun) : classes;
    V run{};
    FLOWSEG_ONE_CLASS_AT_A_TIME
    for (N k = first; k < last; ++k) {
      run += exponential(logit_of<transform>(squared_distance<C>(x, mu[k]), eps, inverse_temperature) - largest);
    }
    total += run;
  }
}

}  // namespace flowseg
