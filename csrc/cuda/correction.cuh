// The distance-aware correction of the pixels of a block, for distance_correction and flow_loss.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/pixels.cuh"
#include "shared/correction.h"

// P pixels of one thread as one value: the vector type V of shared/correction.h on a GPU.
//
// All P pixels use each row of centroids that a thread reads from shared memory, and their independent chains of operations hide
// each other's latency.
namespace flowseg {

template <class T, int P>
struct Pack {
  T at[P];
};

#define FLOWSEG_EACH(P) _Pragma("unroll") for (int p = 0; p < P; ++p)

#define FLOWSEG_PACK_OPERATOR(op)                                                             \
  template <class T, int P>                                                                   \
  FLOWSEG_INLINE Pack<T, P> operator op(const Pack<T, P>& a, const Pack<T, P>& b) {           \
    Pack<T, P> r;                                                                             \
    FLOWSEG_EACH(P) r.at[p] = a.at[p] op b.at[p];                                             \
    return r;                                                                                 \
  }                                                                                           \
  template <class T, int P>                                                                   \
  FLOWSEG_INLINE Pack<T, P> operator op(const Pack<T, P>& a, std::type_identity_t<T> b) {     \
    Pack<T, P> r;                                                                             \
    FLOWSEG_EACH(P) r.at[p] = a.at[p] op b;                                                   \
    return r;                                                                                 \
  }                                                                                           \
  template <class T, int P>                                                                   \
  FLOWSEG_INLINE Pack<T, P> operator op(std::type_identity_t<T> a, const Pack<T, P>& b) {     \
    Pack<T, P> r;                                                                             \
    FLOWSEG_EACH(P) r.at[p] = a op b.at[p];                                                   \
    return r;                                                                                 \
  }                                                                                           \
  template <class T, int P, class B>                                                          \
  FLOWSEG_INLINE Pack<T, P>& operator op##=(Pack<T, P>& a, const B& b) {                      \
    return a = a op b;                                                                        \
  }
FLOWSEG_PACK_OPERATOR(+)
FLOWSEG_PACK_OPERATOR(-)
FLOWSEG_PACK_OPERATOR(*)
FLOWSEG_PACK_OPERATOR(/)
#undef FLOWSEG_PACK_OPERATOR

template <class T, int P>
FLOWSEG_INLINE Pack<T, P> operator-(const Pack<T, P>& a) {
  return T(0) - a;
}

template <class T, int P>
FLOWSEG_INLINE Pack<T, P> multiply_add(const Pack<T, P>& a, const Pack<T, P>& b, const Pack<T, P>& c) {
  Pack<T, P> r;
  FLOWSEG_EACH(P) r.at[p] = cuda::multiply_add(a.at[p], b.at[p], c.at[p]);
  return r;
}

template <class T, int P>
FLOWSEG_INLINE Pack<bool, P> operator<(const Pack<T, P>& a, const Pack<T, P>& b) {
  Pack<bool, P> r;
  FLOWSEG_EACH(P) r.at[p] = a.at[p] < b.at[p];
  return r;
}
template <class T, int P>
FLOWSEG_INLINE Pack<bool, P> operator>(const Pack<T, P>& a, std::type_identity_t<T> b) {
  Pack<bool, P> r;
  FLOWSEG_EACH(P) r.at[p] = a.at[p] > b;
  return r;
}
template <class T, int P>
FLOWSEG_INLINE Pack<T, P> choose(const Pack<bool, P>& mask, const Pack<T, P>& a, const Pack<T, P>& b) {
  Pack<T, P> r;
  FLOWSEG_EACH(P) r.at[p] = mask.at[p] ? a.at[p] : b.at[p];
  return r;
}

// One instruction. The result is at most 1 ulp off if the number and its reciprocal are normal, which the callers ensure. A
// division would add a range check of several instructions.
FLOWSEG_INLINE float reciprocal(float v) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#elif defined(__CUDACC__)
  return 1.0f / v;
#else
  return inexact_reciprocal(v);
#endif
}
FLOWSEG_INLINE double reciprocal(double v) { return 1.0 / v; }

#define FLOWSEG_PACK_FUNCTION(name, expression)                 \
  template <class T, int P>                                     \
  FLOWSEG_INLINE Pack<T, P> name(const Pack<T, P>& v) {         \
    Pack<T, P> r;                                               \
    FLOWSEG_EACH(P) r.at[p] = expression(v.at[p]);              \
    return r;                                                   \
  }
