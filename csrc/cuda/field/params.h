// The parameters of the neural field's kernels: inputs, results, scratch memory and its layout. Plain data, passed by value.
//
// Names: Hx hidden units, inner = r Hx, p pixels along a side of a patch, L blocks, P patches, C channels, F frequencies.
// Pixels of a patch are padded to whole tiles of 64 rows, hidden units to one or two halves of 64 columns. What is added is zero.
// "64 halves" are the padded hidden units. A matrix over pixels and hidden units has one tile for each half, one after the other,
// for every 64 pixels.
#pragma once

#include <cstdint>

#include "cuda/hopper/async.cuh"
#include "cuda/hopper/tile.h"
#include "shared/types.h"

namespace flowseg::cuda {

constexpr int kMostHalves = 2;
constexpr int kMostHidden = kMostHalves * kTile;
constexpr int kMostChannels = 16;
// A stage of shared memory holds the weights of a slice, which is kSlice / halves inner units: two tiles of W1 (rows: hidden,
// columns: inner units), then two tiles of W2 (rows: inner units, columns: hidden). With one half the tiles of a weight hold
// different inner units, with two halves different hidden units.
constexpr int kSlice = 2 * kTile;
constexpr int kStageBytes = 4 * kTileBytes;

struct FieldParams {
  // Inputs. All have one 16-bit type; all but x are contiguous.
  Image x;
  const void* weights;     // (P, L, 2 r Hx^2): W1 (Hx, inner), then W2 (inner, Hx) of each block; at a multiple of 16 bytes
  const void* embed;       // (Hx, C + F^2)
  const void* embed_bias;  // (Hx,)
  const void* gains;       // (L, Hx); unused in the plain form
  const void* out_gain;    // (Hx,); unused in the plain form
  const void* out_weight;  // (C, Hx)
  const void* out_bias;    // (C,)
  int hidden, inner, p, freqs, depth;
  int columns, per_image;  // patches per row of an image, per image
  int64_t patches;         // P
  float eps;
  bool both, residual;
  Image dense;             // the strides of a contiguous tensor of x's shape, such as `out` and `grad_x`; without data
  TensorMap w1, w2;  // over the P L matrices W1 (Hx, inner) and W2 (inner, Hx)

  // The forward's result, contiguous (B, C, H, W).
  void* out;

  // The backward's input and results. The last six come from `finish`.
  Image grad;          // of `out`, any strides
  void* grad_x;        // contiguous (B, C, H, W)
  void* grad_weights;  // as weights
  TensorMap grad_w1, grad_w2;
  void *grad_embed, *grad_bias, *grad_gains, *grad_out_gain, *grad_out_weight, *grad_out_bias;

  // Scratch memory. A round of the backward takes patches [first, first + count); the forward is one round of all patches. A patch
  // of a round has the number local = patch - first.
  int64_t first, count;
  bool aliased;              // see state_of
  float* table;              // (64 tiles, 64 halves): what the embedding adds at each pixel of every patch
  float* waves;              // (p^2, F^2): the cosine features, for the backward; else null
  float* inverse_lengths;    // (count, L, lengths()): reciprocal column norms of W1 (padded_inner), then of W2 (64 halves)
  char* states;              // (count, 2, tiles, halves, kTileBytes): see state_of
  char* later_states;        // (count, L - 1, tiles, halves, kTileBytes), null if aliased
  float* inverse_rms;        // (count, L + 1, 64 tiles): 1 / rms of the states
  float* along2;             // (count, L, 64 halves): sums for the column norms of W2, if there are several slices
  float* dn_sums;            // (blocks of the backward, tiles, halves, 64, 64), see launch_backward_blocks; null if one slice
  float* gain_sums;          // (P, L, 64 halves): the gradient of the gains by patch
  float* group_sums;         // (groups, tiles halves, GroupSums<halves>::kSize): sums over groups of patches
  int64_t per_group;         // patches per group
  int64_t groups_before;     // groups of earlier rounds
  int64_t groups;            // groups of all rounds

