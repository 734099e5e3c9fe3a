// The forward of the neural field on Hopper, and the first pass of its backward, which stores the states of every block instead
// of the output.
//
// A thread block stays on its multiprocessor and takes one item after the other: a patch and a set of four tiles of 64 pixels.
// A set of two halves of hidden units has the pixels of two tiles, and a tile for each half of them. All items of a block have
// the same set, so the set's part of the embedding's table stays in shared memory. An item takes one step for every level and
// slice. A slice is kSlice / kHalves inner units of the level's weights, which one stage of shared memory holds.
//
// Four warp groups share the work:
// - The producer. Its first warp loads the weights of a step by TMA, its second the gains. The other two load an item's pixels of
//   x.
// - The normaliser scales the weights in place: W1[h, j] by gain[h] / (2 |W1[:, j]|), W2[:, h] by 1 / |W2[:, h]|. So the products
//   give y = z / 2 and what is added to h.
// - Two consumers of two tiles each, with two halves of one tile of pixels. Rows of a tile are pixels, columns hidden units. A
//   consumer keeps the states of its tiles in registers, in fp32, from the embedding to the output.
//
// Barriers of a stage. All have one phase for every step that uses the stage:
// - `full`: the weights and the gains are there. The normaliser and the consumers wait for it.
// - `ready`: the weights are scaled. The consumers wait for it.
// - `empty`: every warp of the consumers is done. The producer waits for it before it loads a later step.
// `x_full` and `x_empty` do the same for the pixels, with one phase for every item.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/block.cuh"
#include "cuda/field/fragments.cuh"
#include "cuda/field/params.h"
#include "cuda/hopper/async.cuh"
#include "cuda/hopper/tile.h"
#include "cuda/hopper/wgmma.cuh"

namespace flowseg::cuda::forward {

constexpr int kThreads = 4 * kGroupThreads;
constexpr int kStages = 5;
template <int kHalves>
constexpr int kSetTiles = 4 / kHalves;  // tiles of pixels
template <int kHalves>
constexpr int kSetPixels = kSetTiles<kHalves> * kTile;

// The columns of a thread: 8 j + 2 (lane % 4) and the next, for j < 8. A vector over hidden units in this order, so that a thread
// reads its 16 elements as four times 16 bytes. Padded against conflicts of banks.
struct ByQuad {
  static constexpr int kStride = 20;
  alignas(16) float at[4 * kStride];

  static __device__ __forceinline__ int place(int column) { return column % 8 / 2 * kStride + column / 8 * 2 + column % 2; }
};

// The place of the set's part of a state: tiles, and 1 / rms of their rows.
struct KeptState {
  char* tiles;
  float* inverse_rms;
};
// The same places as state_of gives, as a linear function of the patch and the level: it takes few registers.
struct StatePlaces {
  char *first, *later;                              // of patch 0: level 0, and level 0 if `level` bytes before level 1
  int64_t first_patch, later_patch, level;          // bytes from patch to patch, and from level to level
  float* inverse_rms;
  int rows;

  template <int kHalves>
  __device__ __forceinline__ void fill(const FieldParams& f, int set) {
    const auto state = [&](int local, int level) { return state_of<kHalves>(f, local, level); };
    const int64_t in_patch = int64_t{set} * kSetTiles<kHalves> * kHalves * kTileBytes;
    level = state(0, 2) - state(0, 1);
    first = state(0, 0) + in_patch;
    later = state(0, 1) - level + in_patch;
    first_patch = state(1, 0) - state(0, 0);
    later_patch = state(1, 1) - state(0, 1);
    inverse_rms = f.inverse_rms + set * kSetPixels<kHalves>;
    rows = f.tiles() * kTile;
  }
  // The state before block `at`.
  __device__ __forceinline__ KeptState state(const FieldParams& f, int local, int at) const {
    return {.tiles = at == 0 ? first + local * first_patch : later + local * later_patch + at * level,
            .inverse_rms = inverse_rms + int64_t{local * (f.depth + 1) + at} * rows};
  }
};

template <int kHalves>
struct Shared {
  char weights[kStages][kStageBytes];  // as kSlice says
  char embed[kHalves][16 * kTileRowBytes];       // rows: channels, columns: hidden units; swizzled as a tile
  char out_weight[kHalves][16 * kTileRowBytes];  // the same
  // The table of the set times a power of two, in fp16: accumulators 8 i to 8 i + 7 of thread t of a group in [tile][i][t].
  FourWords table[4][4][kGroupThreads];
  alignas(16) uint16_t x[kSetPixels<kHalves>][kMostChannels];
  uint32_t gains[kStages][kHalves * kTile / 2];  // pairs
  float lengths[kStages][kHalves * kTile];       // reciprocal lengths of W2's columns; only if there are several slices
  StatePlaces states;                  // with kKeep
  KeptState kept[kStages];             // with kKeep: the state with which the step begins
  int places[kSetPixels<kHalves>];     // of the pixels in `out`, from the patch's first one; -1 beyond the patch
  ByQuad out_gain[kHalves];
  float out_bias[kMostChannels];
  unsigned largest;      // bits of the largest magnitude in the table
  float inverse_hidden;  // 1 / Hx
  Barrier full[kStages], ready[kStages], empty[kStages], x_full, x_empty;
};
// Shared memory after Shared, with kKeep: 16 rows of a tile for every warp of the consumers.
constexpr int kWarpRows = 16;
constexpr int kWarpBytes = kWarpRows * kTileRowBytes;
constexpr int kConsumerWarp = 2 * kGroupThreads / 32;  // the first one
template <int kHalves>
constexpr int kStagingAt = (int(sizeof(Shared<kHalves>)) + 127) / 128 * 128;
template <bool kKeep, int kHalves>
constexpr int kSharedBytes = kStagingAt<kHalves> + (kKeep ? 8 * kWarpBytes : 0) + 1024;
static_assert(kSharedBytes<true, 1> <= 227 * 1024 && kSharedBytes<true, 2> <= 227 * 1024);  // what a block may have

// The items of a thread block.
template <int kHalves>
struct Work {
  static constexpr int kGroupTiles = 2 / kHalves;  // tiles of pixels of a consumer
  int set, first, step, count, tiles;  // patches first, first + step, ... below count; tiles of the set that exist

