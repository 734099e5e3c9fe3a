// P pixels of one thread as one value: the vector type V of shared/correction.h on a GPU.
//
// All P pixels use each row of centroids that a thread reads from shared memory, and their independent chains of operations hide
// each other's latency.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/block.cuh"
#include "shared/correction.h"

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
