// Inputs, options and results of the neural field on the CPU: plain data without torch, filled in once per call and shared by all
// threads.
#pragma once

#include "cpu/params.h"

namespace flowseg::cpu {

// The pixels of a patch are padded to a multiple of kPixelPad. The panel of every instruction set divides kPixelPad.
constexpr int64_t kPixelPad = 32;

struct Field {
  Image x;
  const void* weights;  // (B, patches, L, 2 * Hx * inner): W1 (Hx, inner), then W2 (inner, Hx); contiguous per block
  Real weight_type;
  int64_t weight_stride[3];
  int64_t hidden, inner, depth;  // Hx, r * Hx, L
  int64_t patch_size;            // pixels along a side of a patch
  int64_t padded;                // pixels per patch, padded
  const float* embed;       // (Hx, C)
  const float* table;       // (Hx, padded), the contribution of the cosine features and the bias; ones in the padding
  const float* gains;       // (L, Hx); null in the plain form
  const float* out_gain;    // (Hx,); null in the plain form
  const float* out_weight;  // (C, Hx)
  const float* out_bias;    // (C,)
  float eps;
  bool both;      // W2 is normalised too
  bool residual;  // the residual form: RMSNorm before each block, and its input added to its output
  Output out;
};

// Gradients of the shared parameters, summed over a group of patches: offsets into one array of `size` floats.
struct FieldSums {
  int64_t position;    // (Hx, padded)
  int64_t embed;       // (Hx, C)
  int64_t gains;       // (L, Hx)
  int64_t out_gain;    // (Hx,)
  int64_t out_weight;  // (C, Hx)
  int64_t out_bias;    // (C,)
  int64_t size;
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
  Output grad_x;        // data null if not needed
  Output grad_weights;  // contiguous; data null if not needed
};

// The kernels of one instruction set. csrc/cpu/field defines them, and is compiled for all four. avx512bf16 multiplies pairs of
// bf16 numbers, so it serves only bf16 tensors with an even Hx. Patches count over the whole batch. Scratch is aligned to 64 bytes.
template <Isa>
struct FieldKernels {
  static int64_t scratch(const Field&, bool backward);  // floats per thread
  static void forward(const Field&, int64_t begin, int64_t end, float* scratch);
  // Writes the sums over the patches [begin, end) to `sums` (FieldSums::size floats).
  static void backward(const FieldBackward&, int64_t begin, int64_t end, float* scratch, float* sums);
};

}  // namespace flowseg::cpu
