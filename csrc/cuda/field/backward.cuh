// The backward of the neural field's blocks on Hopper: from the gradient of the state after the last block to the gradient of the
// state before the first, with the gradients of the generated weights and, by patch, of the gains.
//
// This file has what is common, and the inner groups for one half of 64 hidden units. backward_wide.cuh has the inner groups for
// two halves and what else differs, and the kernel.
//
// A thread block stays on its multiprocessor and takes one patch after the other through all levels, from the last to the first.
// A step is kSlice inner units of one level's weights; a visit is one tile of pixels in a step. n is the normalised state before
// the block, g the gradient after it. With j for inner and h for hidden units, and columns of W1 and W2 of length 1:
//   y[j, px] = sum_h gain[h] / 2 W1[h, j] n[px, h]     du[j, px] = sum_h W2[j, h] g[px, h]
//   u = SiLU(2 y)                                      dy = du (1 + t + u (1 - t)), t = tanh(y)
//   G[j, h] = sum_px dy n                              D[j, h] = sum_px u g
//   dn[px, h] = gain[h] / 2 sum_j dy[j, px] W1[h, j]   new g = g + (dn - n mean_h(dn n)) / rms, or dn in the plain form
// Then, with inverse1 and inverse2 for the reciprocal column lengths of the generated weights and Q = gain[h] / 2 G[j, h]:
//   dW1[h, j] = inverse1[j] (Q - W1[h, j] sum_h'(Q W1[h', j]))          dgain[h] = 1/2 sum_j G[j, h] W1[h, j]
//   dW2[j, h] = inverse2[h] (D - W2[j, h] sum_j'(D W2[j', h])), or D if W2 is not normalised
// The weights get their columns of length 1 in shared memory, in 16 bits.
//
// Four warp groups work at the same time:
// - The loader: warp 0 loads n, warp 1 loads g and stores the new g, warps 2 and 3 load the weights and scale them.
// - The state group computes dn and the new g.
// - Two inner groups have 64 of a step's inner units each: y, du, u, dy, G, D, and the gradients of their weights.
//
// Barriers. "Turns" is the number of buffers that are used in turn, each with a barrier of its own. A number in brackets counts
// arrivals; four are those of a group's warps.
//
// | barrier       | turns | who arrives                                          | who waits, before what                      |
// |---------------|-------|------------------------------------------------------|---------------------------------------------|
// | weights_full  | 2     | weights' thread 0 (1), and the bytes it has asked for | weights' warps, before they scale           |
// | weights_ready | 2     | weights' warps (2), when they have scaled            | inner and state groups, as a step begins    |
// | weights_empty | 2     | inner groups' threads 0 (2), when the step's         | weights' thread 0, before it loads          |
// |               |       | gradients have left shared memory; state group (4),  |                                             |
// |               |       | after its last visit of the step                     |                                             |
// | tile_full     | 5     | n's and g's thread (2), and their bytes              | inner and state groups, as a visit begins   |
// | tile_empty    | 5     | inner groups (8), when G and D have read the tile;   | n's and g's thread, before they load        |
// |               |       | state group (4), after its visit                     |                                             |
// | dy_full       | 2     | inner groups (8), when dy is written                 | state group, before the product dn          |
// | dy_empty      | 2     | state group (4), when the product dn has read dy     | inner groups, before they write dy          |
// | new_g_full    | 1     | state group (4), when the new g is written           | g's thread, before it stores                |
// | new_g_empty   | 1     | g's thread (1), when the store has read it           | state group, before it writes the new g     |
//
// Why no wait lasts for ever: order all events by visits. For a visit a group needs the loads up to it, and what the other
// groups do in visits up to this one. So it is enough that no load waits for its own visit or a later one:
// - g's thread stores the new g of a visit, waits until it is in global memory, and then loads g of `ahead` + 1 visits later.
//   `ahead` is less than the number of tiles, so g of the next level, that many visits later, is loaded after it was stored.
//   `ahead` is not negative, so the visit whose new g is awaited has been loaded.
// - A buffer of the ring is loaded again kRing visits later. The inner groups give it back in the next visit or at the step's
//   end; the state group in the same visit, before which the earlier new g must be stored. It is: `ahead` is less than kRing.
// - A stage of weights is loaded again two steps later. The inner groups give it back in the first visit of the next step, whose
//   weights are in the other stage.
//
// If the states are aliased (state_of), the gradients of block `level` overwrite the state before block level + 1. An inner group
// stores them after the last visit of a step of `level`. It has waited for all tiles of level + 1 before that, and a load has
// read global memory when its barrier completes. Later loads are of other states.
//
// All sums have a fixed order: a run repeats bit for bit.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/block.cuh"
#include "cuda/field/fragments.cuh"
#include "cuda/field/params.h"

