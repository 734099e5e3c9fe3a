// Inputs, options and results of the pixel ops on the CPU: plain data without torch, filled in once per call and shared by all
// threads.
#pragma once

#include "shared/types.h"

namespace flowseg::cpu {

struct Labels : LabelMap {
  // Smallest flat position of a label that is neither in [0, K) nor `ignore`; INT64_MAX if there is none. Updated atomically.
  int64_t* first_bad;
};

// Centroids in the compute type.
struct Codes {
  const void* data;  // (K, padded), zeros after the last channel
  int64_t classes;
  int padded;
  double max_abs;  // largest magnitude of a coordinate
};

// A chunk is the work of one task: at most kChunkPixels pixels of one image. Sums are kept per chunk and added in the order of the
// chunks, so results do not depend on the number of threads.
constexpr int64_t kChunkPixels = 4096;

// Pixels per task of the ops on probabilities. They have no sums over pixels, and callers may pass few pixels with many classes.
constexpr int64_t kSmallChunkPixels = 256;

struct Interpolate {
  Image source;
  Labels labels;
  const double* times;  // (B,)
  Codes codes;
  Output out;
};

struct InterpolateBackward {
  Image grad, source;
  Labels labels;
  const double* times;  // (B,)
  Codes codes;
  Output grad_source;
  double* grad_time;  // (chunks,); null if not needed
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
  const double* times;  // (B,)
  Codes codes;
  Correction correction;
  bool predicts_endpoint, endpoint_space, annealed;
  double weight, t_min;
  Output residual;        // data null if not needed
  double residual_scale;  // factor of the residual
  void* per_pixel;        // (B, H, W) in the compute type; null if not needed
  double* sums;           // (chunks,), losses
  int64_t* counts;        // (chunks,), valid labels
};

struct Count {
  Image shape;
  Labels labels;
  int64_t classes;
  int64_t* counts;  // (chunks,), valid labels
};

struct Scale {
  Image residual;
  const void* grad;   // gradient of the loss in the compute type: one number, or (B, H, W)
  int64_t stride[3];  // of grad; zeros for one number
  double factor;
  Output out;
};

struct Decode {
  Image x;
  Codes codes;
  Tables tables;
  int64_t ignore = 0;
  void* labels = nullptr;  // contiguous (B, H, W); null if not needed
  Integer label_type = Integer::u8;
  void* distance = nullptr;  // contiguous (B, H, W) in the compute type; null if not needed
  void* margin = nullptr;    // likewise
};

struct Confusion {
  Decode decode;
  Labels target;
  bool by_class;
};

struct Probabilities {
  Image x;
  Codes codes;
  Correction correction;
  int form;   // a Form
  void* out;  // contiguous (B, K, H, W) in the compute type
};

struct TopClasses {
  Image x;
  Codes codes;
  Correction correction;
  int64_t kept;  // classes per pixel, from 1 to kMostKept
  int64_t ignore;
  void* labels;  // contiguous (B, kept, H, W)
  Integer label_type;
  void* probabilities;  // contiguous (B, kept, H, W) in the compute type
};

enum class Isa : int { baseline, avx2, avx512, avx512bf16 };

// The kernels of one instruction set. csrc/cpu/pixel defines them, and is compiled for baseline, avx2 and avx512. `chunk` counts
// chunks over the whole batch.
template <Isa>
struct PixelKernels {
  static void interpolate(const Interpolate&, int64_t chunk);
  static void interpolate_backward(const InterpolateBackward&, int64_t chunk);
  static void correct(const Correct&, int64_t chunk);
  static void loss(const Loss&, int64_t chunk);
  static void count(const Count&, int64_t chunk);
  static void scale(const Scale&, int64_t chunk);
  static void decode(const Decode&, int64_t chunk);
  static void probabilities(const Probabilities&, int64_t chunk);  // of kSmallChunkPixels
  static void top_classes(const TopClasses&, int64_t chunk);        // of kSmallChunkPixels
  // Adds to counts[truth, prediction] (K, K), or by_class to hits, truths and predictions (3, K). `shared`: other threads add to
  // the same counts.
  static void confusion(const Confusion&, int64_t chunk, int64_t* counts, bool shared);
};

}  // namespace flowseg::cpu
