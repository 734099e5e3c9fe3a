// Functions that class_probabilities and top_classes share: the choice of the transform, and loads of points.
#pragma once

#include <type_traits>

#include "cpu/pixel/correction.h"
#include "shared/probabilities.h"

namespace flowseg::cpu {
namespace {

// Calls body.template operator()<transform>().
template <class Body>
FLOWSEG_INLINE void for_transform(int transform, Body body) {
  switch (static_cast<Transform>(transform)) {
    case Transform::neg_log: return body.template operator()<Transform::neg_log>();
    case Transform::neg_sq: return body.template operator()<Transform::neg_sq>();
    case Transform::neg_dist: return body.template operator()<Transform::neg_dist>();
    case Transform::inverse: return body.template operator()<Transform::inverse>();
  }
}

template <class T, int C>
FLOWSEG_INLINE void point_at(const Block<T, C>& x, int i, typename Lanes<T>::V (&point)[C]) {
  for (int c = 0; c < C; ++c) point[c] = lanes(&x.at[c][i]);
}

}  // namespace
}  // namespace flowseg::cpu
