// Macros and plain types that the kernels of every compiled backend share: inputs, options and results of an op, without torch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FLOWSEG_INLINE __host__ __device__ __forceinline__
// Unrolls a loop over classes by 4 for at most 4 channels, else by 16 / C: many channels fill the body by themselves.
#define FLOWSEG_UNROLL_CLASSES _Pragma("unroll (C <= 4 ? 4 : 16 / C)")
#define FLOWSEG_ONE_CLASS_AT_A_TIME _Pragma("unroll 1")  // for loops that are short of registers
#else
// A CPU kernel is already unrolled over vectors of pixels.
#ifndef FLOWSEG_INLINE
#define FLOWSEG_INLINE inline __attribute__((always_inline))
#endif
#define FLOWSEG_UNROLL_CLASSES
#define FLOWSEG_ONE_CLASS_AT_A_TIME
#endif
#define FLOWSEG_RESTRICT __restrict__

namespace flowseg {

enum class Real : int { f32, f64, f16, bf16 };
enum class Integer : int { u8, i16, i32, i64 };

// The positions in REDUCTIONS of flowseg_kernels.
struct Reduction {
  enum : int64_t { mean = 0, sum = 1, none = 2 };
};

// Bytes per element.
FLOWSEG_INLINE int64_t size_of(Real type) { return type == Real::f64 ? 8 : type == Real::f32 ? 4 : 2; }
FLOWSEG_INLINE int64_t size_of(Integer type) { return int64_t{1} << static_cast<int>(type); }

// A (B, C, H, W) view with any strides. All strides are in elements.
struct Image {
  const void* data;
  Real type;
  int64_t batch, channels, height, width;
  int64_t stride[4];
};

// A (B, H, W) map of classes with any strides.
struct LabelMap {
  const void* data;
  Integer type;
  int64_t stride[3];
  int64_t ignore;
};

// A contiguous (B, C, H, W) result.
struct Output {
  void* data;
  Real type;
};

// Options of the distance-aware correction.
struct Correction {
  double temperature, eps, max_norm;
  int transform;  // a Transform
};

// The decode grid (flowseg_kernels/decode_grid.py).
struct Grid {
  const int32_t* cells;  // (G, G, G); null without a grid
  const float* records;  // (R, 4, 8)
  const int32_t* groups; // (R,)
  float low, scale;
  int size;              // G
  const int32_t* words;  // (G, G, G), the second table of cells
};

}  // namespace flowseg