namespace flowseg::cuda::backward {

constexpr int kThreads = 4 * kGroupThreads;
// Registers per thread of the loader, the state group and the inner groups (see Shared): 512 in all, 65,536 registers.
constexpr int kLoaderRegisters = 32;
constexpr int kStages = 2;
constexpr int kScalingThreads = 64;  // two warps
constexpr int kInnerWarps = 2 * kGroupWarps;

struct alignas(8) Pair {
  float x, y;
};

// Factors of the weights of a step: reciprocal column lengths, half of the gains.
template <int kHalves>
struct alignas(16) Factors {
  float inverse1[kSlice / kHalves], inverse2[kHalves * kTile];
  float half_gain[kHalves * kTile];
};

// Shared memory with one half of hidden units. Templates take its type, to serve two halves too.
struct Shared {
  static constexpr int kHalves = 1;
  static constexpr int kRing = 5;
  static constexpr int kMostAhead = 3;  // bounds `ahead`
  static constexpr int kStateRegisters = 64, kInnerRegisters = 208;

  char weights[kStages][kStageBytes];    // as kSlice says; the place of W2 takes its gradient at the end of a step
  char tiles[kRing][2][kTileBytes];      // n, g
  char dy[2][2][kTileBytes];             // rows: an inner group's units, columns: pixels
  char grad_w1[2][kTileBytes];           // rows: hidden, columns: an inner group's units
  char new_g[kTileBytes];
  Factors<kHalves> factors[kStages];
  float column_sums[2][2][kInnerWarps][kTile];  // [step % 2]: sums of G W1 and D W2 over a warp's inner units
  float slice_sums[2][kTile];                   // the same over slices
  float along2[2][kTile];                       // the sums of D W2, one copy for each inner group
  Barrier weights_full[kStages], weights_ready[kStages], weights_empty[kStages];
  Barrier tile_full[kRing], tile_empty[kRing], dy_full[2], dy_empty[2], new_g_full, new_g_empty;
};

// One thread.
template <class Shared>
__device__ __forceinline__ void init_barriers(Shared& s) {
  for (int i = 0; i < kStages; ++i) {
    s.weights_full[i].init(1);
    s.weights_ready[i].init(kScalingThreads / 32);
    s.weights_empty[i].init(2 + kGroupWarps);
  }
  for (int i = 0; i < Shared::kRing; ++i) {
    s.tile_full[i].init(2);
    s.tile_empty[i].init(kInnerWarps + kGroupWarps);
  }
  for (int i = 0; i < 2; ++i) {
    s.dy_full[i].init(kInnerWarps);
    s.dy_empty[i].init(kGroupWarps);
  }
  s.new_g_full.init(kGroupWarps);
  s.new_g_empty.init(1);
}

// A visit of this thread block, in the order in which all groups take them.
template <int kHalves>
struct Visit {
  int local, level, slice = 0, tile = 0;

