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

inline void check_table(const Tensor& t, const Tensor& centroids, ScalarType type, bool shape_is_right, const char* wanted) {
  FLOWSEG_CHECK(t.is_contiguous() && t.is_cuda() == centroids.is_cuda() && t.scalar_type() == type && shape_is_right,
                "codebook: wanted the ", wanted, ", contiguous, on the device of its centroids; make a new Codebook");
}

inline Grid grid_of(const Tensor& centroids, const std::vector<Tensor>& tables, double low, double scale) {
  const Tensor &cells = tables[0], &records = tables[1], &records_left = tables[2];
  const int64_t side = cells.dim() == 4 ? cells.size(3) : 0;
  check_table(cells, centroids, ScalarType::Int,
              side > 0 && (side & (side - 1)) == 0 && cells.size(0) == 2 && cells.size(1) == side && cells.size(2) == side,
              "cells of its decode grid as int32 (2, G, G, G), G a power of two");
  check_table(records, centroids, ScalarType::Float, records.dim() == 3 && records.size(1) == 4 && records.size(2) == 8,
              "records of its decode grid as float32 (R, 4, 8)");
  check_table(records_left, centroids, ScalarType::Int, records_left.dim() == 1 && records_left.size(0) == records.size(0),
              "record counts of its decode grid as int32 (R,)");
  const auto* table = static_cast<const int32_t*>(cells.data_ptr());
  return {
      .cells = table,
      .records = static_cast<const float*>(records.data_ptr()),
      .records_left = static_cast<const int32_t*>(records_left.data_ptr()),
      .low = static_cast<float>(low),
      .scale = static_cast<float>(scale),
      .size = static_cast<int>(side),
      .words = table + cells.stride(0),
  };
}

inline Guesses guesses_of(const Tensor& centroids, const std::vector<Tensor>& tables) {
  const Tensor &projection = tables[0], &starts = tables[1], &members = tables[2], &rivals = tables[3], &certain = tables[4];
  const int64_t axes = projection.dim() == 2 ? projection.size(0) : 0, classes = centroids.size(0);
  check_table(projection, centroids, ScalarType::Float, 1 <= axes && axes <= 8 && projection.size(1) == centroids.size(1) + 1,
              "projection of its guesses as float32 (A, C + 1), A at most 8");
  const int64_t cells = starts.numel() - 1;
  int log2_cells = 0;
  while (int64_t{1} << (log2_cells + 1) * axes <= cells) ++log2_cells;
  check_table(starts, centroids, ScalarType::Int, starts.dim() == 1 && cells == int64_t{1} << log2_cells * axes,
              "starts of its guesses as int32 (G^A + 1,), G a power of two");
  check_table(members, centroids, ScalarType::Int, members.dim() == 1, "members of its guesses as int32 (E,)");
  const int64_t rival_count = rivals.dim() == 2 ? rivals.size(1) : -1;
  check_table(rivals, centroids, ScalarType::Int, rival_count >= 0 && rivals.size(0) == classes,
              "rivals of its guesses as int32 (K, M)");
  check_table(certain, centroids, ScalarType::Float,
              certain.dim() == 2 && certain.size(0) == classes && certain.size(1) == rival_count + 1,
              "certain distances of its guesses as float32 (K, M + 1)");
  return {
      .projection = static_cast<const float*>(projection.data_ptr()),
      .starts = static_cast<const int32_t*>(starts.data_ptr()),
      .members = static_cast<const int32_t*>(members.data_ptr()),
      .rivals = static_cast<const int32_t*>(rivals.data_ptr()),
      .certain = static_cast<const float*>(certain.data_ptr()),
      .axes = static_cast<int>(axes),
      .log2_cells = log2_cells,
      .rival_count = static_cast<int>(rival_count),
  };
}

// The tables of a call. They are for fp32 codes: three tensors are a decode grid, for three channels, and five are guesses, for
// more channels.
inline Tables tables_of(const Tensor& centroids, const std::vector<Tensor>& tables, double low, double scale) {
  if (tables.empty() || centroids.scalar_type() != ScalarType::Float) return {};
  const int64_t channels = centroids.size(1);
  FLOWSEG_CHECK((tables.size() == 3 && channels == 3) || (tables.size() == 5 && channels > 3),
                "codebook: wanted the tables of its centroids; make a new Codebook");
  return tables.size() == 3 ? Tables{.grid = grid_of(centroids, tables, low, scale), .guesses = {}}
                            : Tables{.grid = {}, .guesses = guesses_of(centroids, tables)};
}

inline Output output_of(const Tensor& t) { return {t.data_ptr(), real_of(t, "output")}; }

inline Tensor empty_like_shape(const Tensor& t, ScalarType type, std::vector<int64_t> shape) {
  return torch::stable::new_empty(t, shape, type);
}

}  // namespace flowseg
