// Converts torch tensors of any device to plain data, with torch's stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "shared/types.h"

namespace flowseg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The prefix of the message tells runtime/registry.py that a value is wrong, and that it is not an internal error.
#define FLOWSEG_CHECK(condition, ...) STD_TORCH_CHECK(condition, "flowseg: ", __VA_ARGS__)

inline Real real_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Real::f32;
    case ScalarType::Double: return Real::f64;
    case ScalarType::Half: return Real::f16;
    case ScalarType::BFloat16: return Real::bf16;
    default: FLOWSEG_CHECK(false, name, ": wanted dtype float32, bfloat16, float16 or float64"); return Real::f32;
  }
}

inline Integer integer_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Byte: return Integer::u8;
    case ScalarType::Short: return Integer::i16;
    case ScalarType::Int: return Integer::i32;
    case ScalarType::Long: return Integer::i64;
    default: FLOWSEG_CHECK(false, name, ": wanted dtype uint8, int16, int32 or int64"); return Integer::u8;
  }
}

inline ScalarType compute_type(const Tensor& image) {
  return image.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Image view_of(const Tensor& t, const char* name) {
  FLOWSEG_CHECK(t.dim() == 4, name, ": wanted shape (B, C, H, W)");
  Image image{
      .data = t.data_ptr(),
      .type = real_of(t, name),
      .batch = t.size(0),
      .channels = t.size(1),
      .height = t.size(2),
      .width = t.size(3),
      .stride = {},
  };
  for (int i = 0; i < 4; ++i) image.stride[i] = t.stride(i);
  return image;
}

inline LabelMap label_map_of(const Tensor& t, const Image& image, int64_t ignore, const char* name) {
  FLOWSEG_CHECK(t.dim() == 3 && t.size(0) == image.batch && t.size(1) == image.height && t.size(2) == image.width, name,
                ": wanted shape (B, H, W) of the image");
  return {
      .data = t.data_ptr(),
      .type = integer_of(t, name),
      .stride = {t.stride(0), t.stride(1), t.stride(2)},
      .ignore = ignore,
  };
}

inline void check_codes(const Tensor& t, const Image& image) {
  FLOWSEG_CHECK(t.size(1) == image.channels && image.channels >= 1 && image.channels <= 16 && t.size(0) <= INT32_MAX,
                "centroids: wanted 1 to 16 channels, as many as the image has");
  FLOWSEG_CHECK(t.is_contiguous() && t.scalar_type() == (image.type == Real::f64 ? ScalarType::Double : ScalarType::Float),
                "centroids: wanted a contiguous tensor in the compute dtype");
}

// The decode grid, or none: a grid has fp32 codes with three channels, and other codes are searched without one.
inline Grid grid_of(const Tensor& centroids, const std::optional<Tensor>& cells, const std::optional<Tensor>& records,
                    const std::optional<Tensor>& records_left, double low, double scale) {
  if (!cells || centroids.scalar_type() != ScalarType::Float || centroids.size(1) != 3) return {};
  const auto is_usable = [&](const std::optional<Tensor>& t) {
    return t && t->is_contiguous() && t->is_cuda() == centroids.is_cuda();
  };
  FLOWSEG_CHECK(is_usable(cells) && is_usable(records) && is_usable(records_left),
                "codebook: wanted a contiguous decode grid on the device of its centroids");
  const int64_t side = cells->dim() == 4 ? cells->size(3) : 0;
  FLOWSEG_CHECK(side > 0 && (side & (side - 1)) == 0 && cells->size(0) == 2 && cells->size(1) == side && cells->size(2) == side &&
                    cells->scalar_type() == ScalarType::Int,
                "codebook: wanted the cells of its decode grid as int32 (2, G, G, G), G a power of two; make a new Codebook");
  FLOWSEG_CHECK(records->dim() == 3 && records->size(1) == 4 && records->size(2) == 8 &&
                    records->scalar_type() == ScalarType::Float,
                "codebook: wanted the records of its decode grid as float32 (R, 4, 8); make a new Codebook");
  FLOWSEG_CHECK(records_left->dim() == 1 && records_left->size(0) == records->size(0) &&
                    records_left->scalar_type() == ScalarType::Int,
                "codebook: wanted the record counts of its decode grid as int32 (R,); make a new Codebook");
  const auto* table = static_cast<const int32_t*>(cells->data_ptr());
  return {
      .cells = table,
      .records = static_cast<const float*>(records->data_ptr()),
      .records_left = static_cast<const int32_t*>(records_left->data_ptr()),
      .low = static_cast<float>(low),
      .scale = static_cast<float>(scale),
      .size = static_cast<int>(side),
      .words = table + cells->stride(0),
  };
}

inline Output output_of(const Tensor& t) { return {t.data_ptr(), real_of(t, "output")}; }

inline Tensor empty_like_shape(const Tensor& t, ScalarType type, std::vector<int64_t> shape) {
  return torch::stable::new_empty(t, shape, type);
}

}  // namespace flowseg