  __device__ __forceinline__ explicit Visit(const FieldParams& f) : local(static_cast<int>(blockIdx.x)), level(f.depth - 1) {}
  __device__ __forceinline__ bool exists(const FieldParams& f) const { return local < f.count; }
  __device__ __forceinline__ bool ends_step(const FieldParams& f) const { return tile + 1 == f.tiles(); }
  __device__ __forceinline__ bool in_last_slice(const FieldParams& f) const { return slice + 1 == f.slices<kHalves>(); }
  __device__ __forceinline__ void next_step(const FieldParams& f) {
    tile = 0;
    if (++slice < f.slices<kHalves>()) return;
    slice = 0;
    if (--level >= 0) return;
    level = f.depth - 1;
    local += static_cast<int>(gridDim.x);
  }
  __device__ __forceinline__ void next(const FieldParams& f) {
    if (++tile == f.tiles()) next_step(f);
  }
};

// v in the range of fp16, for an operand of this type. A column of zeros has the reciprocal length 1e12, so a finite gradient can
// leave the range, and inf * 0 would give NaN. A v that is already inf becomes NaN, so it shows in the gradients.
template <class T>
__device__ __forceinline__ float in_range(float v) {
  if constexpr (T::kIsBFloat) return v;
  v += 0.0f * v;
  v = v > 65504.0f ? 65504.0f : v;
  return v < -65504.0f ? -65504.0f : v;
}

// ---- The loader

// One thread: n of each visit.
template <class Shared>
__device__ __forceinline__ void load_states(Shared& s, const FieldParams& f) {
  constexpr int kHalves = Shared::kHalves, kBytes = kHalves * kTileBytes;
  Turn<Shared::kRing> turn;
  for (Visit<kHalves> v(f); v.exists(f); v.next(f), turn.advance()) {
    Barrier& full = s.tile_full[turn.index];
    if (!FLOWSEG_PLANTED(early_load)) s.tile_empty[turn.index].wait(turn.parity ^ 1);
    full.arrive_and_expect(kBytes);
    const char* from = state_of<kHalves>(f, v.local, v.level) + int64_t{v.tile} * kBytes;
    load_bytes(shared_address(s.tiles[turn.index][0]), from, full, kBytes);
  }
}

// One thread: loads g of each visit, and stores the new g of an earlier one.
template <class Shared>
__device__ __forceinline__ void move_gradients(Shared& s, const FieldParams& f) {
  constexpr int kHalves = Shared::kHalves, kBytes = kHalves * kTileBytes;
  const int ahead = f.tiles() - 1 < Shared::kMostAhead ? f.tiles() - 1 : Shared::kMostAhead;
  const auto place = [&](const Visit<kHalves>& v) {
    return state_of<kHalves>(f, v.local, f.depth) + int64_t{v.tile} * kBytes;
  };
  Visit<kHalves> loaded(f), stored(f);
  Turn<Shared::kRing> turn;
  Turn<1> written;
  int between = 0;  // visits that have been loaded and not stored
  while (stored.exists(f)) {
    if (between <= ahead && loaded.exists(f)) {
      Barrier& full = s.tile_full[turn.index];
      s.tile_empty[turn.index].wait(turn.parity ^ 1);
      full.arrive_and_expect(kBytes);
      load_bytes(shared_address(s.tiles[turn.index][1]), place(loaded), full, kBytes);
      loaded.next(f);
      turn.advance();
      ++between;
      continue;
    }
    if (stored.in_last_slice(f)) {
      s.new_g_full.wait(written.parity);
      written.advance();
      store_bytes(place(stored), shared_address(s.new_g), kBytes);
      commit_copies();
      wait_for_reads<0>();
      s.new_g_empty.arrive();
      wait_for_copies<0>();
      fence_async_global();
    }
    stored.next(f);
    --between;
  }
}

// Multiplies 8 columns of every eighth row by eight factors. `at` is the first row's place.
template <class T>
__device__ __forceinline__ void scale_rows(char* at, int rows, const float (&factor)[8]) {
#pragma unroll 2
  for (; rows > 0; rows -= 8, at += 8 * kTileRowBytes) {
    FourWords v = *reinterpret_cast<FourWords*>(at);
#pragma unroll
    for (int i = 0; i < 4; ++i) v.at[i] = T::pack(T::low(v.at[i]) * factor[2 * i], T::high(v.at[i]) * factor[2 * i + 1]);
    *reinterpret_cast<FourWords*>(at) = v;
  }
}

// Eight factors from column `column` on. Those of columns that do not exist may hold anything; zero stands for them.
__device__ __forceinline__ void eight_factors(const float* factors, uint32_t column, bool exist, float (&factor)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) factor[i] = exist ? factors[column + i] : 0.0f;
}

// Multiplies the columns of two tiles side by side by their factors. Column i of the tiles exists if first + i < end.
template <class T>
__device__ __forceinline__ void scale_side_by_side(char* tiles, const float* factors, int first, int end, uint32_t thread) {
  const uint32_t column = thread % 16 * 8;
  float factor[8];
  eight_factors(factors, column, first + static_cast<int>(column) < end, factor);
  char* tile = tiles + column / kTile * kTileBytes;
#pragma unroll 1
  for (uint32_t row = thread / 16; row < 8; row += kScalingThreads / 16) {
    scale_rows<T>(tile + tile_offset(row, column % kTile), kTile, factor);
  }
}

// The same for two tiles one above the other.
template <class T>
__device__ __forceinline__ void scale_stacked(char* tiles, const float* factors, int first, int end, uint32_t thread) {
  const uint32_t column = thread % 8 * 8;
  float factor[8];
  eight_factors(factors, column, first + static_cast<int>(column) < end, factor);
  scale_rows<T>(tiles + tile_offset(thread / 8, column), 2 * kTile, factor);
}

// Gives the columns of a step's weights length 1. A thread has 8 columns of each weight and every fourth or eighth row.
template <class T, int kHalves>
__device__ __forceinline__ void scale_weights(char* weights, const Factors<kHalves>& factors, const FieldParams& f, int slice,
                                              uint32_t thread) {
  const int first = slice * f.slice_units<kHalves>();
  char* w2 = weights + 2 * kTileBytes;
  if constexpr (kHalves == 1) {
    scale_side_by_side<T>(weights, factors.inverse1, first, f.inner, thread);
    if (f.both) scale_stacked<T>(w2, factors.inverse2, 0, f.hidden, thread);
  } else {
    scale_stacked<T>(weights, factors.inverse1, first, f.inner, thread);
    if (f.both) scale_side_by_side<T>(w2, factors.inverse2, 0, f.hidden, thread);
  }
}

