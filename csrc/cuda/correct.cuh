// The distance-aware correction of the pixels of a block; shared by distance_correction and flow_loss.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/pack.cuh"
#include "cuda/pixels.cuh"

namespace flowseg::cuda {

// Pixels a thread: as many as registers hold.
template <class T, int C>
constexpr int kPixels = (C <= 4 ? 4 : C <= 8 ? 2 : 1) / (sizeof(T) == 8 && C <= 8 ? 2 : 1);

// Blocks that a multiprocessor is to hold: with three channels the registers of four, which hide each other's latency, are enough.
template <class T, int C>
constexpr int kResident = sizeof(T) == 8 ? 1 : C == 3 ? 4 : C == 8 ? 3 : 1;

// Own weights up to so many times the others' together are taken off the sum over all classes: with rounding of 4 units of that sum
// at most. Near a centroid and with a small eps they are millions of times as large.
constexpr int kSmallOwn = 4;

// A block finds this out about the codes once, for all its pixels.
template <class T, int C>
struct Staged {
  Tile<T, C> tile;
  bool whole;         // every centroid is in the tile
  bool own_is_small;  // no pixel of the warp had an own weight that dominates, so far
  T limit;            // the fast formula is for points whose coordinates are within it; negative: for none
};

// Every thread of the block calls it.
template <Transform kind, class T, int C>
__device__ __forceinline__ Staged<T, C> stage_codes(const Correction& options, const Codes& codes, const Tile<T, C>& tile) {
  const bool whole = codes.classes <= Tile<T, C>::kRows;
  Staged<T, C> staged{tile, whole, whole && codes.classes > kRun, T(-1)};
  if (kind == Transform::neg_log && options.temperature == 1) {
    const float reach = reach_of<T>(codes);
    const bool moderate = reach < 1e4f && options.eps >= 1e-12 * (reach > 1 ? static_cast<double>(reach) * reach : 1.0);
    if (moderate) staged.limit = static_cast<T>(8 * reach);
  }
  if (whole) stage<true>(codes, 0, codes.classes, tile);
  return staged;
}

// The sums over all classes: without a compare a class.
template <int C, class T, int P>
__device__ __forceinline__ void add_all_classes(const Pack<T, P> (&x)[C], const Tile<T, C>& tile, int classes, T eps,
                                                Rivals<C, Pack<T, P>>& total) {
  using V = Pack<T, P>;
  constexpr int kGroups = kRun / kGroup;
  const int groups = in_groups(classes) / kGroup;
  for (int first = 0; first < groups; first += kGroups) {
    const int last = first + kGroups < groups ? first + kGroups : groups;
    Rivals<C, V> run;
#pragma unroll 1
    for (int group = first; group < last; ++group) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const auto row = tile[group * kGroup + k];
        V diff[C];
        V d = V{} + eps;
#pragma unroll
        for (int c = 0; c < C; ++c) {
          diff[c] = x[c] - row[c];
          d += diff[c] * diff[c];
        }
        add_reciprocal<C>(reciprocal(d), diff, run);
      }
    }
    total.weight += run.weight;
#pragma unroll
    for (int c = 0; c < C; ++c) total.pull[c] += run.pull[c];
  }
}

// Takes the own class off sums over all classes, by the very operations that put it in; whether no own weight dominates what is left.
template <int C, class T, int P>
__device__ __forceinline__ bool take_own_off(const Pack<T, P> (&x)[C], const Pack<T, P> (&own)[C], const Pack<int, P>& y, T eps,
                                             Rivals<C, Pack<T, P>>& sum) {
  using V = Pack<T, P>;
  V diff[C];
  V d = V{} + eps;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    diff[c] = x[c] - own[c];
    d += diff[c] * diff[c];
  }
  const V weight = reciprocal(d), square = weight * weight;
  sum.weight = sum.weight - weight;
#pragma unroll
  for (int c = 0; c < C; ++c) sum.pull[c] = sum.pull[c] - square * diff[c];
  bool small = true;
  FLOWSEG_EACH(P) small &= y.at[p] < 0 || weight.at[p] <= T(kSmallOwn) * sum.weight.at[p];
  return __all_sync(kAllLanes, small);
}

// Codes of the pixels' own classes; of ignored pixels any.
template <class T, int C, int P>
__device__ __forceinline__ void load_own_codes(const Codes& codes, const Staged<T, C>& staged, const Pack<int, P>& y,
                                               Pack<T, P> (&own)[C]) {
  const T* __restrict__ mu = static_cast<const T*>(codes.data);
  FLOWSEG_EACH(P) {
    const int k = y.at[p] >= 0 ? y.at[p] : 0;
    if (staged.whole) {
      const auto row = staged.tile[k];
#pragma unroll
      for (int c = 0; c < C; ++c) own[c].at[p] = row[c];
    } else {
#pragma unroll
      for (int c = 0; c < C; ++c) own[c].at[p] = c < codes.channels ? mu[static_cast<int64_t>(k) * codes.channels + c] : T(0);
    }
  }
}

// Every thread of the block calls it, equally often. Only when no point of the warp (of the block, where the codes take several parts)
// is far out compared with the codes is the fast formula as exact as the general one, and its squares inside the range of fp32; NaN
// is far out. The results of ignored pixels are to be thrown away by the caller.
template <Transform kind, class T, int C, int P>
__device__ __forceinline__ void correct_pixels(const Correction& options, const Codes& codes, Staged<T, C>& staged,
                                               const Pack<T, P> (&x)[C], const Pack<int, P>& y, Pack<T, P> (&grad)[C]) {
  using V = Pack<T, P>;
  const T eps = static_cast<T>(options.eps), inverse_temperature = static_cast<T>(1 / options.temperature);
  const auto of_part = [&](int first) {
    Pack<int, P> local;
    FLOWSEG_EACH(P) local.at[p] = y.at[p] - first;
    return local;
  };
  bool there = staged.whole, fast = false;
  if (kind == Transform::neg_log && options.temperature == 1) {
    bool moderate = true;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      FLOWSEG_EACH(P) moderate &= y.at[p] < 0 || (x[c].at[p] >= -staged.limit && x[c].at[p] <= staged.limit);
    }
    fast = staged.whole ? __all_sync(kAllLanes, moderate) : __syncthreads_and(moderate);
  }
  if (fast) {
    Rivals<C, V> sum;
    if (staged.own_is_small) {
      add_all_classes<C>(x, staged.tile, codes.classes, eps, sum);
      V own[C];
      load_own_codes(codes, staged, y, own);
      staged.own_is_small = take_own_off<C>(x, own, y, eps, sum);
    }
    // Once it dominates in one place it may in the next ones.
    if (!staged.own_is_small) {
      sum = {};
      for_each_part(codes, staged.tile, there,
                    [&](int first, int count) { add_reciprocals<C>(x, of_part(first), staged.tile, count, eps, sum); });
    }
    V own[C];
    load_own_codes(codes, staged, y, own);
    finish_reciprocals<C>(x, own, sum, eps, grad);
  } else {
    V smallest = V{} + infinity<T>();
    for_each_part(codes, staged.tile, there, [&](int, int count) { find_smallest_distance<C>(x, staged.tile, count, smallest); });
    V own[C];
    load_own_codes(codes, staged, y, own);
    Softmax<C, V> state;
    begin_softmax<kind, C>(x, own, smallest, eps, inverse_temperature, state);
    for_each_part(codes, staged.tile, there, [&](int first, int count) {
      add_softmax<kind, C>(x, of_part(first), staged.tile, count, eps, inverse_temperature, state);
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