  __device__ __forceinline__ explicit Work(const FieldParams& f) {
    constexpr int kTiles = kSetTiles<kHalves>;
    const int sets = (f.tiles() + kTiles - 1) / kTiles;
    set = static_cast<int>(blockIdx.x) % sets;
    first = static_cast<int>(blockIdx.x) / sets;
    step = static_cast<int>(gridDim.x) / sets;
    count = static_cast<int>(f.count);
    tiles = f.tiles() - set * kTiles < kTiles ? f.tiles() - set * kTiles : kTiles;
  }
  // Consumers with at least one tile. The others end at once.
  __device__ __forceinline__ int groups() const { return (tiles + kGroupTiles - 1) / kGroupTiles; }
  // Calls use(local, level, slice) for each step.
  template <class Use>
  __device__ __forceinline__ void for_each_step(const FieldParams& f, Use use) const {
    const int depth = f.depth, slices = f.slices<kHalves>();
#pragma unroll 1
    for (int local = first; local < count; local += step) {
#pragma unroll 1
      for (int level = 0; level < depth; ++level) {
#pragma unroll 1
        for (int slice = 0; slice < slices; ++slice) use(local, level, slice);
      }
    }
  }
};

// ---- Filling shared memory at the start, by all groups but the producer, which loads meanwhile

constexpr int kFillBarrier = 1;
constexpr int kFillThreads = kThreads - kGroupThreads;

template <class Element>
__device__ __forceinline__ float element(const void* data, int64_t at) {
  return widen(static_cast<const Element*>(data)[at]);
}

// Fills in what the ends need. Weights are zero beyond the hidden units and channels.
template <class T, int kHalves>
__device__ __forceinline__ void fill_ends(Shared<kHalves>& s, const FieldParams& f, int set) {
  using Element = typename T::Element;
  constexpr int kWidth = kTile * kHalves;
  const int channels = static_cast<int>(f.x.channels), features = channels + f.freqs * f.freqs;
  for (int i = threadIdx.x - kGroupThreads; i < kMostChannels * kWidth / 2; i += kFillThreads) {
    const int channel = i / (kWidth / 2), column = i % (kWidth / 2) * 2, half = kHalves == 1 ? 0 : column / kTile;
    const bool exists = channel < channels && column < f.hidden;
    const auto pair = [&](const void* data, int64_t at, int64_t stride) {
      return exists ? T::pack(element<Element>(data, at), element<Element>(data, at + stride)) : 0u;
    };
    const uint32_t at = tile_offset(channel, column - half * kTile);
    *reinterpret_cast<uint32_t*>(s.embed[half] + at) = pair(f.embed, int64_t{column} * features + channel, features);
    *reinterpret_cast<uint32_t*>(s.out_weight[half] + at) = pair(f.out_weight, channel * f.hidden + column, 1);
  }
  for (int i = threadIdx.x - kGroupThreads; i < kSetPixels<kHalves>; i += kFillThreads) {
    const int pixel = set * kSetPixels<kHalves> + i;
    s.places[i] = pixel < f.pixels() ? static_cast<int>(pixel_in_patch(f, f.dense, pixel)) : -1;
  }
  for (int i = threadIdx.x - kGroupThreads; i < kWidth; i += kFillThreads) {
    const int half = kHalves == 1 ? 0 : i / kTile;
    const float gain = i >= f.hidden ? 0.0f : f.residual ? element<Element>(f.out_gain, i) : 1.0f;
    s.out_gain[half].at[ByQuad::place(i - half * kTile)] = gain;
  }
  for (int i = threadIdx.x - kGroupThreads; i < kMostChannels; i += kFillThreads) {
    s.out_bias[i] = i < channels ? element<Element>(f.out_bias, i) : 0.0f;
  }
}

// The factor of the table in shared memory, or its reciprocal. A power of two that brings the largest element to between 2^14 and
// 2^15: the table may hold numbers that fp16 cannot. A table below 2^-63 counts as that large, so that the squares of rows beyond
// the patch (see TableShare) are not zero. Elements down to 2^-91 keep fp16's precision even so.
__device__ __forceinline__ float table_factor(unsigned largest, bool reciprocal) {
  const int exponent = static_cast<int>(largest >> 23);
  const int power = exponent == 255 ? 127 : 268 - (exponent < 64 ? 64 : exponent);
  return same_bits<float>(static_cast<uint32_t>(reciprocal ? 254 - power : power) << 23);
}

// A thread's share of the set's part of the table. All loads are under way before the first is waited for.
template <int kHalves>
struct TableShare {
  static constexpr int kPixels = kSetPixels<kHalves>, kWidth = kTile * kHalves;
  static constexpr int kPieces = (kPixels * kWidth / 4 + kFillThreads - 1) / kFillThreads;
  FourWords pieces[kPieces];  // four floats each

