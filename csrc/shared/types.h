// Macros and types that the kernels of every compiled backend share, without torch: 16-bit floats, and the inputs, options and
// results of an op.
#pragma once

#include <cstdint>
#include <cstring>

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

#if !defined(FLOWSEG_HALF_BITS) && !defined(__CUDACC__)
#if defined(__aarch64__)
#define FLOWSEG_FLOAT16 __fp16  // GCC has _Float16 in C++ on ARM only from version 13 on
#elif defined(__FLT16_MANT_DIG__) && !defined(__clang__)
// clang has _Float16 from version 15 on, but converts it with library functions that older systems lack.
#define FLOWSEG_FLOAT16 _Float16
#endif
#endif

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
  const int32_t* cells;         // (G, G, G); null without a grid
  const float* records;         // (R, 4, 8)
  const int32_t* records_left;  // (R,): from record r to the end of its list, r included
  float low, scale;
  int size;              // G
  const int32_t* words;  // (G, G, G), the second table of cells
};

// The guesses (flowseg_kernels/decode_guesses.py).
struct Guesses {
  const float* projection;  // (A, C + 1); null without guesses
  const int32_t* starts;    // (G^A + 1,)
  const int32_t* members;   // (E,)
  const int32_t* rivals;    // (K, M)
  const float* certain;     // (K, M + 1)
  int axes, log2_cells;     // A, log2 G
  int rival_count;          // M
};

// The tables that make decoding fast. At most one of them is there.
struct Tables {
  Grid grid;
  Guesses guesses;
};

// fp16 and bf16 as the kernels of every backend store them, and their conversions from and to float and double. Conversions from
// float round to the nearest value, ties to even. double to bf16, and on a GPU double to fp16, round twice.
//
// fp16 has three implementations:
//   - on a GPU, PTX instructions;
//   - on a CPU, the compiler's own type where it has one (FLOWSEG_FLOAT16);
//   - else integer arithmetic on its bits, for compilers such as GCC 11 and clang 14. FLOWSEG_HALF_BITS forces this one.
template <class To, class From>
FLOWSEG_INLINE To same_bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}

// The three functions below have no branches, no tables and no instructions that only some CPUs have: loops over them vectorise.
// A NaN keeps the upper bits of its payload, as in the hardware's conversions.
FLOWSEG_INLINE float float_of_half(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16, magnitude = bits + bits;
  // A normal number: the exponent moves by 224 - 112. Infinity and NaN overflow to themselves.
  const float normal = same_bits<float>((magnitude >> 4) + (0xe0u << 23)) * 0x1p-112f;
  // A subnormal number is a multiple of 2^-24: it goes into the last bits of 0.5, which is then subtracted.
  const float subnormal = same_bits<float>((magnitude >> 17) | (126u << 23)) - 0.5f;
  const uint32_t chosen = magnitude < (1u << 27) ? same_bits<uint32_t>(subnormal) : same_bits<uint32_t>(normal);
  return same_bits<float>(chosen | (bits & 0x80000000u));
}

FLOWSEG_INLINE uint16_t half_of_float(float f) {
  const uint32_t bits = same_bits<uint32_t>(f), magnitude = bits & 0x7fffffffu;
  // A normal result: drop 13 bits; a tie rounds to the even result.
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // A subnormal result: adding 0.5 rounds to a multiple of 2^-24 and leaves it in the last bits.
  const uint32_t subnormal = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - (126u << 23);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;
  half = magnitude > (255u << 23) ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : half;
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// Rounds to odd on the way through float: an inexact float gets an odd last bit, so rounding it again gives the correct result.
FLOWSEG_INLINE uint16_t half_of_double(double v) {
  const float near = static_cast<float>(v);
  const double back = static_cast<double>(near);
  const bool inexact = back != v && v == v, away = inexact && (back > v) == (v > 0);
  return half_of_float(same_bits<float>((same_bits<uint32_t>(near) - (away ? 1u : 0u)) | (inexact ? 1u : 0u)));
}

struct Half {
#ifdef FLOWSEG_FLOAT16
  FLOWSEG_FLOAT16 value;
#else
  uint16_t bits;
#endif
};
struct BFloat {
  uint16_t bits;
};

FLOWSEG_INLINE float widen(float v) { return v; }
FLOWSEG_INLINE double widen(double v) { return v; }
FLOWSEG_INLINE float widen(BFloat v) { return same_bits<float>(static_cast<uint32_t>(v.bits) << 16); }
FLOWSEG_INLINE float widen(Half v) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#elif defined(FLOWSEG_FLOAT16)
  return static_cast<float>(v.value);
#else
  return float_of_half(v.bits);
#endif
}

FLOWSEG_INLINE void narrow(float v, float& out) { out = v; }
FLOWSEG_INLINE void narrow(double v, double& out) { out = v; }
FLOWSEG_INLINE void narrow(double v, float& out) { out = static_cast<float>(v); }
FLOWSEG_INLINE void narrow(float v, double& out) { out = v; }

FLOWSEG_INLINE void narrow(float v, Half& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#elif defined(FLOWSEG_FLOAT16)
  out.value = static_cast<FLOWSEG_FLOAT16>(v);
#else
  out.bits = half_of_float(v);
#endif
}
// A GPU rounds a double twice, through float. FLOWSEG_GPU_ROUNDING does so on a CPU too, for tests of the GPU's kernels.
FLOWSEG_INLINE void narrow(double v, Half& out) {
#if defined(__CUDACC__) || defined(FLOWSEG_GPU_ROUNDING)
  narrow(static_cast<float>(v), out);
#elif defined(FLOWSEG_FLOAT16)
  out.value = static_cast<FLOWSEG_FLOAT16>(v);
#else
  out.bits = half_of_double(v);
#endif
}

FLOWSEG_INLINE void narrow(float v, BFloat& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
#else
  const uint32_t bits = same_bits<uint32_t>(v), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(v != v ? 0x7fc0 : rounded);
#endif
}
FLOWSEG_INLINE void narrow(double v, BFloat& out) { narrow(static_cast<float>(v), out); }

}  // namespace flowseg