// Two warps: the weights of each step.
template <class T, class Shared>
__device__ __forceinline__ void load_weights(Shared& s, const FieldParams& f, int thread) {
  constexpr int kHalves = Shared::kHalves;
  const auto* gains = static_cast<const typename T::Element*>(f.gains);
  Turn<kStages> stage;
  for (Visit<kHalves> v(f); v.exists(f); v.next_step(f), stage.advance()) {
    Barrier& full = s.weights_full[stage.index];
    Factors<kHalves>& factors = s.factors[stage.index];
    char* weights = s.weights[stage.index];
    if (thread == 0) {
      const float* lengths = inverse_lengths_of<kHalves>(f, v.local, v.level);
      const float* lengths1 = lengths + v.slice * f.slice_units<kHalves>();
      s.weights_empty[stage.index].wait(stage.parity ^ 1);
      full.arrive_and_expect(kStageBytes + int(sizeof(factors.inverse1) + sizeof(factors.inverse2)));
      load_slice<kHalves>(shared_address(weights), f, full, v.local, v.level, v.slice);
      load_bytes(shared_address(factors.inverse1), lengths1, full, sizeof(factors.inverse1));
      load_bytes(shared_address(factors.inverse2), lengths + f.padded_inner<kHalves>(), full, sizeof(factors.inverse2));
    }
    float gain[kHalves];
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int unit = i * kTile + thread;
      gain[i] = unit < f.hidden ? 1.0f : 0.0f;
      if (f.residual && unit < f.hidden) gain[i] = widen(gains[v.level * f.hidden + unit]);
    }
    full.wait(stage.parity);
#pragma unroll
    for (int i = 0; i < kHalves; ++i) factors.half_gain[i * kTile + thread] = 0.5f * gain[i];
    for (int i = 0; !f.both && i < kHalves; ++i) factors.inverse2[i * kTile + thread] = 1;
    uint32_t own[1] = {static_cast<uint32_t>(thread)};
    settle(own);  // so that the compiler does not hold addresses from step to step: that would take too many registers
    scale_weights<T, kHalves>(weights, factors, f, v.slice, own[0]);
    fence_async();
    arrive_as_warp(s.weights_ready[stage.index]);
  }
}

// The loader's group.
template <class T, class Shared>
__device__ __forceinline__ void load_all(Shared& s, const FieldParams& f) {
  if (threadIdx.x == 0) load_states(s, f);
  if (threadIdx.x == 32) move_gradients(s, f);
  if (threadIdx.x >= 64) load_weights<T>(s, f, threadIdx.x - 64);
}

// ---- The state group

// A thread's sums of dn over slices, for a visit's tile: every 4 kGroupThreads-th group of four is its own. It reads only what it
// has written itself.
template <int kHalves>
__device__ __forceinline__ float* dn_sums_of(const FieldParams& f, const Visit<kHalves>& v, int thread) {
  return f.dn_sums + (int64_t{blockIdx.x} * f.tiles() + v.tile) * (kHalves * kTile * kTile) + 4 * thread;
}

// Adds the sums of the earlier slices to dn. In the last slice it returns true; otherwise it stores the sums for the next one.
__device__ __forceinline__ bool add_slices(float (&dn)[32], const FieldParams& f, const Visit<1>& v, int thread) {
  float* sums = dn_sums_of(f, v, thread);
  const bool last = v.in_last_slice(f);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    FourWords* at = reinterpret_cast<FourWords*>(sums + i * 4 * kGroupThreads);
    FourWords words{};
    if (v.slice > 0) words = *at;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      dn[4 * i + j] += same_bits<float>(words.at[j]);
      words.at[j] = same_bits<uint32_t>(dn[4 * i + j]);
    }
    if (!last) *at = words;
  }
  return last;
}

// Copies between dn and the sums of the earlier slices. With two halves there are always several slices, and the product dn adds
// to them: so all loads are under way at once, and the state group waits for them and for dy at the same time.
template <bool kLoads>
__device__ __forceinline__ void copy_slices(float (&dn)[2][32], const FieldParams& f, const Visit<2>& v, int thread) {
  float* sums = dn_sums_of(f, v, thread);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    FourWords* at = reinterpret_cast<FourWords*>(sums + i * 4 * kGroupThreads);
    FourWords words;
    if constexpr (kLoads) words = *at;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float& sum = dn[i / 8][4 * (i % 8) + j];
      if constexpr (kLoads) {
        sum = same_bits<float>(words.at[j]);
      } else {
        words.at[j] = same_bits<uint32_t>(sum);
      }
    }
    if constexpr (!kLoads) *at = words;
  }
}

// The sums of the earlier slices, or zero.
__device__ __forceinline__ void start_sums(float (&dn)[2][32], const FieldParams& f, const Visit<2>& v, int thread) {
  if (v.slice > 0) return copy_slices<true>(dn, f, v, thread);
#pragma unroll
  for (int i = 0; i < 64; ++i) dn[i / 32][i % 32] = 0;
}

