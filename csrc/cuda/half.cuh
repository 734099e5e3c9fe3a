// fp16 and bf16 as bits, and their conversions; no header of the CUDA toolkit is needed, so that the host shim needs none either.
#pragma once

#include <cstring>

#include "cuda/platform.cuh"
#ifndef __CUDACC__
#include "shared/half.h"
#endif

namespace flowseg::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <class To, class From>
FLOWSEG_INLINE To same_bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(BFloat v) { return same_bits<float>(static_cast<uint32_t>(v.bits) << 16); }
__device__ __forceinline__ float widen(Half v) {
#ifdef __CUDACC__
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#else
  return float_of_half(v.bits);
#endif
}

// Round to nearest even, as torch does.
__device__ __forceinline__ void narrow(double v, float& out) { out = static_cast<float>(v); }
__device__ __forceinline__ void narrow(double v, double& out) { out = v; }
__device__ __forceinline__ void narrow(float v, float& out) { out = v; }
__device__ __forceinline__ void narrow(float v, double& out) { out = v; }
__device__ __forceinline__ void narrow(float v, Half& out) {
#ifdef __CUDACC__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#else
  out.bits = half_of_float(v);
#endif
}
__device__ __forceinline__ void narrow(float v, BFloat& out) {
#ifdef __CUDACC__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#else
  const uint32_t bits = same_bits<uint32_t>(v);
  out.bits = v != v ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}
__device__ __forceinline__ void narrow(double v, Half& out) { narrow(static_cast<float>(v), out); }
__device__ __forceinline__ void narrow(double v, BFloat& out) { narrow(static_cast<float>(v), out); }

}  // namespace flowseg::cuda