FLOWSEG_PACK_FUNCTION(reciprocal, reciprocal)
FLOWSEG_PACK_FUNCTION(logarithm, std::log)
FLOWSEG_PACK_FUNCTION(exponential, std::exp)
FLOWSEG_PACK_FUNCTION(square_root, std::sqrt)
#undef FLOWSEG_PACK_FUNCTION

template <class T, int P>
FLOWSEG_INLINE Pack<T, P> zero_where_equal(const Pack<T, P>& v, const Pack<int, P>& y, int k) {
  Pack<T, P> r;
  FLOWSEG_EACH(P) r.at[p] = y.at[p] == k ? T(0) : v.at[p];
  return r;
}

// Predicated additions: one instruction per class less than zeroing the reciprocal.
template <int C, class T, int P>
FLOWSEG_INLINE void add_rival(const Pack<T, P>& r, const Pack<T, P> (&diff)[C], const Pack<int, P>& y, int k,
                              Rivals<C, Pack<T, P>>& sum) {
  const Pack<T, P> weight = r * r;
  FLOWSEG_EACH(P) {
    if (y.at[p] != k) {
      sum.weight.at[p] += r.at[p];
#pragma unroll
      for (int c = 0; c < C; ++c) sum.pull[c].at[p] += weight.at[p] * diff[c].at[p];
    }
  }
}

// Whether any pixel of the warp has its own class in [first, last). Most runs of classes contain no own class and then need no
// predicates.
template <int P>
FLOWSEG_INLINE bool may_hold(const Pack<int, P>& y, int first, int last) {
#if defined(__CUDA_ARCH__) || !defined(__CUDACC__)
  bool any = false;
  FLOWSEG_EACH(P) any |= y.at[p] >= first && y.at[p] < last;
  return __any_sync(0xffffffffu, any);
#else
  return true;
#endif
}

}  // namespace flowseg

