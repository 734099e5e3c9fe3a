// The distance-aware correction of the pixels of a block; shared by distance_correction and flow_loss.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/pack.cuh"

namespace flowseg::cuda {

// Pixels a thread: as many as registers hold.
template <class T, int C>
constexpr int kPixels = (C <= 4 ? 4 : C <= 8 ? 2 : 1) / (sizeof(T) == 8 && C <= 8 ? 2 : 1);

// Every thread of the block calls it. Only when no point of the block is far out compared with the codes is the fast formula as
// exact as the general one, and its squares inside the range of fp32; NaN is far out. The results of ignored pixels are to be
// thrown away by the caller.
template <Transform kind, class T, int C, int P>
__device__ __forceinline__ void correct_pixels(const Correction& options, const Codes& codes, const Tile<T, C>& tile,
                                               const Pack<T, P> (&x)[C], const Pack<int, P>& y, Pack<T, P> (&grad)[C]) {
  using V = Pack<T, P>;
  const T eps = static_cast<T>(options.eps), inverse_temperature = static_cast<T>(1 / options.temperature);
  const auto of_part = [&](int first) {
    Pack<int, P> local;
    FLOWSEG_EACH(P) local.at[p] = y.at[p] - first;
    return local;
  };
  V own[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (c < codes.channels) {
      load_code(codes, y.at, c, own[c].at);
    } else {
      own[c] = V{};
    }
  }
  bool staged = false, fast = false;
  if (kind == Transform::neg_log && options.temperature == 1) {
    const float reach = reach_of<T>(codes);
    const T limit = static_cast<T>(8 * reach);
    bool moderate = reach < 1e4f && options.eps >= 1e-12 * (reach > 1 ? static_cast<double>(reach) * reach : 1.0);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      FLOWSEG_EACH(P) moderate &= y.at[p] < 0 || (x[c].at[p] >= -limit && x[c].at[p] <= limit);
    }
    fast = __syncthreads_and(moderate);
  }
  if (fast) {
    Rivals<C, V> sum;
    for_each_part(codes, tile, staged,
                  [&](int first, int count) { add_reciprocals<C>(x, of_part(first), tile, count, eps, sum); });
    finish_reciprocals<C>(x, own, sum, eps, grad);
  } else {
    V smallest = V{} + infinity<T>();
    for_each_part(codes, tile, staged, [&](int, int count) { find_smallest_distance<C>(x, tile, count, smallest); });
    Softmax<C, V> state;
    begin_softmax<kind, C>(x, own, smallest, eps, inverse_temperature, state);
    for_each_part(codes, tile, staged, [&](int first, int count) {
      add_softmax<kind, C>(x, of_part(first), tile, count, eps, inverse_temperature, state);
    });
    finish_softmax<C>(x, smallest, state, inverse_temperature, grad);
  }
  if (options.max_norm < infinity<double>()) cap_norm<C>(grad, static_cast<T>(options.max_norm));
}

// Calls body.template operator()<kind>() for the transform.
template <class Body>
void for_transform(int transform, Body body) {
  switch (static_cast<Transform>(transform)) {
    case Transform::neg_log: return body.template operator()<Transform::neg_log>();
#ifndef FLOWSEG_ONLY_3
    case Transform::neg_sq: return body.template operator()<Transform::neg_sq>();
    case Transform::neg_dist: return body.template operator()<Transform::neg_dist>();
    case Transform::inverse: return body.template operator()<Transform::inverse>();
#else
    default: return;
#endif
  }
}

}  // namespace flowseg::cuda
