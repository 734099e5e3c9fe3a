// Plain data: what a kernel of any backend is told about its inputs, options and results.
#pragma once

#include <cstdint>

namespace flowseg {

enum class Real : int { f32, f64, f16, bf16 };
enum class Integer : int { u8, i16, i32, i64 };

// A (B, C, H, W) view of any strides, in elements.
struct Image {
  const void* data;
  Real type;
  int64_t batch, channels, height, width;
  int64_t stride[4];
};

// A (B, H, W) map of classes of any strides.
struct LabelMap {
  const void* data;
  Integer type;
  int64_t stride[3];
  int64_t ignore;
};

// Options of the distance-aware correction; `transform` is a Transform.
struct Correction {
  double temperature, eps, max_norm;
  int transform;
};

// The decode grid (flowseg_kernels/decode_grid.py); cells is null when there is none.
struct Grid {
  const int32_t* cells;
  const float* records;
  const int32_t* groups;
  float low, scale;
  int size;
  const int32_t* words;
};

// A contiguous (B, C, H, W) result.
struct Output {
  void* data;
  Real type;
};

}  // namespace flowseg