// The new g of the lane's two rows, written to `to`. `n`, `g` and `to` are the lane's places in tiles, `inverse` is 1 / rms of
// the rows.
template <class T, int kHalves>
__device__ __forceinline__ void finish_state(float (&dn)[kHalves][32], const FieldParams& f, const float* half_gain, uint32_t n,
                                             uint32_t g, uint32_t to, const float (&inverse)[2]) {
  const int quad = threadIdx.x % 4;
  float along[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < 4 * kHalves; ++k) {
    float* sums = dn[k / 4] + 8 * (k % 4);
    uint32_t state[4];
    load_matrices(state, (n ^ (k % 4 * kColumnStep)) + k / 4 * kTileBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pair factor = *reinterpret_cast<const Pair*>(half_gain + 16 * k + 8 * (i / 2) + 2 * quad);
      float& low = sums[2 * i];
      float& high = sums[2 * i + 1];
      low *= factor.x;
      high *= factor.y;
      along[i % 2] += low * T::low(state[i]);
      along[i % 2] += high * T::high(state[i]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    along[r] = sum_of_four_lanes(along[r]);
    along[r] *= -1.0f / static_cast<float>(f.hidden);
  }
#pragma unroll
  for (int k = 0; k < 4 * kHalves; ++k) {
    const float* sums = dn[k / 4] + 8 * (k % 4);
    uint32_t words[4];
    if (f.residual) {
      uint32_t state[4];
      load_matrices(state, (n ^ (k % 4 * kColumnStep)) + k / 4 * kTileBytes);
      load_matrices(words, (g ^ (k % 4 * kColumnStep)) + k / 4 * kTileBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = T::low(state[i]) * along[i % 2] + sums[2 * i];
        const float high = T::high(state[i]) * along[i % 2] + sums[2 * i + 1];
        words[i] = T::pack(T::low(words[i]) + inverse[i % 2] * low, T::high(words[i]) + inverse[i % 2] * high);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = T::pack(sums[2 * i], sums[2 * i + 1]);
    }
    store_matrices((to ^ (k % 4 * kColumnStep)) + k / 4 * kTileBytes, words);
  }
}

// dn = dy^T W1^T of a tile, or dn += if kAdds: the rows of dy are summed, and the columns of W1. With one half the two tiles of W1
// hold different inner units, as those of dy; with two halves each holds a half of the hidden units.
template <class T, bool kAdds, int kHalves>
__device__ __forceinline__ void state_product(float (&dn)[kHalves][32], uint32_t dy, uint32_t w1) {
  wgmma_fence();
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    float (&sums)[32] = dn[kHalves == 1 ? 0 : tile];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t a = descriptor(dy, (kHalves == 1 ? tile * kTileBytes : 0) + k * kRowStep);
      const uint64_t b = descriptor(w1, tile * kTileBytes + k * kColumnStep);
      const bool adds = kAdds || (kHalves == 1 ? tile + k != 0 : k != 0);
      if (FLOWSEG_PLANTED(transposed)) {
        wgmma_tiles<T, false, false>(sums, a, b, adds);
      } else {
        wgmma_tiles<T, true, false>(sums, a, b, adds);
      }
    }
  }
  wgmma_commit();
}

template <class T, class Shared>
__device__ __forceinline__ void propagate_state(Shared& s, const FieldParams& f) {
  constexpr int kHalves = Shared::kHalves;
  const int thread = threadIdx.x % kGroupThreads, lane = thread % 32, warp = thread / 32;
  const uint32_t place = row_place(warp, lane);
  Turn<kStages> stage;
  Turn<Shared::kRing> turn;
  Turn<2> product;
  Turn<1> written;
#pragma unroll 1
  for (Visit<kHalves> v(f); v.exists(f); v.next(f), turn.advance(), product.advance()) {
    const uint32_t w1 = descriptor_low(shared_address(s.weights[stage.index]));
    const uint32_t dy = descriptor_low(shared_address(s.dy[product.index]));
    const int row = v.tile * kTile + 16 * warp + lane / 4;
    float inverse[2] = {0, 0};  // rows beyond the patch stay zero
    if (f.residual) {
      const float* from = f.inverse_rms + (int64_t{v.local} * (f.depth + 1) + v.level) * f.tiles() * kTile + row;
      if (row < f.pixels()) inverse[0] = from[0];
      if (row + 8 < f.pixels()) inverse[1] = from[8];
    }
    float dn[kHalves][32];
    if constexpr (kHalves == 2) start_sums(dn, f, v, thread);
    if (v.tile == 0) s.weights_ready[stage.index].wait(stage.parity);
    s.tile_full[turn.index].wait(turn.parity);
    s.dy_full[product.index].wait(product.parity);
    state_product<T, kHalves == 2>(dn, dy, w1);
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kHalves; ++i) settle(dn[i]);
    arrive_as_warp(s.dy_empty[product.index]);
    bool complete;
    if constexpr (kHalves == 1) {
      complete = f.slices<1>() == 1 || add_slices(dn[0], f, v, thread);
    } else {
      complete = v.in_last_slice(f);
      if (!complete) copy_slices<false>(dn, f, v, thread);
    }
    if (complete) {
      s.new_g_empty.wait(written.parity ^ 1);
      written.advance();
      finish_state<T>(dn, f, s.factors[stage.index].half_gain, shared_address(s.tiles[turn.index][0]) + place,
                      shared_address(s.tiles[turn.index][1]) + place, shared_address(s.new_g) + place, inverse);
      fence_async();
      arrive_as_warp(s.new_g_full);
    }
    arrive_as_warp(s.tile_empty[turn.index]);
    if (v.ends_step(f)) {
      arrive_as_warp(s.weights_empty[stage.index]);
      stage.advance();
    }
  }
}

