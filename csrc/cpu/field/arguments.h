// What the neural field needs for its patches: plain data, no torch, filled in once a call and shared by all threads.
#pragma once

#include "../arguments.h"

namespace flowseg::cpu {

// Pixels of a patch are padded to a multiple of this, which every instruction set's panel divides.
constexpr int64_t kPixelPad = 32;

struct Field {
  Image x;
  const void* weights;  // (B, N, L, [W1 (Hx, wide) | W2 (wide, Hx)]), a block contiguous
  Real weight_type;
  int64_t weight_stride[3];
  int64_t hidden, wide, depth, patch;
  int64_t padded;          // pixels of a patch, padded
  const float* embed;      // (Hx, C)
  const float* table;      // (Hx, padded): what the cosine features and the bias give; ones past the last pixel
  const float* gains;      // (L, Hx); null in the plain form
  const float* out_gain;   // (Hx); null in the plain form
  const float* out_weight; // (C, Hx)
  const float* out_bias;   // (C)
  float eps;
  bool both, residual;
  Output out;
};

// Sums over the patches of a chunk, one after the other in memory.
struct FieldSums {
  int64_t position, embed, gains, out_gain, out_weight, out_bias, size;  // offsets: (Hx, padded), (Hx, C), (L, Hx), (Hx), (C, Hx), (C)
  FieldSums(int64_t hidden, int64_t channels, int64_t depth, int64_t padded)
      : position(0),
        embed(hidden * padded),
        gains(embed + hidden * channels),
        out_gain(gains + depth * hidden),
        out_weight(out_gain + hidden),
        out_bias(out_weight + channels * hidden),
        size(out_bias + channels) {}
};

struct FieldBackward {
  Field field;
  Image grad;
  Output grad_x;        // data null when not needed
  Output grad_weights;  // contiguous; data null when not needed
};

// The same functions for each instruction set. Patches are counted over the whole batch; scratch is aligned to 64 bytes.
struct FieldKernels {
  int64_t (*scratch)(const Field&, bool backward);  // floats a thread needs
  void (*forward)(const Field&, int64_t begin, int64_t end, float* scratch);
  // Writes the sums over these patches to `sums` (FieldSums::size floats).
  void (*backward)(const FieldBackward&, int64_t begin, int64_t end, float* scratch, float* sums);
};

namespace baseline { extern const FieldKernels field_kernels; }
namespace avx2 { extern const FieldKernels field_kernels; }
namespace avx512 { extern const FieldKernels field_kernels; }
// Products of bf16 pairs; for bf16 tensors and an even Hx only.
namespace avx512bf16 { extern const FieldKernels field_kernels; }

}  // namespace flowseg::cpu
