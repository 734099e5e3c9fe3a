// What a kernel needs: plain data, no torch, passed by value.
#pragma once

#include "cuda/platform.cuh"
#include "shared/types.h"

namespace flowseg::cuda {

// Facts about the GPU from which a launch chooses its number of blocks.
struct Device {
  int64_t multiprocessors;
  int64_t threads;                              // of 64 registers each on a multiprocessor
  int64_t shared_block, shared_multiprocessor;  // bytes of shared memory
};

// How neighbouring pixels of a plane may be read.
struct Layout {
  bool flat;    // the pixels of a plane follow each other without a gap
  bool vector;  // and runs of pixels start at multiples of 16 bytes
};

struct Source : Image {
  Layout layout;
};

// A contiguous (B, C, H, W) result, or (B, H, W) with C = 1.
struct Target : Output {
  int64_t channels, pixels;
  bool vector;
};

// A label outside [0, K) counts as ignored.
struct Labels : LabelMap {
  int64_t width;
  Layout layout;
};

// (B,) of any stride.
struct Times {
  const void* data;
  Real type;
  int64_t stride;
};

// (K, C) contiguous, in the compute type.
struct Codes {
  const void* data;
  int classes, channels;
};

inline bool starts_at_16_bytes(const void* data, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0;
}

// Whether rows follow each other without a gap; strides of sizes 1 do not matter.
inline bool is_flat(int64_t height, int64_t width, int64_t stride_row, int64_t stride_column) {
  return (width == 1 || stride_column == 1) && (height == 1 || stride_row == width);
}

inline Source source_of(const Image& image) {
  Source source{image, {is_flat(image.height, image.width, image.stride[2], image.stride[3]), false}};
  const int64_t size = size_of(image.type);
  source.layout.vector = source.layout.flat && starts_at_16_bytes(image.data, image.channels > 1 ? image.stride[1] : 0, size) &&
                         starts_at_16_bytes(image.data, image.batch > 1 ? image.stride[0] : 0, size);
  return source;
}

inline Target target_of(const Output& out, int64_t channels, int64_t pixels) {
  return {out, channels, pixels, starts_at_16_bytes(out.data, pixels, size_of(out.type))};
}

inline Labels labels_of(const LabelMap& map, int64_t batch, int64_t height, int64_t width) {
  Labels labels{map, width, {is_flat(height, width, map.stride[1], map.stride[2]), false}};
  labels.layout.vector = labels.layout.flat && starts_at_16_bytes(map.data, batch > 1 ? map.stride[0] : 0, size_of(map.type));
  return labels;
}

}  // namespace flowseg::cuda