  static __device__ __forceinline__ int number(int i) { return threadIdx.x - kGroupThreads + i * kFillThreads; }
  // Rows beyond the patch are zero here.
  __device__ __forceinline__ void load(const FieldParams& f, int set) {
    const FourWords* from = reinterpret_cast<const FourWords*>(f.table + int64_t{set} * kPixels * kWidth);
    const int rows = f.pixels() - set * kPixels, exist = (rows < kPixels ? rows : kPixels) * (kWidth / 4);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = number(i) < exist ? from[number(i)] : FourWords{};
  }
  // Ends without a barrier.
  __device__ __forceinline__ void store(Shared<kHalves>& s, const FieldParams& f, int set) const {
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < 4 * kPieces; ++i) {
      const unsigned bits = pieces[i / 4].at[i % 4] & 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
    largest = __reduce_max_sync(kAllLanes, largest);
    if (threadIdx.x % 32 == 0) atomicMax(&s.largest, largest);
    named_barrier<kFillBarrier, kFillThreads>();
    const float factor = table_factor(s.largest, false);
#pragma unroll
    for (int i = 0; i < 2 * kPieces; ++i) {
      const int row = number(i / 2) / (kWidth / 4), column = number(i / 2) % (kWidth / 4) * 4 + i % 2 * 2;
      if (row >= kPixels) continue;
      const uint32_t* pair = pieces[i / 2].at + i % 2 * 2;
      float low = same_bits<float>(pair[0]) * factor, high = same_bits<float>(pair[1]) * factor;
      // A row beyond the patch is not zero: its norm would be 0 * inf if eps is 0, and the backward multiplies it by zero.
      if (set * kPixels + row >= f.pixels()) low = high = 16384;
      if (column >= f.hidden) low = high = 0;
      const int thread = row % kTile / 16 * 32 + row % 8 * 4 + column % 8 / 2;
      const int half = kHalves == 1 ? 0 : column / kTile, at = 4 * ((column - half * kTile) / 8) + row % 16 / 8 * 2;
      s.table[row / kTile * kHalves + half][at / 8][thread].at[at % 8 / 2] = HalfPair::pack(low, high);
    }
  }
};

// ---- The producer

// One thread: the four tiles of weights of each step, and the place for the state with which it begins.
template <bool kKeep, int kHalves>
__device__ __forceinline__ void load_weights(Shared<kHalves>& s, const FieldParams& f, const Work<kHalves>& work) {
  Turn<kStages> stage;
  work.for_each_step(f, [&](int local, int level, int slice) {
    Barrier& full = s.full[stage.index];
    s.empty[stage.index].wait(stage.parity ^ 1);
    if (kKeep && slice == 0) s.kept[stage.index] = s.states.state(f, local, level);
    full.arrive_and_expect(kStageBytes);
    load_slice<kHalves>(shared_address(s.weights[stage.index]), f, full, local, level, slice);
    stage.advance();
  });
}

// One warp: the gains of each step's level, and W2's lengths where an earlier kernel has found them.
template <class T, int kHalves>
__device__ __forceinline__ void load_extras(Shared<kHalves>& s, const FieldParams& f, const Work<kHalves>& work) {
  const int lane = threadIdx.x % 32;
  const bool lengths = f.both && f.slices<kHalves>() > 1;
  Turn<kStages> stage;
  work.for_each_step(f, [&](int local, int level, int) {
    s.empty[stage.index].wait(stage.parity ^ 1);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int column = half * kTile + 2 * lane;
      float low = 1, high = 1;
      if (f.residual && column < f.hidden) {
        const int at = level * f.hidden + column;
        low = element<typename T::Element>(f.gains, at);
        high = element<typename T::Element>(f.gains, at + 1);
      }
      s.gains[stage.index][column / 2] = T::pack(low, high);
    }
    if (lengths) {
      const float* from = inverse_lengths_of<kHalves>(f, local, level) + f.padded_inner<kHalves>();
#pragma unroll
      for (int i = lane; i < kTile * kHalves; i += 32) s.lengths[stage.index][i] = from[i];
    }
    s.full[stage.index].arrive();
    stage.advance();
  });
}

// Two warps: the pixels of x of each item. Channels beyond the last stay zero.
template <int kHalves>
__device__ __forceinline__ void load_pixels(Shared<kHalves>& s, const FieldParams& f, const Work<kHalves>& work) {
  const int thread = threadIdx.x % 64, channels = static_cast<int>(f.x.channels);
  int parity = 0;
#pragma unroll 1
  for (int local = work.first; local < work.count; local += work.step) {
    s.x_empty.wait(parity ^ 1);
    parity ^= 1;
#pragma unroll 1
    for (int row = thread; row < work.tiles * kTile; row += 64) {
      const int pixel = work.set * kSetPixels<kHalves> + row;
      const bool exists = pixel < f.pixels();
      const uint16_t* from = static_cast<const uint16_t*>(f.x.data) + (exists ? pixel_of(f, f.x, f.first + local, pixel) : 0);
#pragma unroll 4
      for (int c = 0; c < channels; ++c) s.x[row][c] = exists ? from[c * f.x.stride[1]] : uint16_t{0};
    }
    s.x_full.arrive();
  }
}

// ---- The normaliser

// A warp works on 16 columns of a weight, in blocks of 16 rows. Of a block, a lane's word r[0] holds rows 2 (lane % 4) and the
// next of column lane / 4. r[1] is the same for column lane / 4 + 8; r[2] and r[3] are 8 rows further.
// The weights are read once for the lengths and again for the scaling: they do not fit in the group's registers.

