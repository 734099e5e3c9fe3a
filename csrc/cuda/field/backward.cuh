// The backward of the neural field's blocks on Hopper: from the gradient of the state after the last block to the gradient of the
// state before the first, with the gradients of the generated weights and, by patch, of the gains.
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
// Registers per thread of the loader, the state group and the inner groups. 512 in all: 65,536 registers.
constexpr int kLoaderRegisters = 32, kStateRegisters = 64, kInnerRegisters = 208;
constexpr int kStages = 2;
constexpr int kRing = 5;
constexpr int kScalingThreads = 64;  // two warps
constexpr int kInnerWarps = 2 * kGroupWarps;

struct alignas(8) Pair {
  float x, y;
};

// Factors of the weights of a step: reciprocal column lengths, half of the gains.
struct alignas(16) Factors {
  float inverse1[kSlice], inverse2[kTile];
  float half_gain[kTile];
};

struct Shared {
  char weights[kStages][kStageBytes];    // as kSlice says; the place of W2 takes its gradient at the end of a step
  char tiles[kRing][2][kTileBytes];      // n, g
  char dy[2][2][kTileBytes];             // rows: an inner group's units, columns: pixels
  char grad_w1[2][kTileBytes];           // rows: hidden, columns: an inner group's units
  char new_g[kTileBytes];
  Factors factors[kStages];
  float column_sums[2][2][kInnerWarps][kTile];  // [step % 2]: sums of G W1 and D W2 over a warp's inner units
  float slice_sums[2][kTile];                   // the same over slices
  float along2[2][kTile];                       // the sums of D W2, one copy for each inner group
  Barrier weights_full[kStages], weights_ready[kStages], weights_empty[kStages];
  Barrier tile_full[kRing], tile_empty[kRing], dy_full[2], dy_empty[2], new_g_full, new_g_empty;

  __device__ __forceinline__ void init_barriers() {
    for (int i = 0; i < kStages; ++i) {
      weights_full[i].init(1);
      weights_ready[i].init(kScalingThreads / 32);
      weights_empty[i].init(2 + kGroupWarps);
    }
    for (int i = 0; i < kRing; ++i) {
      tile_full[i].init(2);
      tile_empty[i].init(kInnerWarps + kGroupWarps);
    }
    for (int i = 0; i < 2; ++i) {
      dy_full[i].init(kInnerWarps);
      dy_empty[i].init(kGroupWarps);
    }
    new_g_full.init(kGroupWarps);
    new_g_empty.init(1);
    fence_barrier_init();
  }
};
constexpr int kSharedBytes = sizeof(Shared) + 1024;

// A visit of this thread block, in the order in which all groups take them.
struct Visit {
  int local, level, slice = 0, tile = 0;