namespace flowseg::cuda {

// Pixels per thread: as many as fit into registers.
template <class T, int C>
constexpr int kCorrectionPixels = (C <= 4 ? 4 : C <= 8 ? 2 : 1) / (sizeof(T) == 8 && C <= 8 ? 2 : 1);

// Blocks per multiprocessor for __launch_bounds__. With three channels four blocks hide each other's latency and still get enough
// registers.
template <class T, int C>
constexpr int kMinBlocks = sizeof(T) == 8 ? 1 : C == 3 ? 4 : C == 8 ? 3 : 1;

// If a pixel's own weight is at most kMaxOwnToRivals times the sum of the rivals, the kernel sums over all classes and subtracts
// the own weight. The error is then at most 4 ulp of the sum. Near a centroid with a small eps the own weight can be a million
// times the rest, and the subtraction would cancel.
constexpr int kMaxOwnToRivals = 4;

// State that a block computes once from the codes, for all its pixels.
template <class T, int C>
struct StagedCodes {
  CodeTile<T, C> tile;
  bool whole;             // the tile holds every centroid
  bool may_subtract_own;  // so far, no pixel of the warp had a dominating own weight
  T limit;                // the fast formula needs |coordinate| <= limit; negative: it is never used
};

// Every thread of the block calls it.
template <Transform kTransform, class T, int C>
__device__ __forceinline__ StagedCodes<T, C> stage_codes(const Correction& options, const InputCodes& codes,
                                                         const CodeTile<T, C>& tile) {
  const bool whole = codes.classes <= CodeTile<T, C>::kRows;
  StagedCodes<T, C> staged{.tile = tile, .whole = whole, .may_subtract_own = whole && codes.classes > kRun, .limit = T(-1)};
  if (kTransform == Transform::neg_log && options.temperature == 1) {
    const float reach = largest_coordinate<T>(codes);
    // cpu/pixel/correction.h explains these bounds.
    const bool moderate = reach < 1e4f && options.eps >= 1e-12 * (reach > 1 ? static_cast<double>(reach) * reach : 1.0);
    if (moderate) staged.limit = static_cast<T>(8 * reach);
  }
  if (whole) stage<true>(codes, 0, codes.classes, tile);
  return staged;
}

// Adds the terms of all classes, without comparing each class with the pixel's own.
template <int C, class T, int P>
__device__ __forceinline__ void add_all_classes(const Pack<T, P> (&x)[C], const CodeTile<T, C>& tile, int classes, T eps,
                                                Rivals<C, Pack<T, P>>& total) {
  using V = Pack<T, P>;
  constexpr int kGroups = kRun / kGroup;
  const int groups = round_up_to_group(classes) / kGroup;
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

// Subtracts the term of the pixel's own class from sums over all classes, computed by the same operations that added it. Returns
// whether no pixel of the warp has an own weight that dominates the rest.
template <int C, class T, int P>
__device__ __forceinline__ bool subtract_own(const Pack<T, P> (&x)[C], const Pack<T, P> (&own)[C], const Pack<int, P>& y, T eps,
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
  FLOWSEG_EACH(P) small &= y.at[p] < 0 || weight.at[p] <= T(kMaxOwnToRivals) * sum.weight.at[p];
  return __all_sync(kAllLanes, small);
}

// Loads the code of each pixel's class. Ignored pixels get an arbitrary code.
template <class T, int C, int P>
__device__ __forceinline__ void load_own_codes(const InputCodes& codes, const StagedCodes<T, C>& staged, const Pack<int, P>& y,
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

// Computes the gradients of a run of pixels. Every thread of the block must call this function the same number of times. The caller
// discards the gradients of ignored pixels.
//
// The fast formula needs points near the codes: far away its sums lose digits and its squares leave the range of fp32. A NaN counts
// as far. The warp decides together; if the codes take several parts, the block does.
template <Transform kTransform, class T, int C, int P>
__device__ __forceinline__ void correct_pixels(const Correction& options, const InputCodes& codes, StagedCodes<T, C>& staged,
                                               const Pack<T, P> (&x)[C], const Pack<int, P>& y, Pack<T, P> (&grad)[C]) {
  using V = Pack<T, P>;
  const T eps = static_cast<T>(options.eps), inverse_temperature = static_cast<T>(1 / options.temperature);
  const auto class_in_part = [&](int first) {
    Pack<int, P> local;
    FLOWSEG_EACH(P) local.at[p] = y.at[p] - first;
    return local;
  };
  bool is_staged = staged.whole, fast = false;
  if (kTransform == Transform::neg_log && options.temperature == 1) {
    bool moderate = true;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      FLOWSEG_EACH(P) moderate &= y.at[p] < 0 || (x[c].at[p] >= -staged.limit && x[c].at[p] <= staged.limit);
    }
    fast = staged.whole ? __all_sync(kAllLanes, moderate) : __syncthreads_and(moderate);
  }
  if (fast) {
    Rivals<C, V> sum;
    if (staged.may_subtract_own) {
      add_all_classes<C>(x, staged.tile, codes.classes, eps, sum);
      V own[C];
      load_own_codes(codes, staged, y, own);
      staged.may_subtract_own = subtract_own<C>(x, own, y, eps, sum);
    }
    // Once an own weight dominates, the pixels that follow probably have dominating ones too.
    if (!staged.may_subtract_own) {
      sum = {};
      for_each_part(codes, staged.tile, is_staged,
                    [&](int first, int count) { add_reciprocals<C>(x, class_in_part(first), staged.tile, count, eps, sum); });
    }
    V own[C];
    load_own_codes(codes, staged, y, own);
    finish_reciprocals<C>(x, own, sum, eps, grad);
  } else {
    V smallest = V{} + infinity<T>();
    for_each_part(codes, staged.tile, is_staged,
                  [&](int, int count) { find_smallest_distance<C>(x, staged.tile, count, smallest); });
    V own[C];
    load_own_codes(codes, staged, y, own);
    Softmax<C, V> state;
    begin_softmax<kTransform, C>(x, own, smallest, eps, inverse_temperature, state);
    for_each_part(codes, staged.tile, is_staged, [&](int first, int count) {
      add_softmax<kTransform, C>(x, class_in_part(first), staged.tile, count, eps, inverse_temperature, state);
    });
    finish_softmax<C>(x, smallest, state, inverse_temperature, grad);
  }
  if (options.max_norm < infinity<double>()) cap_norm<C>(grad, static_cast<T>(options.max_norm));
}

// Calls body.template operator()<transform>().
template <class Body>
void for_transform(int transform, Body body) {
  switch (static_cast<Transform>(transform)) {
    case Transform::neg_log: return body.template operator()<Transform::neg_log>();
#ifndef FLOWSEG_ONLY_FP32_C3
    case Transform::neg_sq: return body.template operator()<Transform::neg_sq>();
    case Transform::neg_dist: return body.template operator()<Transform::neg_dist>();
    case Transform::inverse: return body.template operator()<Transform::inverse>();
#else
    default: return;
#endif
  }
}

}  // namespace flowseg::cuda