// The sums of squares of the columns lane / 4 and lane / 4 + 8, over 16 kSteps rows.
template <class T, int kSteps>
__device__ __forceinline__ void column_squares(uint32_t at, float& sum0, float& sum1) {
  sum0 = sum1 = 0;
  if constexpr (T::kIsBFloat) {
    // Sums of four squares in bf16, the rest in fp32.
    uint32_t pair0 = 0, pair1 = 0;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t r[4];
      load_matrices_transposed(r, at + k * kRowStep);
      pair0 = k % 2 ? T::multiply_add(r[0], r[0], pair0) : T::multiply(r[0], r[0]);
      pair1 = k % 2 ? T::multiply_add(r[1], r[1], pair1) : T::multiply(r[1], r[1]);
      pair0 = T::multiply_add(r[2], r[2], pair0);
      pair1 = T::multiply_add(r[3], r[3], pair1);
      if (k % 2) {
        sum0 += T::low(pair0);
        sum0 += T::high(pair0);
        sum1 += T::low(pair1);
        sum1 += T::high(pair1);
      }
    }
    sum0 = sum_of_four_lanes(sum0);
    sum1 = sum_of_four_lanes(sum1);
  } else {
    // The diagonals of products of the columns with themselves: fp16's range is too small for squares.
    float d0[4] = {}, d1[4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t r[4];
      load_matrices_transposed(r, at + k * kRowStep);
      mma_16x8x8<T>(d0, r[0], r[1], r[0]);
      mma_16x8x8<T>(d1, r[0], r[1], r[1]);
      mma_16x8x8<T>(d0, r[2], r[3], r[2]);
      mma_16x8x8<T>(d1, r[2], r[3], r[3]);
    }
    const int lane = threadIdx.x % 32, diagonal = (lane & 28) | (lane >> 3);  // the lane that has the element of column lane / 4
    sum0 = __shfl_sync(kAllLanes, lane & 4 ? d0[1] : d0[0], diagonal);
    sum1 = __shfl_sync(kAllLanes, lane & 4 ? d1[3] : d1[2], diagonal);
  }
}

// Scales the columns by factor0 and factor1 and, with kGains, the rows by `gains`.
template <class T, int kSteps, bool kGains>
__device__ __forceinline__ void scale_columns(uint32_t at, float factor0, float factor1, const uint32_t* gains) {
  const int quad = threadIdx.x % 4;
  const float factor[2] = {factor0, factor1};
  uint32_t high[2], low[2];  // bf16 takes a factor as the sum of two numbers
  if constexpr (T::kIsBFloat) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      high[i] = T::pack(factor[i], factor[i]);
      const float rest = factor[i] - T::low(high[i]);
      low[i] = T::pack(rest, rest);
    }
  }
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t r[4], gain[2];
    load_matrices_transposed(r, at + k * kRowStep);
    if constexpr (kGains) {
      gain[0] = gains[8 * k + quad];
      gain[1] = gains[8 * k + 4 + quad];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (T::kIsBFloat) {
        r[i] = T::multiply_add(r[i], high[i % 2], T::multiply(r[i], low[i % 2]));
        if constexpr (kGains) r[i] = T::multiply(r[i], gain[i / 2]);
      } else {
        float first = T::low(r[i]) * factor[i % 2], second = T::high(r[i]) * factor[i % 2];
        if constexpr (kGains) {
          first *= T::low(gain[i / 2]);
          second *= T::high(gain[i / 2]);
        }
        r[i] = T::pack(first, second);
      }
    }
    store_matrices_transposed(at + k * kRowStep, r);
  }
}

__device__ __forceinline__ float reciprocal_length(float squares) { return rsqrtf(squares > 1e-24f ? squares : 1e-24f); }

// The group: scales every step's weights in place. A warp takes 32 of the 128 columns of W1 and 16 of the 64 of W2. With two halves
// W1 has 64 columns and W2 128.
template <class T, bool kKeep, int kHalves>
__device__ __forceinline__ void normalise(Shared<kHalves>& s, const FieldParams& f, const Work<kHalves>& work) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kGroupThreads / 32;
  const bool one_slice = kHalves == 1 && f.slices<kHalves>() == 1, keeps = kKeep && work.set == 0;
  // Bands of 16 columns of a warp, and steps of 16 rows.
  constexpr int kBands1 = 2 / kHalves, kBands2 = kHalves, kSteps1 = 4 * kHalves, kSteps2 = 8 / kHalves;
  Turn<kStages> stage;
  work.for_each_step(f, [&](int local, int level, int slice) {
    const uint32_t weights = shared_address(s.weights[stage.index]);
    float* found = nullptr;  // the lengths of the level, with kKeep
    if constexpr (kKeep) found = inverse_lengths_of<kHalves>(f, local, level);
    const auto keep = [&](int at, float inverse0, float inverse1) {
      if (kKeep && keeps && lane % 4 == 0) {
        found[at + lane / 4] = inverse0;
        found[at + lane / 4 + 8] = inverse1;
      }
    };
    s.full[stage.index].wait(stage.parity);
    float inverse0, inverse1;
#pragma unroll (T::kIsBFloat ? kBands1 : 1)  // fp16 takes more registers
    for (int i = 0; i < kBands1; ++i) {
      const int band = kBands1 * warp + i;
      const uint32_t at = weights + band / 4 * kTileBytes + column_place(band % 4, lane);
      column_squares<T, kSteps1>(at, inverse0, inverse1);
      inverse0 = reciprocal_length(inverse0);
      inverse1 = reciprocal_length(inverse1);
      keep(slice * (kSlice / kHalves) + 16 * band, inverse0, inverse1);
      scale_columns<T, kSteps1, true>(at, 0.5f * inverse0, 0.5f * inverse1, s.gains[stage.index]);
    }
#pragma unroll (T::kIsBFloat ? kBands2 : 1)
    for (int i = 0; i < kBands2; ++i) {
      const int band = kBands2 * warp + i;
      const uint32_t at = weights + (2 + band / 4) * kTileBytes + column_place(band % 4, lane);
      inverse0 = inverse1 = 1;
      if (f.both) {
        if (one_slice) {
          column_squares<T, kSteps2>(at, inverse0, inverse1);
          inverse0 = reciprocal_length(inverse0);
          inverse1 = reciprocal_length(inverse1);
        } else {
          inverse0 = s.lengths[stage.index][16 * band + lane / 4];
          inverse1 = s.lengths[stage.index][16 * band + lane / 4 + 8];
        }
        scale_columns<T, kSteps2, false>(at, inverse0, inverse1, nullptr);
      }
      if (one_slice || !f.both) keep(f.padded_inner<kHalves>() + 16 * band, inverse0, inverse1);
    }
    if (!FLOWSEG_PLANTED(proxy_fence)) fence_async();
    s.ready[stage.index].arrive();
    stage.advance();
  });
}

