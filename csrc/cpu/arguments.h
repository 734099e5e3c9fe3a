// What a chunk of pixels needs to be computed: plain data, no torch, filled in once a call and shared by all threads.
#pragma once

#include <cstdint>

#include "shared/types.h"

namespace flowseg::cpu {

struct Labels : LabelMap {
  // Smallest flat position of a label outside [0, K) that is not `ignore`; INT64_MAX while there is none. Set atomically.
  int64_t* first_bad;
};

// Centroids, K rows of `padded` channels (zeros after the real ones), in the compute type.
struct Codes {
  const void* data;
  int64_t classes;
  int padded;
  double reach;  // largest magnitude of a coordinate
};

// Pixels are cut into chunks that never cross images; sums over chunks are added in order, so results do not depend on threads.
constexpr int64_t kChunk = 4096;

struct Interpolate {
  Image source;
  Labels labels;
  const double* times;
  Codes codes;
  Output out;
};

struct InterpolateBackward {
  Image grad, source;
  Labels labels;
  const double* times;
  Codes codes;
  Output grad_source;
  double* grad_time;  // one a chunk; null when not needed
};

struct Correct {
  Image x;
  Labels labels;
  Codes codes;
  Correction correction;
  Output out;
};

struct Loss {
  Image prediction, source;
  Labels labels;
  const double* times;
  Codes codes;
  Correction correction;
  bool predicts_endpoint, endpoint_space, annealed;
  double weight, t_min;
  Output residual;   // data null when not needed
  double share;      // factor of the residual
  void* per_pixel;   // (B, H, W) in the compute type; null when not needed
  double* sums;      // one a chunk
  int64_t* counts;   // one a chunk
};

struct Count {
  Image shape;
  Labels labels;
  int64_t classes;
  int64_t* counts;  // valid labels, one a chunk
};

struct Scale {
  Image residual;
  const void* grad;     // gradient of the loss, in the compute type: one number, or (B, H, W) of these strides
  int64_t stride[3];
  double factor;
  Output out;
};

struct Decode {
  Image x;
  Codes codes;
  Grid grid;  // cells is null when there is none
  int64_t ignore;
  void* labels;  // contiguous (B, H, W); null when not needed
  Integer label_type;
  void *distance, *margin;  // contiguous (B, H, W) in the compute type; null when not needed
};

struct Confusion {
  Decode decode;
  Labels target;
};

// The same functions, compiled once for each instruction set. `chunk` counts chunks over the whole batch.
struct Kernels {
  void (*interpolate)(const Interpolate&, int64_t chunk);
  void (*interpolate_backward)(const InterpolateBackward&, int64_t chunk);
  void (*correct)(const Correct&, int64_t chunk);
  void (*loss)(const Loss&, int64_t chunk);
  void (*count)(const Count&, int64_t chunk);
  void (*scale)(const Scale&, int64_t chunk);
  void (*decode)(const Decode&, int64_t chunk);
  // Adds to counts (K, K); with `shared` other threads add to the same counts.
  void (*confusion)(const Confusion&, int64_t chunk, int64_t* counts, bool shared);
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

}  // namespace flowseg::cpu