// ---- The inner groups

// Sums over the 16 rows of a warp: column[2 j + b] is the lane's sum for column 8 j + 2 (lane % 4) + b. The lane gets the sums of
// columns 2 lane and 2 lane + 1.
__device__ __forceinline__ Pair sum_columns(float (&column)[16]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int round = 0; round < 3; ++round) {
    const int step = 16 >> round, kept = 8 >> round;
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= kept) continue;
      const float sent = upper ? column[i] : column[i + kept], own = upper ? column[i + kept] : column[i];
      column[i] = own + __shfl_xor_sync(kAllLanes, sent, step);
    }
  }
  return {column[0], column[1]};
}

// A barrier of an inner group's threads.
__device__ __forceinline__ void join_group(int group) {
  if (group == 0) {
    named_barrier<2, kGroupThreads>();
  } else {
    named_barrier<3, kGroupThreads>();
  }
}

// u = SiLU(2 y), packed, and the derivative dy / du in the place of y.
template <class T, bool kTanh, int N>
__device__ __forceinline__ void activate(float (&y)[N], uint32_t (&u)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    float out[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float t;
      float& slope = y[2 * i + b];
      silu_and_tanh<kTanh>(y[2 * i + b], out[b], t);
      slope = out[b] * (1 - t) + t;
    }
    u[i] = T::pack(out[0], out[1]);
  }
}

// dy, packed, from du and what `activate` has left.
template <class T, int N>
__device__ __forceinline__ void gradient_of_y(const float (&du)[N], const float (&slope)[N], uint32_t (&dy)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    dy[i] = T::pack(in_range<T>(du[2 * i] * slope[2 * i] + du[2 * i]),
                    in_range<T>(du[2 * i + 1] * slope[2 * i + 1] + du[2 * i + 1]));
  }
}

// The operand of y: W1 by columns, times half of the gains. The arguments are the lane's places.
template <class T>
__device__ __forceinline__ void load_operand_of_y(uint32_t* to, uint32_t w1, const float* half_gain) {
  uint32_t (&words)[16] = *reinterpret_cast<uint32_t (*)[16]>(to);
  load_columns(words, w1);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const Pair factor = *reinterpret_cast<const Pair*>(half_gain + 8 * j);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t& word = words[2 * j + r];
      word = T::pack(T::low(word) * factor.x, T::high(word) * factor.y);
    }
  }
}

// Turns G into Q. `column` becomes the lane's sums of G W1 for sum_columns, `along` those of Q W1 over a tile's hidden units.
template <class T>
__device__ __forceinline__ void weigh_w1(float (&g_sum)[32], const uint32_t (&w1)[16], const float* half_gain,
                                         float (&column)[16], float (&along)[2]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const Pair factor = *reinterpret_cast<const Pair*>(half_gain + 8 * j);
    column[2 * j] = column[2 * j + 1] = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float low = T::low(w1[2 * j + r]), high = T::high(w1[2 * j + r]);
      float& g_low = g_sum[4 * j + 2 * r];
      float& g_high = g_sum[4 * j + 2 * r + 1];
      column[2 * j] += g_low * low;
      column[2 * j + 1] += g_high * high;
      g_low *= factor.x;
      g_high *= factor.y;
      along[r] += g_low * low;
      along[r] += g_high * high;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    along[r] = sum_of_four_lanes(along[r]);
  }
}

// The gradient of W1 from Q, packed.
template <class T>
__device__ __forceinline__ void gradient_of_w1(const float (&q)[32], const uint32_t (&w1)[16], const float (&along)[2],
                                               const float (&inverse)[2], uint32_t (&grad)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float low = q[2 * i] - T::low(w1[i]) * along[i % 2], high = q[2 * i + 1] - T::high(w1[i]) * along[i % 2];
    grad[i] = T::pack(inverse[i % 2] * low, inverse[i % 2] * high);
  }
}