// ---- The consumers
//
// A tile's state h is the accumulator of a product: of thread t, h[4 j + 2 r + b] is row 16 (t / 32) + t % 32 / 4 + 8 r, column
// 8 j + 2 (t % 4) + b. Packed in pairs it is the A operand of the next product, four words for every 16 columns.

// The lane's first row in a tile; the other one is 8 further.
__device__ __forceinline__ int tile_row() { return threadIdx.x % kGroupThreads / 32 * 16 + threadIdx.x % 32 / 4; }

// The table's part of the state before the first block.
template <int kHalves>
__device__ __forceinline__ void load_table(float (&h)[32], const Shared<kHalves>& s, int tile) {
  const FourWords* from = s.table[tile][0] + threadIdx.x % kGroupThreads;
  const float factor = table_factor(s.largest, true);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const FourWords v = from[i * kGroupThreads];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      h[8 * i + 2 * j] = HalfPair::low(v.at[j]) * factor;
      h[8 * i + 2 * j + 1] = HalfPair::high(v.at[j]) * factor;
    }
  }
}
// The A operand of the other part's product: the warp's 16 pixels and all channels.
template <int kHalves>
__device__ __forceinline__ void load_pixel_rows(uint32_t (&pixels)[4], const Shared<kHalves>& s, int tile) {
  const int lane = threadIdx.x % 32, row = tile * kTile + threadIdx.x % kGroupThreads / 32 * 16 + lane % 16;
  load_matrices(pixels, shared_address(s.x[row]) + lane / 16 * 16);
}

// 1 / rms of the lane's two rows of a state, given its tiles; one in the plain form.
struct TwoRows {
  float at[2];
};
template <int kHalves, class... Tiles>
__device__ __forceinline__ TwoRows inverse_rms(const Shared<kHalves>& s, const FieldParams& f, const Tiles&... tiles) {
  static_assert(sizeof...(Tiles) == kHalves);
  float sum[2][2] = {};
  const auto add = [&](const float (&h)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) sum[i / 2 % 2][i % 2] += h[i] * h[i];
  };
  (add(tiles), ...);
  TwoRows found;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float squares = sum_of_four_lanes(sum[r][0] + sum[r][1]);
    found.at[r] = f.residual ? rsqrtf(squares * s.inverse_hidden + f.eps) : 1.0f;
  }
  return found;
}

// The A operand: the state over its rms.
template <class T>
__device__ __forceinline__ void pack_rows(uint32_t (&e)[16], const float (&h)[32], const TwoRows& by) {
#pragma unroll
  for (int i = 0; i < 16; ++i) e[i] = T::pack(h[2 * i] * by.at[i % 2], h[2 * i + 1] * by.at[i % 2]);
}

// z = n W1 for one tile of W1 and the 64 hidden units of its rows.
template <class T>
__device__ __forceinline__ void first_product(float (&z)[32], const uint32_t (&e)[16], uint32_t weights, int tile) {
  wgmma_first<T, true>(z, e, descriptor(weights, tile * kTileBytes));
#pragma unroll
  for (int k = 1; k < 4; ++k) {
    const uint64_t b = descriptor(weights, tile * kTileBytes + k * kRowStep);
    if (FLOWSEG_PLANTED(transposed)) {
      wgmma<T, false>(z, e + 4 * k, b);
    } else {
      wgmma<T, true>(z, e + 4 * k, b);
    }
  }
  wgmma_commit();
}
// d += a B for one tile B of the weights, or d = a B.
template <class T>
__device__ __forceinline__ void add_product(float (&d)[32], const uint32_t (&a)[16], uint32_t weights, int tile, int accumulate) {
  wgmma<T, true>(d, a, descriptor(weights, tile * kTileBytes), accumulate);
#pragma unroll
  for (int k = 1; k < 4; ++k) wgmma<T, true>(d, a + 4 * k, descriptor(weights, tile * kTileBytes + k * kRowStep));
  wgmma_commit();
}
// h += u W2 for one tile of W2, or h = u W2.
template <class T>
__device__ __forceinline__ void second_product(float (&h)[32], const uint32_t (&u)[16], uint32_t weights, int tile,
                                               int accumulate) {
  add_product<T>(h, u, weights, 2 + tile, accumulate);
}

template <class T, bool kTanh>
__device__ __forceinline__ void activate(uint32_t (&u)[16], const float (&z)[32]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float low, high, t;
    silu_and_tanh<kTanh>(z[2 * i], low, t);
    silu_and_tanh<kTanh>(z[2 * i + 1], high, t);
    u[i] = T::pack(low, high);
  }
}

// Stores one half of a normalised state of a tile of the set, and with the first half its 1 / rms. The copy from the warp's
// staging runs while the warp goes on.
template <int kHalves>
__device__ __forceinline__ void keep_state(const uint32_t (&e)[16], const TwoRows& by, const KeptState& kept, bool residual,
                                           const Shared<kHalves>& s, int tile, int half) {
  const int lane = threadIdx.x % 32, row = tile * kTile + tile_row();
  const uint32_t staging = shared_address(&s) + kStagingAt<kHalves> + (threadIdx.x / 32 - kConsumerWarp) * kWarpBytes;
  if (lane == 0) wait_for_reads<0>();
  __syncwarp();
  store_rows(staging + row_place(0, lane), e);
  fence_async();
  __syncwarp();
  if (lane == 0) {
    const int stored = (tile * kHalves + half) * kTile + tile_row();
    store_bytes(kept.tiles + stored / kWarpRows * kWarpBytes, staging, kWarpBytes);
    commit_copies();
  }
  if (half == 0 && residual && lane % 4 == 0) {
    kept.inverse_rms[row] = by.at[0];
    kept.inverse_rms[row + 8] = by.at[1];
  }
}

