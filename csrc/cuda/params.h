// Parameters of the kernels: plain data without torch, passed by value. The last section picks the compiled template for a call.
#pragma once

#include "shared/types.h"

namespace flowseg::cuda {

// Properties of the GPU that decide how many blocks a launch uses.
struct Device {
  int64_t multiprocessors;
  int64_t threads;                              // per multiprocessor, at 64 registers per thread
  int64_t shared_block, shared_multiprocessor;  // bytes of shared memory per block and per multiprocessor
};

// How a thread may read neighbouring pixels of one plane.
struct Layout {
  bool flat;    // the pixels of the plane are contiguous
  bool vector;  // flat, and every run of pixels starts at a multiple of 16 bytes
};

// (B, C, H, W), any strides.
struct InputImage : Image {
  Layout layout;
};

// (B, C, H, W) contiguous, or (B, H, W) with channels = 1.
struct OutputImage : Output {
  int64_t channels, pixels;  // C, H * W
  bool vector;               // every run of pixels starts at a multiple of 16 bytes
};

// (B, H, W), any strides. Labels outside [0, K) count as ignored.
struct InputLabels : LabelMap {
  int64_t width;
  Layout layout;
};

// (B,), any stride.
struct InputTimes {
  const void* data;
  Real type;
  int64_t stride;
};

// (K, C) contiguous, in the compute dtype.
struct InputCodes {
  const void* data;
  int classes, channels;  // K, C
};

inline bool starts_at_16_bytes(const void* data, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0;
}

// Whether a plane is contiguous. The stride of an axis of size 1 does not matter.
inline bool is_flat(int64_t height, int64_t width, int64_t stride_row, int64_t stride_column) {
  return (width == 1 || stride_column == 1) && (height == 1 || stride_row == width);
}

inline InputImage input_image(const Image& image) {
  const int64_t size = size_of(image.type);
  const bool flat = is_flat(image.height, image.width, image.stride[2], image.stride[3]);
  const bool aligned = starts_at_16_bytes(image.data, image.channels > 1 ? image.stride[1] : 0, size) &&
                       starts_at_16_bytes(image.data, image.batch > 1 ? image.stride[0] : 0, size);
  return {image, {.flat = flat, .vector = flat && aligned}};
}

inline OutputImage output_image(const Output& out, int64_t channels, int64_t pixels) {
  return {out, channels, pixels, starts_at_16_bytes(out.data, pixels, size_of(out.type))};
}

inline InputLabels input_labels(const LabelMap& map, int64_t batch, int64_t height, int64_t width) {
  const bool flat = is_flat(height, width, map.stride[1], map.stride[2]);
  const bool aligned = starts_at_16_bytes(map.data, batch > 1 ? map.stride[0] : 0, size_of(map.type));
  return {map, width, {.flat = flat, .vector = flat && aligned}};
}

// Calls body.template operator()<T, C>() with the compute type and the smallest compiled number of channels that is large enough.
// Padding with zero channels changes no distance. Tests of the machine code define FLOWSEG_ONLY_FP32_C3 to compile one case.
template <class Body>
void for_type_and_channels([[maybe_unused]] Real type, [[maybe_unused]] int channels, Body body) {
#ifdef FLOWSEG_ONLY_FP32_C3
  return body.template operator()<float, 3>();
#else
  if (type == Real::f64) {
    return channels <= 4 ? body.template operator()<double, 4>() : body.template operator()<double, 16>();
  }
  if (channels <= 3) return body.template operator()<float, 3>();
  if (channels <= 4) return body.template operator()<float, 4>();
  if (channels <= 8) return body.template operator()<float, 8>();
  return body.template operator()<float, 16>();
#endif
}

// Calls body.template operator()<T>() with the compute type.
template <class Body>
void for_type([[maybe_unused]] Real type, Body body) {
#ifndef FLOWSEG_ONLY_FP32_C3
  if (type == Real::f64) return body.template operator()<double>();
#endif
  body.template operator()<float>();
}

}  // namespace flowseg::cuda