  __device__ __forceinline__ explicit Visit(const FieldParams& f) : local(static_cast<int>(blockIdx.x)), level(f.depth - 1) {}
  __device__ __forceinline__ bool exists(const FieldParams& f) const { return local < f.count; }
  __device__ __forceinline__ bool ends_step(const FieldParams& f) const { return tile + 1 == f.tiles(); }
  __device__ __forceinline__ bool in_last_slice(const FieldParams& f) const { return slice + 1 == f.slices(); }
  __device__ __forceinline__ void next_step(const FieldParams& f) {
    tile = 0;
    if (++slice < f.slices()) return;
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
__device__ __forceinline__ void load_states(Shared& s, const FieldParams& f) {
  Turn<kRing> turn;
  for (Visit v(f); v.exists(f); v.next(f), turn.advance()) {
    Barrier& full = s.tile_full[turn.index];
    if (!FLOWSEG_PLANTED(early_load)) s.tile_empty[turn.index].wait(turn.parity ^ 1);
    full.arrive_and_expect(kTileBytes);
    const char* from = state_of(f, v.local, v.level) + int64_t{v.tile} * kTileBytes;
    load_bytes(shared_address(s.tiles[turn.index][0]), from, full, kTileBytes);
  }
}

// One thread: loads g of each visit, and stores the new g of an earlier one.
__device__ __forceinline__ void move_gradients(Shared& s, const FieldParams& f) {
  const int ahead = f.tiles() - 1 < kRing - 2 ? f.tiles() - 1 : kRing - 2;
  const auto place = [&](const Visit& v) { return state_of(f, v.local, f.depth) + int64_t{v.tile} * kTileBytes; };
  Visit loaded(f), stored(f);
  Turn<kRing> turn;
  Turn<1> written;
  int between = 0;  // visits that have been loaded and not stored
  while (stored.exists(f)) {
    if (between <= ahead && loaded.exists(f)) {
      Barrier& full = s.tile_full[turn.index];
      s.tile_empty[turn.index].wait(turn.parity ^ 1);
      full.arrive_and_expect(kTileBytes);
      load_bytes(shared_address(s.tiles[turn.index][1]), place(loaded), full, kTileBytes);
      loaded.next(f);
      turn.advance();
      ++between;
      continue;
    }
    if (stored.in_last_slice(f)) {
      s.new_g_full.wait(written.parity);
      written.advance();
      store_bytes(place(stored), shared_address(s.new_g), kTileBytes);
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

// Gives the columns of a step's weights length 1. A thread has 8 columns of each weight and every fourth or eighth row. Lengths
// beyond the weights' ends may hold anything.
template <class T>
__device__ __forceinline__ void scale_weights(char* weights, const Factors& factors, const FieldParams& f, int slice,
                                              uint32_t thread) {
  const uint32_t column1 = thread % 16 * 8, column2 = thread % 8 * 8;
  const auto eight = [](const float* from, bool exist, float (&factor)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) factor[i] = exist ? from[i] : 0.0f;
  };
  float factor[8];
  eight(factors.inverse1 + column1, slice * kSlice + static_cast<int>(column1) < f.inner, factor);
  char* w1 = weights + column1 / kTile * kTileBytes;
#pragma unroll 1
  for (uint32_t row = thread / 16; row < 8; row += kScalingThreads / 16) {
    scale_rows<T>(w1 + tile_offset(row, column1 % kTile), kTile, factor);
  }
  if (!f.both) return;
  eight(factors.inverse2 + column2, static_cast<int>(column2) < f.hidden, factor);
  scale_rows<T>(weights + 2 * kTileBytes + tile_offset(thread / 8, column2), kSlice, factor);
}

// Two warps: the weights of each step.
template <class T>
__device__ __forceinline__ void load_weights(Shared& s, const FieldParams& f, int thread) {
  const auto* gains = static_cast<const typename T::Element*>(f.gains);
  Turn<kStages> stage;
  for (Visit v(f); v.exists(f); v.next_step(f), stage.advance()) {
    Barrier& full = s.weights_full[stage.index];
    Factors& factors = s.factors[stage.index];
    char* weights = s.weights[stage.index];
    if (thread == 0) {
      const int matrix = (static_cast<int>(f.first) + v.local) * f.depth + v.level, inner = v.slice * kSlice;
      const float* lengths = f.inverse_lengths + (int64_t{v.local} * f.depth + v.level) * (f.padded_inner() + kTile);
      const uint32_t to = shared_address(weights);
      s.weights_empty[stage.index].wait(stage.parity ^ 1);
      full.arrive_and_expect(kStageBytes + int(sizeof(factors.inverse1) + sizeof(factors.inverse2)));
      load_tile(to, f.w1, full, inner, 0, matrix);
      load_tile(to + kTileBytes, f.w1, full, inner + kTile, 0, matrix);
      load_tile(to + 2 * kTileBytes, f.w2, full, 0, inner, matrix);
      load_tile(to + 3 * kTileBytes, f.w2, full, 0, inner + kTile, matrix);
      load_bytes(shared_address(factors.inverse1), lengths + inner, full, sizeof(factors.inverse1));
      load_bytes(shared_address(factors.inverse2), lengths + f.padded_inner(), full, sizeof(factors.inverse2));
    }
    float gain = thread < f.hidden ? 1.0f : 0.0f;
    if (f.residual && thread < f.hidden) gain = widen(gains[v.level * f.hidden + thread]);
    full.wait(stage.parity);
    factors.half_gain[thread] = 0.5f * gain;
    if (!f.both) factors.inverse2[thread] = 1;
    uint32_t own[1] = {static_cast<uint32_t>(thread)};
    settle(own);  // so that the compiler does not hold addresses from step to step: that would take too many registers
    scale_weights<T>(weights, factors, f, v.slice, own[0]);
    fence_async();
    arrive_as_warp(s.weights_ready[stage.index]);
  }
}

// ---- The state group

// Adds the sums of the earlier slices to dn. In the last slice it returns true; otherwise it stores the sums for the next one. A
// thread reads what it has written itself.
__device__ __forceinline__ bool add_slices(float (&dn)[32], const FieldParams& f, const Visit& v, int thread) {
  float* sums = f.dn_sums + (int64_t{blockIdx.x} * f.tiles() + v.tile) * (kTile * kTile) + 4 * thread;
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

// The new g of the lane's two rows, written to `to`. `n`, `g` and `to` are the lane's places in tiles, `inverse` is 1 / rms of
// the rows.
template <class T>
__device__ __forceinline__ void finish_state(float (&dn)[32], const FieldParams& f, const float* half_gain, uint32_t n,
                                             uint32_t g, uint32_t to, const float (&inverse)[2]) {
  const int quad = threadIdx.x % 4;
  float along[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t state[4];
    load_matrices(state, n ^ (k * kColumnStep));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pair factor = *reinterpret_cast<const Pair*>(half_gain + 16 * k + 8 * (i / 2) + 2 * quad);
      float& low = dn[8 * k + 2 * i];
      float& high = dn[8 * k + 2 * i + 1];
      low *= factor.x;
      high *= factor.y;
      along[i % 2] += low * T::low(state[i]);
      along[i % 2] += high * T::high(state[i]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) along[r] += __shfl_xor_sync(kAllLanes, along[r], step);
    along[r] *= -1.0f / static_cast<float>(f.hidden);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t words[4];
    if (f.residual) {
      uint32_t state[4];
      load_matrices(state, n ^ (k * kColumnStep));
      load_matrices(words, g ^ (k * kColumnStep));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = T::low(state[i]) * along[i % 2] + dn[8 * k + 2 * i];
        const float high = T::high(state[i]) * along[i % 2] + dn[8 * k + 2 * i + 1];
        words[i] = T::pack(T::low(words[i]) + inverse[i % 2] * low, T::high(words[i]) + inverse[i % 2] * high);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = T::pack(dn[8 * k + 2 * i], dn[8 * k + 2 * i + 1]);
    }
    store_matrices(to ^ (k * kColumnStep), words);
  }
}

// dn = dy^T W1^T of a tile: the rows of dy are summed, and the columns of W1.
template <class T>
__device__ __forceinline__ void state_product(float (&dn)[32], uint32_t dy, uint32_t w1) {
  wgmma_fence();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t a = descriptor(dy, half * kTileBytes + k * kRowStep);
      const uint64_t b = descriptor(w1, half * kTileBytes + k * kColumnStep);
      if (FLOWSEG_PLANTED(transposed)) {
        wgmma_tiles<T, false, false>(dn, a, b, half + k != 0);
      } else {
        wgmma_tiles<T, true, false>(dn, a, b, half + k != 0);
      }
    }
  }
  wgmma_commit();
}

template <class T>
__device__ __forceinline__ void propagate_state(Shared& s, const FieldParams& f) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread % 32, warp = thread / 32;
  const uint32_t place = row_place(warp, lane);
  Turn<kStages> stage;
  Turn<kRing> turn;
  Turn<2> product;
  Turn<1> written;
#pragma unroll 1
  for (Visit v(f); v.exists(f); v.next(f), turn.advance(), product.advance()) {
    const uint32_t w1 = descriptor_low(shared_address(s.weights[stage.index]));
    const uint32_t dy = descriptor_low(shared_address(s.dy[product.index]));
    const int row = v.tile * kTile + 16 * warp + lane / 4;
    float inverse[2] = {0, 0};  // rows beyond the patch stay zero
    if (f.residual) {
      const float* from = f.inverse_rms + (int64_t{v.local} * (f.depth + 1) + v.level) * f.tiles() * kTile + row;
      if (row < f.pixels()) inverse[0] = from[0];
      if (row + 8 < f.pixels()) inverse[1] = from[8];
    }
    if (v.tile == 0) s.weights_ready[stage.index].wait(stage.parity);
    s.tile_full[turn.index].wait(turn.parity);
    s.dy_full[product.index].wait(product.parity);
    float dn[32];
    state_product<T>(dn, dy, w1);
    wgmma_wait<0>();
    settle(dn);
    arrive_as_warp(s.dy_empty[product.index]);
    if (f.slices() == 1 || add_slices(dn, f, v, thread)) {
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

// A step's work of an inner group.
template <class T, bool kTanh>
struct InnerStep {
  Shared& s;
  const FieldParams& f;
  int half, thread;
  uint32_t place;        // row_place
  uint32_t place_of_w1;  // column_place, in W1 and its gradient
  Turn<kStages> stage;
  Turn<kRing> turn;
  Turn<2> product;

  __device__ __forceinline__ uint32_t weights() const { return shared_address(s.weights[stage.index]) + half * kTileBytes; }
  __device__ __forceinline__ void join() const {  // of the group's threads
    if (half == 0) {
      named_barrier<2, kGroupThreads>();
    } else {
      named_barrier<3, kGroupThreads>();
    }
  }
  __device__ __forceinline__ void give_tile_back(int index) const { arrive_as_warp(s.tile_empty[index]); }

  // The operand of y: W1 by columns, times half of the gains.
  __device__ __forceinline__ void load_operand(uint32_t (&w1)[16]) const {
    load_columns(w1, weights() + place_of_w1);
    const float* half_gain = s.factors[stage.index].half_gain + 2 * (thread % 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const Pair factor = *reinterpret_cast<const Pair*>(half_gain + 8 * j);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t& word = w1[2 * j + r];
        word = T::pack(T::low(word) * factor.x, T::high(word) * factor.y);
      }
    }
  }

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
#pragma unroll
    for (int i = 0; i < 16; ++i) {
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
    settle(y);
    settle(u);
    start_gradient(d_sum, u, g);
    s.dy_empty[product.index].wait(product.parity ^ 1);  // this loop also keeps ptxas from waiting for du before the tanh
    if (!FLOWSEG_PLANTED(wait_group)) wgmma_wait<1>();  // D goes on
    settle(du);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      dy[i] = T::pack(in_range<T>(du[2 * i] * y[2 * i] + du[2 * i]), in_range<T>(du[2 * i + 1] * y[2 * i + 1] + du[2 * i + 1]));
    }
    store_rows(shared_address(s.dy[product.index][half]) + place, dy);
    if (!FLOWSEG_PLANTED(proxy_fence)) fence_async();
    arrive_as_warp(s.dy_full[product.index]);
    start_gradient(g_sum, dy, n);
    product.advance();
    turn.advance();
  }

  // Turns G into the gradient of W1, packed, and writes the warp's sums of G W1.
  __device__ __forceinline__ void finish_w1(float (&g_sum)[32], uint32_t (&grad)[16], float* column_sums) const {
    const Factors& factors = s.factors[stage.index];
    const int lane = thread % 32, unit = half * kTile + thread / 32 * 16 + lane / 4;
    const float* half_gain = factors.half_gain + 2 * (lane % 4);
    uint32_t w1[16];
    float column[16], along[2] = {0, 0};
    load_columns(w1, weights() + place_of_w1);
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
#pragma unroll
      for (int step = 1; step < 4; step *= 2) along[r] += __shfl_xor_sync(kAllLanes, along[r], step);
    }
    const float inverse[2] = {factors.inverse1[unit], factors.inverse1[unit + 8]};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float low = g_sum[2 * i] - T::low(w1[i]) * along[i % 2], high = g_sum[2 * i + 1] - T::high(w1[i]) * along[i % 2];
      grad[i] = T::pack(inverse[i % 2] * low, inverse[i % 2] * high);
    }
    if (f.residual) reinterpret_cast<Pair*>(column_sums)[lane] = sum_columns(column);
  }

  // The warp's sums of D W2.
  __device__ __forceinline__ void sum_w2(const float (&d_sum)[32], const uint32_t (&w2)[16], float* column_sums) const {
    float column[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      column[2 * j] = d_sum[4 * j] * T::low(w2[2 * j]) + d_sum[4 * j + 2] * T::low(w2[2 * j + 1]);
      column[2 * j + 1] = d_sum[4 * j + 1] * T::high(w2[2 * j]) + d_sum[4 * j + 3] * T::high(w2[2 * j + 1]);
    }
    reinterpret_cast<Pair*>(column_sums)[thread % 32] = sum_columns(column);
  }

  // Adds up the warps' sums. The first 64 threads of each group take D W2; the others of the first group take G W1. The first
  // group also stores what later kernels need of them.
  __device__ __forceinline__ void finish_sums(const Visit& v, const float (&column_sums)[2][kInnerWarps][kTile]) const {
    const int column = thread % kTile;
    const bool of_w2 = thread < kTile;
    if (of_w2) s.along2[half][column] = 0;
    if (of_w2 ? !f.both : !f.residual || half != 0) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kInnerWarps; ++w) sum += column_sums[of_w2][w][column];
    if (of_w2 && f.slices() == 1) s.along2[half][column] = sum;
    if (half != 0) return;
    if (v.slice > 0) sum += s.slice_sums[of_w2][column];
    s.slice_sums[of_w2][column] = sum;
    if (!v.in_last_slice(f)) return;
    if (!of_w2) {
      f.gain_sums[((f.first + v.local) * f.depth + v.level) * kTile + column] = 0.5f * sum;
    } else if (f.slices() > 1) {
      // `project` takes the sums with W2 as it was generated.
      f.along2[(int64_t{v.local} * f.depth + v.level) * kTile + column] = sum / s.factors[stage.index].inverse2[column];
    }
  }