// The A operand of the output's product, for one half of the hidden units.
template <class T, int kHalves>
__device__ __forceinline__ void pack_last_rows(uint32_t (&e)[16], const float (&h)[32], const TwoRows& by,
                                               const Shared<kHalves>& s, int half) {
  const float* gain = s.out_gain[half].at + threadIdx.x % 4 * ByQuad::kStride;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    e[i] = T::pack(h[2 * i] * by.at[i % 2] * gain[i / 2 * 2], h[2 * i + 1] * by.at[i % 2] * gain[i / 2 * 2 + 1]);
  }
}

// Writes the output of a tile of the set. `v` is a product without the bias: pixels by channels, as a state's accumulators.
template <class T, int kHalves>
__device__ __forceinline__ void write_output(const float (&v)[8], const Shared<kHalves>& s, const FieldParams& f, int local,
                                             int tile) {
  using Element = typename T::Element;
  const int quad = threadIdx.x % 4, row = tile * kTile + tile_row(), channels = static_cast<int>(f.x.channels);
  const int64_t plane = f.dense.stride[1];
  Element* to = static_cast<Element*>(f.out) + first_pixel_of(f, f.dense, f.first + local) + 2 * quad * plane;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (8 * half >= channels) break;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int channel = 8 * half + 2 * quad + i;
      Element* at = to + (8 * half + i) * plane;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int place = s.places[row + 8 * r];
        if (channel < channels && place >= 0) narrow(v[4 * half + 2 * r + i] + s.out_bias[channel], at[place]);
      }
    }
  }
}

// A consumer's registers and its place in the work. Its two tiles are two of the set, or the two halves of one.
template <class T, bool kTanh, bool kKeep, int kHalves>
struct Consumer {
  static constexpr int kNext = kHalves == 1 ? 1 : 0, kLastHalf = kHalves - 1;  // from the first tile to the second; its half
  Shared<kHalves>& s;
  const FieldParams& f;
  const Work<kHalves>& work;
  int tile;  // the first of its tiles, in the set
  Turn<kStages> stage;
  int local, level, slice;
  float h0[32], h1[32];
  uint32_t e0[16], e1[16];

  __device__ __forceinline__ Consumer(Shared<kHalves>& s, const FieldParams& f, const Work<kHalves>& work, int tile)
      : s(s), f(f), work(work), tile(tile) {}
  // Whether the second tile exists. Only with one half.
  __device__ __forceinline__ bool has_both() const { return tile + 1 < work.tiles; }
  // The A operand of the level's first products, with one half.
  __device__ __forceinline__ TwoRows enter(uint32_t (&e)[16], const float (&h)[32]) {
    const TwoRows by = inverse_rms(s, f, h);
    pack_rows<T>(e, h, by);
    return by;
  }
  // The same with two halves.
  __device__ __forceinline__ TwoRows enter_both() {
    const TwoRows by = inverse_rms(s, f, h0, h1);
    pack_rows<T>(e0, h0, by);
    pack_rows<T>(e1, h1, by);
    return by;
  }
  __device__ __forceinline__ void keep0(const TwoRows& by, const KeptState& kept) {
    keep_state(e0, by, kept, f.residual, s, tile, 0);
  }
  __device__ __forceinline__ void keep1(const TwoRows& by, const KeptState& kept) {
    keep_state(e1, by, kept, f.residual, s, tile + kNext, kLastHalf);
  }

  // ---- One half

  // One step. While the SiLU of one tile is computed, products of the other run. Order of the products, for tiles 0 and 1 and
  // halves a and b of the slice: first 0a, first 1a; second 0a, first 0b; second 1a, first 1b; second 0b; second 1b.
  // Accumulators are touched only after a wait that leaves only later groups of products pending.
  //
  // Unless kLast, second 1b still runs when the step ends. The next step must be kCrossing: it begins its own first product
  // before it waits for that one. This works within an unrolled pair of steps only: ptxas waits for all products at the end of a
  // loop.
  template <bool kCrossing, bool kLast>
  __device__ __forceinline__ void take_step() {
    const bool begins = slice == 0;
    const int accumulate = f.residual || !begins;
    float z0[32], z1[32];
    uint32_t u0[16], u1[16];
    TwoRows by0, by1;
    if (begins) by0 = enter(e0, h0);
    s.full[stage.index].wait(stage.parity);
    s.ready[stage.index].wait(stage.parity);
    const uint32_t weights = descriptor_low(shared_address(s.weights[stage.index]));
    wgmma_fence();
    first_product<T>(z0, e0, weights, 0);
    if (kKeep && begins) keep0(by0, s.kept[stage.index]);
    if constexpr (kCrossing) {
      wgmma_wait<1>();
      settle(h1);
      arrive_as_warp(s.empty[stage.previous()]);
    }
    if (begins) by1 = enter(e1, h1);
    wgmma_fence();
    first_product<T>(z1, e1, weights, 0);
    if (kKeep && begins && has_both()) keep1(by1, s.kept[stage.index]);
    if (!FLOWSEG_PLANTED(wait_group)) wgmma_wait<1>();
    settle(z0);
    activate<T, kTanh>(u0, z0);
    wgmma_fence();
    second_product<T>(h0, u0, weights, 0, accumulate);
    first_product<T>(z0, e0, weights, 1);
    wgmma_wait<2>();
    settle(z1);
    activate<T, kTanh>(u1, z1);
    wgmma_fence();
    second_product<T>(h1, u1, weights, 0, accumulate);
    first_product<T>(z1, e1, weights, 1);
    wgmma_wait<2>();
    settle(z0);
    activate<T, kTanh>(u0, z0);
    wgmma_fence();
    second_product<T>(h0, u0, weights, 1, 1);
    wgmma_wait<1>();
    settle(z1);
    activate<T, kTanh>(u1, z1);
    wgmma_fence();
    second_product<T>(h1, u1, weights, 1, 1);
    wgmma_wait<1>();
    settle(h0);
    if constexpr (kLast) {
      if (FLOWSEG_PLANTED(early_load)) arrive_as_warp(s.empty[stage.index]);
      wgmma_wait<0>();
      settle(h1);
      if (!FLOWSEG_PLANTED(early_load)) arrive_as_warp(s.empty[stage.index]);
    }
    stage.advance();
    if (++slice == f.slices<kHalves>()) {
      slice = 0;
      ++level;
    }
  }

