// Vectors of one instruction set, and mathematical functions of them.
//
// Included only by files that are compiled once per instruction set. Everything is in an unnamed namespace: otherwise the linker
// could keep the AVX-512 copy of a function for every instruction set. shared/correction.h calls functions of this header, so this
// header comes first and uses the same namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "cpu/params.h"

#if defined(__AVX512F__)
#define FLOWSEG_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FLOWSEG_VECTOR_BYTES 32
#else
#define FLOWSEG_VECTOR_BYTES 16
#endif

namespace flowseg {
namespace {

#if defined(__AVX512BF16__)
constexpr cpu::Isa kIsa = cpu::Isa::avx512bf16;
#elif defined(__AVX512F__)
constexpr cpu::Isa kIsa = cpu::Isa::avx512;
#elif defined(__AVX2__)
constexpr cpu::Isa kIsa = cpu::Isa::avx2;
#else
constexpr cpu::Isa kIsa = cpu::Isa::baseline;
#endif

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(FLOWSEG_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(FLOWSEG_VECTOR_BYTES)));
  using Int = int32_t;
  static constexpr int width = FLOWSEG_VECTOR_BYTES / 4;
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(FLOWSEG_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(FLOWSEG_VECTOR_BYTES)));
  using Int = int64_t;
  static constexpr int width = FLOWSEG_VECTOR_BYTES / 8;
};
using F = Lanes<float>::V;
using D = Lanes<double>::V;
using FI = Lanes<float>::I;
using DI = Lanes<double>::I;

template <class T>
FLOWSEG_INLINE T infinity() {
  return static_cast<T>(__builtin_inff());
}

FLOWSEG_INLINE F choose(FI mask, F a, F b) { return mask ? a : b; }
FLOWSEG_INLINE D choose(DI mask, D a, D b) { return mask ? a : b; }
FLOWSEG_INLINE FI choose(FI mask, FI a, FI b) { return mask ? a : b; }
FLOWSEG_INLINE DI choose(DI mask, DI a, DI b) { return mask ? a : b; }

FLOWSEG_INLINE F zero_where_equal(F v, FI y, int64_t k) { return y == static_cast<int32_t>(k) ? F{} : v; }
FLOWSEG_INLINE D zero_where_equal(D v, DI y, int64_t k) { return y == k ? D{} : v; }

// Whether a class of the vector may be in [first, last); true if in doubt. In label maps it rarely is: neighbouring pixels mostly
// have the same class.
FLOWSEG_INLINE bool may_hold(FI y, int64_t first, int64_t last) {
#if defined(__AVX512F__)
  const __m512i from_first = _mm512_sub_epi32((__m512i)y, _mm512_set1_epi32(static_cast<int>(first)));
  return _mm512_cmplt_epu32_mask(from_first, _mm512_set1_epi32(static_cast<int>(last - first)));
#elif defined(__AVX2__)
  const FI outside = (y < static_cast<int>(first)) | (y >= static_cast<int>(last));
  return _mm256_movemask_ps((__m256)outside) != 255;
#else
  const FI inside = (y >= static_cast<int>(first)) & (y < static_cast<int>(last));
  return inside[0] | inside[1] | inside[2] | inside[3];
#endif
}
FLOWSEG_INLINE bool may_hold(DI, int64_t, int64_t) { return true; }

FLOWSEG_INLINE bool none(FI mask) {
#if defined(__AVX512F__)
  return !_mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  return !(mask[0] | mask[1] | mask[2] | mask[3]);
#endif
}
FLOWSEG_INLINE bool none(DI mask) {
  int64_t any = 0;
  for (int i = 0; i < Lanes<double>::width; ++i) any |= mask[i];
  return !any;
}

// One bit per lane of a mask.
FLOWSEG_INLINE unsigned bits_of(FI mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)mask));
#else
  return (mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8);
#endif
}

// a b + c, rounded once where the instruction set can. The compiler may fuse the product of either side of a sum, so searches whose
// results must agree bit for bit call this function.
FLOWSEG_INLINE F multiply_add(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
FLOWSEG_INLINE D multiply_add(D a, D b, D c) {
#if defined(__AVX512F__)
  return (D)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (D)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__ARM_NEON)
  return (D)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// A true division: the divider runs in parallel with the multipliers. An estimate with a Newton step would take two operations of
// the multipliers, which are the bottleneck.
FLOWSEG_INLINE F reciprocal(F v) { return 1.0f / v; }
FLOWSEG_INLINE D reciprocal(D v) { return 1.0 / v; }

FLOWSEG_INLINE F square_root(F v) {
#if defined(__AVX512F__)
  return (F)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (F)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < Lanes<float>::width; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
FLOWSEG_INLINE D square_root(D v) {
  for (int i = 0; i < Lanes<double>::width; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}

// exp(v) for v <= 0: v = n ln 2 + r with ln 2 split in two parts, then the Taylor polynomial of degree 7 on |r| <= ln 2 / 2
// (truncation error below 2e-9). Returns 0 below -87.
FLOWSEG_INLINE F exponential(F v) {
  const F kept = choose(v < -87.0f, F{} - 87.0f, v);
  const FI n = __builtin_convertvector(kept * 1.44269504f - 0.5f, FI);
  const F nf = __builtin_convertvector(n, F);
  const F r = (kept - nf * 0.693359375f) + nf * 2.12194440e-4f;
  F p = F{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const F power = (F)((n + 127) << 23);
  return choose(v < -87.0f, F{}, p * power);
}
FLOWSEG_INLINE D exponential(D v) {
  for (int i = 0; i < Lanes<double>::width; ++i) v[i] = std::exp(v[i]);
  return v;
}

// log(v) for positive normal v = m 2^e with m in [sqrt(1/2), sqrt(2)): log m = 2 atanh(s), s = (m - 1) / (m + 1), by its odd series
// up to s^9 (relative truncation error below 4e-9).
FLOWSEG_INLINE F logarithm(F v) {
  const FI bits = (FI)v;
  FI exponent = (bits - 0x3f3504f3) >> 23;
  const F m = (F)(bits - (exponent << 23));
  const F s = (m - 1.0f) / (m + 1.0f);
  const F q = s * s;
  F p = F{} + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  const F e = __builtin_convertvector(exponent, F);
  // The terms are added from small to large; ln 2 is split in two parts so that e ln 2 stays exact.
  return e * 0.693359375f + (2.0f * s + (p * q * s - e * 2.12194440e-4f));
}
FLOWSEG_INLINE D logarithm(D v) {
  for (int i = 0; i < Lanes<double>::width; ++i) v[i] = std::log(v[i]);
  return v;
}

}  // namespace
}  // namespace flowseg