  FLOWSEG_INLINE int pixels() const { return p * p; }
  FLOWSEG_INLINE int tiles() const { return (p * p + kTile - 1) / kTile; }
  // Kernels that are compiled for a number of halves name it. Otherwise it is found at run time.
  template <int kHalves = 0>
  FLOWSEG_INLINE int halves() const {
    return kHalves ? kHalves : hidden > kTile ? 2 : 1;
  }
  template <int kHalves = 0>
  FLOWSEG_INLINE int padded_hidden() const {
    return halves<kHalves>() * kTile;
  }
  template <int kHalves = 0>
  FLOWSEG_INLINE int slice_units() const {
    return kSlice / halves<kHalves>();
  }
  template <int kHalves = 0>
  FLOWSEG_INLINE int slices() const {
    return (inner + slice_units<kHalves>() - 1) / slice_units<kHalves>();
  }
  template <int kHalves = 0>
  FLOWSEG_INLINE int padded_inner() const {
    return slices<kHalves>() * slice_units<kHalves>();
  }
  template <int kHalves = 0>
  FLOWSEG_INLINE int lengths() const {
    return padded_inner<kHalves>() + padded_hidden<kHalves>();
  }
  FLOWSEG_INLINE int64_t block_bytes() const { return int64_t{4} * inner * hidden; }
  template <int kHalves = 0>
  FLOWSEG_INLINE int state_bytes() const {
    return tiles() * halves<kHalves>() * kTileBytes;
  }
};

// The reciprocal column norms of a patch's weights of one level: of W1, then of W2.
template <int kHalves>
FLOWSEG_INLINE float* inverse_lengths_of(const FieldParams& f, int64_t local, int level) {
  return f.inverse_lengths + (local * f.depth + level) * f.lengths<kHalves>();
}

// Partial sums of a part of the pixels, over the patches of a group, in fp32. A part is 64 / kHalves rows of a tile. Offsets in
// floats. Channels beyond C are undefined.
template <int kHalves>
struct GroupSums {
  enum : int {
    kRows = kTile / kHalves,
    kHidden = kTile * kHalves,
    by_position = 0,                                  // (kRows, kHidden): gradient of the embedding's result, at each pixel
    by_channel = by_position + kRows * kHidden,       // (kHidden, 16): of the embedding's weights on the channels
    out_gain = by_channel + kHidden * kMostChannels,  // (kHidden,)
    out_weight = out_gain + kHidden,                  // (16, kHidden)
    out_bias = out_weight + kMostChannels * kHidden,  // (16,)
    kSize = out_bias + kMostChannels,
  };
};

// The address of a patch's state: (tiles, halves) tiles of 64 pixels (rows) by 64 hidden units (columns), each laid out as
// tile_offset says.
//
// The state before block `level` is h / rms(h), or h in the plain form; level L is the state after the last block. The backward
// replaces the state of level L by the gradient of the state: after the last block first, then, block by block, before the first.
//
// If `aliased`, a state between two blocks is kept in grad_weights, in the place of the block before it. That block's gradients are
// written only after the state was read for the last time.
template <int kHalves = 0>
FLOWSEG_INLINE char* state_of(const FieldParams& f, int64_t local, int level) {
  const int64_t bytes = f.state_bytes<kHalves>();
  if (level == f.depth) return f.states + (local * 2 + 1) * bytes;
  if (level == 0) return f.states + local * 2 * bytes;
  if (f.aliased) return static_cast<char*>(f.grad_weights) + ((f.first + local) * f.depth + level - 1) * f.block_bytes();
  return f.later_states + (local * (f.depth - 1) + level - 1) * bytes;
}

// The offset in elements of a patch's first pixel, channel 0, in an image of any strides. There are fewer than 2^31 patches; a
// division of 32 bits takes a third of the instructions.
FLOWSEG_INLINE int64_t first_pixel_of(const FieldParams& f, const Image& image, int64_t patch) {
  const unsigned batch = static_cast<unsigned>(patch) / static_cast<unsigned>(f.per_image);
  const unsigned in_image = static_cast<unsigned>(patch) % static_cast<unsigned>(f.per_image);
  const unsigned down = in_image / static_cast<unsigned>(f.columns), right = in_image % static_cast<unsigned>(f.columns);
  return batch * image.stride[0] + (down * image.stride[2] + right * image.stride[3]) * f.p;
}
// The offset of pixel `row` of a patch from the patch's first pixel.
FLOWSEG_INLINE int64_t pixel_in_patch(const FieldParams& f, const Image& image, int row) {
  return row / f.p * image.stride[2] + row % f.p * image.stride[3];
}
// The offset in elements of pixel `row` of a patch, channel 0.
FLOWSEG_INLINE int64_t pixel_of(const FieldParams& f, const Image& image, int64_t patch, int row) {
  return first_pixel_of(f, image, patch) + pixel_in_patch(f, image, row);
}

}  // namespace flowseg::cuda
