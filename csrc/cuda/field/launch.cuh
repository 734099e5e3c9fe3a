// The launches of the neural field and its backward: sizes, scratch memory, and the order of the kernels.
//
// A caller fills FieldParams by field_params() and by hand (results and gradients), allocates field_scratch() bytes, and calls
// launch_field() or launch_field_backward().
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/field/backward_wide.cuh"
#include "cuda/field/ends.cuh"
#include "cuda/field/forward.cuh"
#include "cuda/field/params.h"

#ifndef FLOWSEG_ROUND_PATCHES
#define FLOWSEG_ROUND_PATCHES 4096  // the host build uses fewer
#endif

namespace flowseg::cuda {

constexpr int64_t kMostPatches = FLOWSEG_ROUND_PATCHES;  // in a round of the backward
constexpr int64_t kMostScratch = int64_t{1} << 30;       // bytes of scratch memory per round, unless kFewestPatches need more
constexpr int64_t kFewestPatches = std::min<int64_t>(256, kMostPatches);
// The patches of a group are 1/256 of all, but at least kSmallestGroup and no more than fit in every round.
constexpr int64_t kSmallestGroup = 4;
constexpr int64_t kMostGroups = 256;

// The shared tensors, contiguous, of x's type. The gains may be null in the plain form.
struct FieldShared {
  const void *embed, *embed_bias, *gains, *out_gain, *out_weight, *out_bias;
};
struct FieldOptions {
  int64_t patch_size, mlp_ratio;
  double eps;
  bool both, residual;
};

// The inputs of a call. `weights` is (P, L, 2 r Hx^2) with L = depth; `features` is C + F^2.
inline FieldParams field_params(const Image& x, const void* weights, int64_t depth, const FieldShared& shared, int64_t hidden,
                                int64_t features, const FieldOptions& options) {
  FieldParams f{};
  f.x = f.dense = x;
  f.dense.data = nullptr;
  f.dense.stride[3] = 1;
  f.dense.stride[2] = x.width;
  f.dense.stride[1] = x.height * x.width;
  f.dense.stride[0] = x.channels * f.dense.stride[1];
  f.weights = weights;
  f.embed = shared.embed;
  f.embed_bias = shared.embed_bias;
  f.gains = shared.gains;
  f.out_gain = shared.out_gain;
  f.out_weight = shared.out_weight;
  f.out_bias = shared.out_bias;
  f.hidden = static_cast<int>(hidden);
  f.inner = static_cast<int>(options.mlp_ratio * hidden);
  f.p = static_cast<int>(options.patch_size);
  f.freqs = static_cast<int>(std::lround(std::sqrt(static_cast<double>(features - x.channels))));
  f.depth = static_cast<int>(depth);
  f.columns = static_cast<int>(x.width / options.patch_size);
  f.per_image = static_cast<int>(x.height / options.patch_size) * f.columns;
  f.patches = x.batch * f.per_image;
  f.eps = static_cast<float>(options.eps);
  f.both = options.both;
  f.residual = options.residual;
  return f;
}

// Whether W2's column norms span several slices, so that kernels of their own compute them and project its gradient.
inline bool has_long_columns(const FieldParams& f) { return f.both && f.slices() > 1 && f.depth > 0; }

// The floats of a group's sums.
inline int64_t sums_of_group(const FieldParams& f) {
  const int64_t part = f.halves() == 1 ? int{GroupSums<1>::kSize} : int{GroupSums<2>::kSize};
  return f.tiles() * f.halves() * part;
}

// Gives out parts of one allocation. Without memory it only counts the bytes.
class Places {
 public:
  explicit Places(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  void take(T*& to, int64_t count) {
    to = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// The scratch memory whose size depends on the patches of a round.
inline void place_round(FieldParams& f, bool backward, int64_t count, Places& places) {
  const int64_t blocks = count * f.depth;
  if (backward || has_long_columns(f)) places.take(f.inverse_lengths, blocks * f.lengths());
  if (!backward) return;
  places.take(f.states, count * 2 * f.state_bytes());
  if (!f.aliased && f.depth > 1) places.take(f.later_states, count * (f.depth - 1) * f.state_bytes());
  places.take(f.inverse_rms, count * (f.depth + 1) * f.tiles() * kTile);
  if (has_long_columns(f)) places.take(f.along2, blocks * f.padded_hidden());
}

// Thread blocks of the backward of a round.
template <class Launch>
int64_t backward_block_count(const FieldParams& f, const Launch& launch) {
  return std::min<int64_t>(f.count, launch.device().multiprocessors);
}

// Fills in the groups, the patches of the first round, and the pointers to scratch memory. Returns the bytes it takes.
template <class Launch>
int64_t plan_field(FieldParams& f, bool backward, void* memory, const Launch& launch) {
  f.first = f.groups_before = 0;
  f.aliased = f.state_bytes() <= f.block_bytes();
  f.per_group = std::clamp((f.patches + kMostGroups - 1) / kMostGroups, kSmallestGroup, kFewestPatches);
  f.groups = (f.patches + f.per_group - 1) / f.per_group;
  f.count = f.patches;
  if (backward) {
    Places one(nullptr);
    place_round(f, true, 1, one);
    const int64_t fit = std::clamp(kMostScratch / one.bytes(), kFewestPatches, kMostPatches);
    // Whole groups, so that groups do not depend on the rounds.
    f.count = std::min(f.patches, fit / f.per_group * f.per_group);
  }
  Places places(memory);
  places.take(f.table, int64_t{f.tiles()} * kTile * f.padded_hidden());
  place_round(f, backward, f.count, places);
  if (backward) {
    places.take(f.waves, int64_t{f.pixels()} * f.freqs * f.freqs);
    places.take(f.gain_sums, f.patches * f.depth * f.padded_hidden());
    places.take(f.group_sums, f.groups * sums_of_group(f));
    if (f.slices() > 1) places.take(f.dn_sums, backward_block_count(f, launch) * f.tiles() * kTile * f.padded_hidden());
  }
  return places.bytes();
}

// The bytes of scratch memory that a call needs.
template <class Launch>
int64_t field_scratch(FieldParams f, bool backward, const Launch& launch) {
  return plan_field(f, backward, nullptr, launch);
}

// Calls body.template operator()<T, kHalves>() with the type of the tensors and the halves of the hidden units.
template <class Body>
void for_field(const FieldParams& f, Real type, Body body) {
  const bool wide = f.halves() == 2;
  if (type == Real::bf16) return wide ? body.template operator()<BFloat, 2>() : body.template operator()<BFloat, 1>();
  wide ? body.template operator()<Half, 2>() : body.template operator()<Half, 1>();
}

// Makes the tensor maps of W1 and W2, or of their gradients.
template <class Launch>
void make_maps(const FieldParams& f, const void* weights, TensorMap& w1, TensorMap& w2, const Launch& launch) {
  if (f.depth == 0 || f.patches == 0) return;
  const int64_t count = f.patches * f.depth, row1 = int64_t{2} * f.inner, row2 = int64_t{2} * f.hidden;
  w1 = launch.tensor_map({.data = weights, .columns = f.inner, .rows = f.hidden, .count = count, .row_bytes = row1,
                          .matrix_bytes = f.block_bytes()});
  w2 = launch.tensor_map({.data = static_cast<const char*>(weights) + row1 * f.hidden, .columns = f.hidden, .rows = f.inner,
                          .count = count, .row_bytes = row2, .matrix_bytes = f.block_bytes()});
}

template <class Launch>
void launch_table(const FieldParams& f, Real type, const Launch& launch) {
  for_field(f, type, [&]<class T, int kHalves>() {
    launch.with_threads(kEndThreads, table<T, kHalves>, f.tiles() * kTile / kTablePixels<kHalves>, 0, f);
  });
}

template <class Launch>
void launch_lengths(const FieldParams& f, Real type, const Launch& launch) {
  if (!has_long_columns(f)) return;
  for_field(f, type, [&]<class T, int kHalves>() {
    launch.with_threads(kEndThreads, lengths<T, kHalves>, f.count * f.depth, 0, f);
  });
}

template <class Launch>
void launch_field(FieldParams f, Real type, void* scratch, const Launch& launch) {
  if (f.patches == 0) return;
  plan_field(f, false, scratch, launch);
  make_maps(f, f.weights, f.w1, f.w2, launch);
  launch_table(f, type, launch);
  launch_lengths(f, type, launch);
  launch_forward<false>(f, type, launch);
}

// Adds up the rows of an array (rows, columns) into row 0.
template <class Launch>
void launch_fold(float* data, int64_t rows, int64_t columns, const Launch& launch) {
  const int64_t across = (columns + kFoldColumns - 1) / kFoldColumns;
  for (int64_t step = 1; step < rows; step *= kFoldRows) {
    const int64_t down = (rows + kFoldRows * step - 1) / (kFoldRows * step);
    launch.with_threads(kEndThreads, fold, across * down, 0, data, rows, columns, step);
  }
}

// Takes the round's patches back through all blocks. Needs the states of all levels, the gradient of the state in the place of
// level L, inverse lengths and 1 / rms; with several slices also dn_sums.
template <class Launch>
void launch_backward_blocks(const FieldParams& f, Real type, const Launch& launch) {
  if (f.depth == 0 || f.count == 0) return;
  for_operands(type, f.residual, [&]<class T, bool kTanh>() {
    const auto with = [&](auto kernel, size_t shared) {
      launch.with_threads(backward::kThreads, kernel, backward_block_count(f, launch), shared + 1024, f);
    };
    if (f.halves() == 1) return with(backward::backward_blocks<T, kTanh, 1>, sizeof(backward::Shared));
    with(backward::backward_blocks<T, kTanh, 2>, sizeof(backward::WideShared));
  });
}

// The backward of the patches [f.first, f.first + f.count).
template <class Launch>
void launch_round(const FieldParams& f, Real type, const Launch& launch) {
  const auto launch_end = [&](auto few, auto many) {
    const int64_t blocks = (f.count + f.per_group - 1) / f.per_group * f.tiles() * f.halves();
    launch.with_threads(kEndThreads, f.x.channels <= kFewChannels ? few : many, blocks, 0, f);
  };
  launch_lengths(f, type, launch);
  launch_forward<true>(f, type, launch);
  for_field(f, type, [&]<class T, int kHalves>() {
    launch_end(leave<T, kFewChannels, kHalves>, leave<T, kMostChannels, kHalves>);
  });
  launch_backward_blocks(f, type, launch);
  for_field(f, type, [&]<class T, int kHalves>() {
    if (has_long_columns(f)) launch.with_threads(kEndThreads, project<T, kHalves>, f.count * f.depth, 0, f);
    launch_end(enter<T, kFewChannels, kHalves>, enter<T, kMostChannels, kHalves>);
  });
}

template <class Launch>
void launch_field_backward(FieldParams f, Real type, void* scratch, const Launch& launch) {
  plan_field(f, true, scratch, launch);
  make_maps(f, f.weights, f.w1, f.w2, launch);
  make_maps(f, f.grad_weights, f.grad_w1, f.grad_w2, launch);
  launch_table(f, type, launch);
  const int64_t per_round = f.count;
  for (; f.first < f.patches; f.first += per_round) {
    f.count = std::min(per_round, f.patches - f.first);
    f.groups_before = f.first / f.per_group;
    launch_round(f, type, launch);
  }
  launch_fold(f.group_sums, f.groups, sums_of_group(f), launch);
  if (f.residual && f.depth > 0) launch_fold(f.gain_sums, f.patches, int64_t{f.depth} * f.padded_hidden(), launch);
  for_field(f, type, [&]<class T, int kHalves>() {
    launch.with_threads(kEndThreads, finish<T, kHalves>, f.hidden, 0, f);
  });
}

}  // namespace flowseg::cuda