  __device__ __forceinline__ void take_steps() {
    level = slice = 0;
    int left = f.depth * f.slices<kHalves>();
#pragma unroll 1
    for (; left >= 2; left -= 2) {
      take_step<false, false>();
      take_step<true, true>();
    }
    if (left) take_step<false, true>();
  }

  // ---- Two halves

  // y = n W1 for a slice: the sum over both halves.
  __device__ __forceinline__ void wide_product(float (&z)[32], uint32_t weights) {
    wgmma_fence();
    first_product<T>(z, e0, weights, 0);
    add_product<T>(z, e1, weights, 1, 1);
  }
  // Waits for the weights of the current stage.
  __device__ __forceinline__ uint32_t weights() {
    s.full[stage.index].wait(stage.parity);
    s.ready[stage.index].wait(stage.parity);
    return descriptor_low(shared_address(s.weights[stage.index]));
  }
  // One or two steps of a level. While the SiLU of one slice is computed, products of the other run. Each of n W1 and u W2 takes
  // two groups of products, one for each half.
  template <int kCount>
  __device__ __forceinline__ void take_slices() {
    const bool begins = slice == 0;
    const int first = stage.index, accumulate = f.residual || !begins;
    float z0[32], z1[32];
    uint32_t u0[16], u1[16];
    TwoRows by;
    if (begins) by = enter_both();
    const uint32_t weights0 = weights();
    uint32_t weights1 = 0;
    wide_product(z0, weights0);
    if (kKeep && begins) keep0(by, s.kept[first]);
    stage.advance();
    if constexpr (kCount == 2) {
      weights1 = weights();
      wide_product(z1, weights1);
    }
    if (!FLOWSEG_PLANTED(wait_group)) wgmma_wait<2 * kCount - 2>();
    settle(z0);
    activate<T, kTanh>(u0, z0);
    wgmma_fence();
    second_product<T>(h0, u0, weights0, 0, accumulate);
    second_product<T>(h1, u0, weights0, 1, accumulate);
    if (kKeep && begins) keep1(by, s.kept[first]);
    if constexpr (kCount == 2) {
      wgmma_wait<2>();
      settle(z1);
      activate<T, kTanh>(u1, z1);
      wgmma_fence();
      second_product<T>(h0, u1, weights1, 0, 1);
      second_product<T>(h1, u1, weights1, 1, 1);
      if (FLOWSEG_PLANTED(early_load)) arrive_as_warp(s.empty[first]);
      wgmma_wait<2>();
      if (!FLOWSEG_PLANTED(early_load)) arrive_as_warp(s.empty[first]);
    }
    wgmma_wait<0>();
    settle(h0);
    settle(h1);
    arrive_as_warp(s.empty[kCount == 2 ? stage.index : first]);
    if constexpr (kCount == 2) stage.advance();
    slice += kCount;
  }

  __device__ __forceinline__ void take_levels() {
    const int slices = f.slices<kHalves>();
#pragma unroll 1
    for (level = 0; level < f.depth; ++level) {
      slice = 0;
#pragma unroll 1
      while (slice + 1 < slices) take_slices<2>();
      if (slice < slices) take_slices<1>();
    }
  }

  // ---- Both ends

  // The states before the first block.
  __device__ __forceinline__ void embed() {
    uint32_t pixels0[4], pixels1[4];
    load_table(h0, s, tile * kHalves);
    load_table(h1, s, tile * kHalves + 1);
    load_pixel_rows(pixels0, s, tile);
    load_pixel_rows(pixels1, s, tile + kNext);
    const uint64_t weight0 = descriptor(descriptor_low(shared_address(s.embed[0])));
    const uint64_t weight1 = descriptor(descriptor_low(shared_address(s.embed[kLastHalf])));
    wgmma_fence();
    wgmma<T, true>(h0, pixels0, weight0);
    wgmma<T, true>(h1, pixels1, weight1);
    wgmma_commit();
    wgmma_wait<0>();
    settle(h0);
    settle(h1);
  }

  // The A operands of the output's products.
  __device__ __forceinline__ void pack_last() {
    if constexpr (kHalves == 1) {
      pack_last_rows<T>(e0, h0, inverse_rms(s, f, h0), s, 0);
      pack_last_rows<T>(e1, h1, inverse_rms(s, f, h1), s, 0);
    } else {
      const TwoRows by = inverse_rms(s, f, h0, h1);
      pack_last_rows<T>(e0, h0, by, s, 0);
      pack_last_rows<T>(e1, h1, by, s, 1);
    }
  }
  // The output of both tiles. Pixels beyond the patch have no place.
  __device__ __forceinline__ void write() {
    float v0[8] = {}, v1[8] = {};
    float(&second)[8] = kHalves == 1 ? v1 : v0;  // two halves have the same pixels
    pack_last();
    const uint32_t weight0 = descriptor_low(shared_address(s.out_weight[0]));
    const uint32_t weight1 = descriptor_low(shared_address(s.out_weight[kLastHalf]));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<T, false>(v0, e0 + 4 * k, descriptor(weight0, k * kColumnStep), k != 0);
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<T, false>(second, e1 + 4 * k, descriptor(weight1, k * kColumnStep), kHalves == 2 || k != 0);
    wgmma_commit();
    wgmma_wait<0>();
    settle(v0);
    if constexpr (kHalves == 1) settle(v1);
    write_output<T>(v0, s, f, local, tile);
    if constexpr (kHalves == 1) write_output<T>(v1, s, f, local, tile + 1);
  }