// The warp's sums of D W2.
template <class T>
__device__ __forceinline__ void sum_w2(const float (&d_sum)[32], const uint32_t (&w2)[16], float* column_sums) {
  float column[16];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    column[2 * j] = d_sum[4 * j] * T::low(w2[2 * j]) + d_sum[4 * j + 2] * T::low(w2[2 * j + 1]);
    column[2 * j + 1] = d_sum[4 * j + 1] * T::high(w2[2 * j]) + d_sum[4 * j + 3] * T::high(w2[2 * j + 1]);
  }
  reinterpret_cast<Pair*>(column_sums)[threadIdx.x % 32] = sum_columns(column);
}

// A step's work of an inner group.
template <class T, bool kTanh>
struct InnerStep {
  Shared& s;
  const FieldParams& f;
  int half, thread;
  uint32_t place;        // row_place
  uint32_t place_of_w1;  // column_place, in W1 and its gradient
  Turn<kStages> stage;
  Turn<Shared::kRing> turn;
  Turn<2> product;

  __device__ __forceinline__ uint32_t weights() const { return shared_address(s.weights[stage.index]) + half * kTileBytes; }
  __device__ __forceinline__ void give_tile_back(int index) const { arrive_as_warp(s.tile_empty[index]); }

  // Starts y and du of a tile, as two groups of products.
  __device__ __forceinline__ void start(float (&y)[32], float (&du)[32], const uint32_t (&w1)[16], uint32_t n, uint32_t g) const {
    const uint32_t w2 = descriptor_low(weights() + 2 * kTileBytes);
    wgmma_fence();
    wgmma_first<T, false>(y, w1, descriptor(n));
#pragma unroll
    for (int k = 1; k < 4; ++k) wgmma<T, false>(y, w1 + 4 * k, descriptor(n, k * kColumnStep));
    wgmma_commit();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma_tiles<T, false, false>(du, descriptor(w2, k * kColumnStep), descriptor(g, k * kColumnStep), k != 0);
    }
    wgmma_commit();
  }

  // Starts sum += v tile, where the tile's rows, and the columns of v, are pixels.
  __device__ __forceinline__ void start_gradient(float (&sum)[32], const uint32_t (&v)[16], uint32_t tile) const {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<T, true>(sum, v + 4 * k, descriptor(tile, k * kRowStep));
    wgmma_commit();
  }

  // A visit. Its last products may still run when it ends.
  __device__ __forceinline__ void visit(float (&g_sum)[32], float (&d_sum)[32], const uint32_t (&w1)[16], bool first) {
    float y[32], du[32];
    uint32_t u[16], dy[16];
    const uint32_t n = descriptor_low(shared_address(s.tiles[turn.index][0]));
    const uint32_t g = descriptor_low(shared_address(s.tiles[turn.index][1]));
    s.tile_full[turn.index].wait(turn.parity);
    start(y, du, w1, n, g);
    wgmma_wait<1>();
    settle(y);
    if (!first) give_tile_back(turn.previous());
    activate<T, kTanh>(y, u);
    settle(y);
    settle(u);
    start_gradient(d_sum, u, g);
    s.dy_empty[product.index].wait(product.parity ^ 1);  // this loop also keeps ptxas from waiting for du before the tanh
    if (!FLOWSEG_PLANTED(wait_group)) wgmma_wait<1>();  // D goes on
    settle(du);
    gradient_of_y<T>(du, y, dy);
    store_rows(shared_address(s.dy[product.index][half]) + place, dy);
    if (!FLOWSEG_PLANTED(proxy_fence)) fence_async();
    arrive_as_warp(s.dy_full[product.index]);
    start_gradient(g_sum, dy, n);
    product.advance();
    turn.advance();
  }

  // Turns G into the gradient of W1, packed, and writes the warp's sums of G W1.
  __device__ __forceinline__ void finish_w1(float (&g_sum)[32], uint32_t (&grad)[16], float* column_sums) const {
    const Factors<1>& factors = s.factors[stage.index];
    const int lane = thread % 32, unit = half * kTile + thread / 32 * 16 + lane / 4;
    uint32_t w1[16];
    float column[16], along[2] = {0, 0};
    load_columns(w1, weights() + place_of_w1);
    weigh_w1<T>(g_sum, w1, factors.half_gain + 2 * (lane % 4), column, along);
    const float inverse[2] = {factors.inverse1[unit], factors.inverse1[unit + 8]};
    gradient_of_w1<T>(g_sum, w1, along, inverse, grad);
    if (f.residual) reinterpret_cast<Pair*>(column_sums)[lane] = sum_columns(column);
  }

  // Adds up the warps' sums. The first 64 threads of each group take D W2; the others of the first group take G W1. The first
  // group also stores what later kernels need of them.
  __device__ __forceinline__ void finish_sums(const Visit<1>& v, const float (&column_sums)[2][kInnerWarps][kTile]) const {
    const int column = thread % kTile;
    const bool of_w2 = thread < kTile;
    if (of_w2) s.along2[half][column] = 0;
    if (of_w2 ? !f.both : !f.residual || half != 0) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kInnerWarps; ++w) sum += column_sums[of_w2][w][column];
    if (of_w2 && f.slices<1>() == 1) s.along2[half][column] = sum;
    if (half != 0) return;
    if (v.slice > 0) sum += s.slice_sums[of_w2][column];
    s.slice_sums[of_w2][column] = sum;
    if (!v.in_last_slice(f)) return;
    if (!of_w2) {
      f.gain_sums[((f.first + v.local) * f.depth + v.level) * kTile + column] = 0.5f * sum;
    } else if (f.slices<1>() > 1) {
      // `project` takes the sums with W2 as it was generated.
      f.along2[(int64_t{v.local} * f.depth + v.level) * kTile + column] = sum / s.factors[stage.index].inverse2[column];
    }
  }

  // Turns D into the gradient of W2, packed. If W2 has several slices, what comes from its columns' lengths is left to `project`.
  __device__ __forceinline__ void finish_w2(const float (&d_sum)[32], const uint32_t (&w2)[16], uint32_t (&grad)[16]) const {
    const float* inverse2 = s.factors[stage.index].inverse2 + 2 * (thread % 4);
    const float* along2 = s.along2[half] + 2 * (thread % 4);
    const bool clamped = !T::kIsBFloat && f.slices<1>() > 1;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const Pair inverse = *reinterpret_cast<const Pair*>(inverse2 + 8 * j);
      const Pair along = *reinterpret_cast<const Pair*>(along2 + 8 * j);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t word = w2[2 * j + r];
        float low = inverse.x * (d_sum[4 * j + 2 * r] - T::low(word) * along.x);
        float high = inverse.y * (d_sum[4 * j + 2 * r + 1] - T::high(word) * along.y);
        if (clamped) {
          low = in_range<T>(low);
          high = in_range<T>(high);
        }
        grad[2 * j + r] = T::pack(low, high);
      }
    }
  }

  // The gradients of the step's weights, from the complete sums over pixels.
  __device__ __forceinline__ void finish(float (&g_sum)[32], float (&d_sum)[32], const Visit<1>& v) const {
    float (&column_sums)[2][kInnerWarps][kTile] = s.column_sums[stage.index];
    const int warp = half * kGroupWarps + thread / 32;
    const uint32_t w2_tile = weights() + 2 * kTileBytes, w1_tile = shared_address(s.grad_w1[half]);
    uint32_t grad[16], w2[16];
    finish_w1(g_sum, grad, column_sums[0][warp]);
    load_rows(w2, w2_tile + place);
    if (f.both) sum_w2<T>(d_sum, w2, column_sums[1][warp]);
    // From here on all products have read their operands, and the earlier gradients of W1 have left shared memory.
    named_barrier<1, 2 * kGroupThreads>();
    store_columns(w1_tile + place_of_w1, grad);
    finish_sums(v, column_sums);
    join_group(half);
    finish_w2(d_sum, w2, grad);
    store_rows(w2_tile + place, grad);
    fence_async();
    join_group(half);
    if (thread == 0) {
      const int matrix = (static_cast<int>(f.first) + v.local) * f.depth + v.level, inner = v.slice * kSlice + half * kTile;
      store_tile(f.grad_w1, w1_tile, inner, 0, matrix);
      store_tile(f.grad_w2, w2_tile, 0, inner, matrix);
      commit_copies();
    }
  }
};

