// fp16 for compilers whose C++ has no type for it on this processor, such as GCC 11 and clang 14: its bits, converted as the hardware
// converts them, rounded to nearest even, NaN with the upper bits of its payload. FLOWSEG_HALF_BITS takes this form everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "shared/macros.h"

// clang has the type from version 15 on, but converts by functions that older systems lack.
#if !defined(FLOWSEG_HALF_BITS) && defined(__aarch64__)
#define FLOWSEG_FLOAT16 __fp16  // GCC has _Float16 in C++ on ARM from version 13 on.
#elif !defined(FLOWSEG_HALF_BITS) && defined(__FLT16_MANT_DIG__) && !defined(__clang__)
#define FLOWSEG_FLOAT16 _Float16
#endif

namespace flowseg {
namespace {

// The loops around these become vector code: no branches, no table, and no instruction that only some processors have.
FLOWSEG_INLINE float float_of_half(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16, magnitude = bits + bits;
  // The exponent of a normal number moves by 224 - 112; infinity and NaN overflow into themselves.
  const uint32_t normal_bits = (magnitude >> 4) + (0xe0u << 23);
  float normal, subnormal;
  std::memcpy(&normal, &normal_bits, 4);
  normal *= 0x1p-112f;
  // A subnormal number is a multiple of 2^-24: its bits below those of 0.5.
  const uint32_t subnormal_bits = (magnitude >> 17) | (126u << 23);
  std::memcpy(&subnormal, &subnormal_bits, 4);
  subnormal -= 0.5f;
  uint32_t out, small;
  std::memcpy(&out, &normal, 4);
  std::memcpy(&small, &subnormal, 4);
  out = (magnitude < (1u << 27) ? small : out) | (bits & 0x80000000u);
  float f;
  std::memcpy(&f, &out, 4);
  return f;
}

FLOWSEG_INLINE uint16_t half_of_float(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // From the smallest normal number on: drop 13 bits, half of the last kept one rounds up to even.
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Below it: adding 0.5 leaves the multiple of 2^-24 in the last bits, rounded by the addition.
  float absolute;
  std::memcpy(&absolute, &magnitude, 4);
  absolute += 0.5f;
  uint32_t subnormal;
  std::memcpy(&subnormal, &absolute, 4);
  subnormal -= 126u << 23;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;
  half = magnitude > (255u << 23) ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : half;
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// By way of a float whose last bit says that something was lost, so that the second rounding sees what the first one dropped.
FLOWSEG_INLINE uint16_t half_of_double(double v) {
  const float near = static_cast<float>(v);
  const double back = static_cast<double>(near);
  uint32_t bits;
  std::memcpy(&bits, &near, 4);
  const bool lost = back != v && v == v, away = lost && (back > v) == (v > 0);
  bits = (bits - (away ? 1u : 0u)) | (lost ? 1u : 0u);
  float odd;
  std::memcpy(&odd, &bits, 4);
  return half_of_float(odd);
}

}  // namespace
}  // namespace flowseg