  __device__ __forceinline__ void keep_last() {
    char* tiles = state_of<kHalves>(f, local, f.depth) + int64_t{work.set} * kSetTiles<kHalves> * kHalves * kTileBytes;
    const KeptState kept{.tiles = tiles, .inverse_rms = s.states.state(f, local, f.depth).inverse_rms};
    if constexpr (kHalves == 1) {
      const TwoRows by0 = enter(e0, h0), by1 = enter(e1, h1);
      keep0(by0, kept);
      if (has_both()) keep1(by1, kept);
    } else {
      const TwoRows by = enter_both();
      keep0(by, kept);
      keep1(by, kept);
    }
  }

  __device__ __forceinline__ void consume() {
    int parity = 0;
#pragma unroll 1
    for (local = work.first; local < work.count; local += work.step) {
      s.x_full.wait(parity);
      parity ^= 1;
      embed();
      arrive_as_warp(s.x_empty);
      if constexpr (kHalves == 1) {
        take_steps();
      } else {
        take_levels();
      }
      if constexpr (kKeep) {
        keep_last();
      } else {
        write();
      }
    }
    if (kKeep && threadIdx.x % 32 == 0) wait_for_copies<0>();
  }
};

// ---- The kernel

template <class T, bool kTanh, bool kKeep, int kHalves>
__global__ void __launch_bounds__(kThreads, 1) forward_blocks(FLOWSEG_GRID_CONSTANT FieldParams f) {
  FLOWSEG_DYNAMIC_SHARED(char, raw);
  char* base = raw + (-shared_address(raw) & 1023);
  auto& s = *reinterpret_cast<Shared<kHalves>*>(base);
  const Work<kHalves> work(f);
  const int group = __shfl_sync(kAllLanes, threadIdx.x / kGroupThreads, 0), warp = threadIdx.x % kGroupThreads / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      s.full[i].init(1 + 32);
      s.ready[i].init(kGroupThreads);
      s.empty[i].init(work.groups() * 4);
    }
    s.x_full.init(64);
    s.x_empty.init(work.groups() * 4);
    fence_barrier_init();
    s.largest = 0;
    s.inverse_hidden = 1.0f / f.hidden;
    if (kKeep) s.states.template fill<kHalves>(f, work.set);
  }
  for (int i = threadIdx.x; i < kSetPixels<kHalves> * kMostChannels; i += kThreads) s.x[i / kMostChannels][i % kMostChannels] = 0;
  __syncthreads();
  // Registers of the groups' threads: 512 in all, as many as four groups of 128 have at the start. With two halves the consumers
  // need fewer, the other groups more.
  constexpr int kProducer = kHalves == 1 ? 24 : 32, kNormaliser = kHalves == 1 ? 40 : 48, kConsumer = kHalves == 1 ? 224 : 216;
  if (group == 0) {
    give_registers<kProducer>();
    if (warp == 0) {
      if (threadIdx.x == 0) load_weights<kKeep>(s, f, work);
    } else if (warp == 1) {
      load_extras<T>(s, f, work);
    } else {
      load_pixels(s, f, work);
    }
    return;
  }
  TableShare<kHalves> table;
  table.load(f, work.set);
  fill_ends<T>(s, f, work.set);
  table.store(s, f, work.set);
  fence_async();
  named_barrier<kFillBarrier, kFillThreads>();
  if (group == 1) {
    give_registers<kNormaliser>();
    normalise<T, kKeep>(s, f, work);
  } else {
    take_registers<kConsumer>();
    if (group - 2 >= work.groups()) return;
    Consumer<T, kTanh, kKeep, kHalves>(s, f, work, (group - 2) * work.kGroupTiles).consume();
  }
}

}  // namespace flowseg::cuda::forward

namespace flowseg::cuda {

// Takes the round's patches from x to `out`. With kKeep it is the backward's first pass: it stores the normalised states of all
// levels, their 1 / rms, and the inverse lengths of the weights' columns. With several slices and both weights normalised, W2's
// inverse lengths must be there before.
template <bool kKeep, class Launch>
void launch_forward(const FieldParams& f, Real type, const Launch& launch) {
  if (f.count == 0) return;
  const int64_t tiles = f.halves() == 1 ? forward::kSetTiles<1> : forward::kSetTiles<2>, sets = (f.tiles() + tiles - 1) / tiles;
  // The sets of a patch are worked on at the same time, so its weights come from memory once.
  const int64_t blocks = sets * std::clamp<int64_t>(launch.device().multiprocessors / sets, 1, f.count);
  for_operands(type, f.residual, [&]<class T, bool kTanh>() {
    const auto with = [&](auto kernel, int64_t shared) { launch.with_threads(forward::kThreads, kernel, blocks, shared, f); };
    if (f.halves() == 1) return with(forward::forward_blocks<T, kTanh, kKeep, 1>, forward::kSharedBytes<kKeep, 1>);
    with(forward::forward_blocks<T, kTanh, kKeep, 2>, forward::kSharedBytes<kKeep, 2>);
  });
}

}  // namespace flowseg::cuda
