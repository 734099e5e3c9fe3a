// Tensors as plain data: what a kernel of any backend is told about its inputs and results.
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

// A contiguous (B, C, H, W) result.
struct Output {
  void* data;
  Real type;
};

}  // namespace flowseg