  // Turns D into the gradient of W2, packed. If W2 has several slices, what comes from its columns' lengths is left to `project`.
  __device__ __forceinline__ void finish_w2(const float (&d_sum)[32], const uint32_t (&w2)[16], uint32_t (&grad)[16]) const {
    const float* inverse2 = s.factors[stage.index].inverse2 + 2 * (thread % 4);
    const float* along2 = s.along2[half] + 2 * (thread % 4);
    const bool clamped = !T::kIsBFloat && f.slices() > 1;
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
  __device__ __forceinline__ void finish(float (&g_sum)[32], float (&d_sum)[32], const Visit& v) const {
    float (&column_sums)[2][kInnerWarps][kTile] = s.column_sums[stage.index];
    const int warp = half * kGroupWarps + thread / 32;
    const uint32_t w2_tile = weights() + 2 * kTileBytes, w1_tile = shared_address(s.grad_w1[half]);
    uint32_t grad[16], w2[16];
    finish_w1(g_sum, grad, column_sums[0][warp]);
    load_rows(w2, w2_tile + place);
    if (f.both) sum_w2(d_sum, w2, column_sums[1][warp]);
    // From here on all products have read their operands, and the earlier gradients of W1 have left shared memory.
    named_barrier<1, 2 * kGroupThreads>();
    store_columns(w1_tile + place_of_w1, grad);
    finish_sums(v, column_sums);
    join();
    finish_w2(d_sum, w2, grad);
    store_rows(w2_tile + place, grad);
    fence_async();
    join();
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
  for (Visit v(f); v.exists(f); v.next_step(f)) {
    uint32_t w1[16];
    float g_sum[32] = {}, d_sum[32] = {};
    s.weights_ready[step.stage.index].wait(step.stage.parity);
    step.load_operand(w1);
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

// ---- The kernel

template <class T, bool kTanh>
__global__ void __launch_bounds__(kThreads, 1) backward_blocks(FLOWSEG_GRID_CONSTANT FieldParams f) {
  FLOWSEG_DYNAMIC_SHARED(char, raw);
  Shared& s = *reinterpret_cast<Shared*>(raw + (-shared_address(raw) & 1023));
  const int group = __shfl_sync(kAllLanes, threadIdx.x / kGroupThreads, 0), warp = threadIdx.x % kGroupThreads / 32;
  if (threadIdx.x == 0) s.init_barriers();
  __syncthreads();
  if (group == 0) {
    give_registers<kLoaderRegisters>();
    if (threadIdx.x == 0) load_states(s, f);
    if (threadIdx.x == 32) move_gradients(s, f);
    if (warp >= 2) load_weights<T>(s, f, threadIdx.x - 64);
  } else if (group == 1) {
    give_registers<kStateRegisters>();
    propagate_state<T>(s, f);
  } else {
    take_registers<kInnerRegisters>();
    differentiate_weights<T, kTanh>(s, f, group - 2);
  }
}

}  // namespace flowseg::cuda::backward

namespace flowseg::cuda {

// Thread blocks of the backward of a round.
template <class Launch>
int64_t backward_block_count(const FieldParams& f, const Launch& launch) {
  return std::min<int64_t>(f.count, launch.device().multiprocessors);
}

// Takes the round's patches back through all blocks. Needs the states of all levels, the gradient of the state in the place of
// level L, inverse lengths and 1 / rms; with several slices also dn_sums, 16 KiB for each tile of each thread block.
template <class Launch>
void launch_backward_blocks(const FieldParams& f, Real type, const Launch& launch) {
  if (f.depth == 0 || f.count == 0) return;
  const auto run = [&](auto kernel) {
    launch.with_threads(backward::kThreads, kernel, backward_block_count(f, launch), backward::kSharedBytes, f);
  };
  if (type == Real::f16) {
    run(backward::backward_blocks<HalfPair, false>);
  } else if (f.residual) {
    run(backward::backward_blocks<BFloatPair, true>);
  } else {
    run(backward::backward_blocks<BFloatPair, false>);
  }
}

}  // namespace flowseg::cuda