template <class T, bool kTanh>
__device__ __forceinline__ void differentiate_weights(Shared& s, const FieldParams& f, int half) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread % 32, warp = thread / 32;
  InnerStep<T, kTanh> step{.s = s, .f = f, .half = half, .thread = thread, .place = row_place(warp, lane),
                           .place_of_w1 = column_place(warp, lane), .stage = {}, .turn = {}, .product = {}};
  bool stores = false;  // whether gradients of the step before have been stored
#pragma unroll 1
  for (Visit<1> v(f); v.exists(f); v.next_step(f)) {
    uint32_t w1[16];
    float g_sum[32] = {}, d_sum[32] = {};
    s.weights_ready[step.stage.index].wait(step.stage.parity);
    load_operand_of_y<T>(w1, step.weights() + step.place_of_w1, s.factors[step.stage.index].half_gain + 2 * (lane % 4));
#pragma unroll 1
    for (v.tile = 0; v.tile < f.tiles(); ++v.tile) {
      step.visit(g_sum, d_sum, w1, v.tile == 0);
      if (v.tile == 0 && stores && thread == 0) {
        wait_for_reads<0>();
        s.weights_empty[step.stage.previous()].arrive();
      }
    }
    wgmma_wait<0>();
    settle(g_sum);
    settle(d_sum);
    step.give_tile_back(step.turn.previous());
    step.finish(g_sum, d_sum, v);
    step.stage.advance();
    stores = true;
  }
  if (thread == 0) wait_for_copies<0>();
}

}  // namespace flowseg::cuda::backward
