// Shared by the neural field's kernels for Hopper: SiLU, a warp's fragments of a tile, and positions in rings of buffers.
//
// A warp group (128 threads) holds a matrix of 64 rows and 64 columns: warp w has rows 16 w to 16 w + 15. As an accumulator of a
// product, element 4 j + 2 r + b of a lane is row lane / 4 + 8 r, column 8 j + 2 (lane % 4) + b. Packed in pairs, word 2 j + r
// holds two neighbouring columns: that is the operand A of a product, four words for every 16 of its columns.
#pragma once

#include <cstdint>

#include "cuda/block.cuh"
#include "cuda/field/params.h"
#include "cuda/hopper/async.cuh"
#include "cuda/hopper/tile.h"
#include "cuda/hopper/wgmma.cuh"

namespace flowseg::cuda {

constexpr int kGroupThreads = 128;  // of a warp group
constexpr int kGroupWarps = kGroupThreads / 32;

struct alignas(16) FourWords {
  uint32_t at[4];
};

// Sets u = SiLU(2 y) and t = tanh(y). u is y t + y: one fused multiply-add if t is approximate. Otherwise u is y (1 + t), where
// 1 + t has a small relative error also where it is near zero.
template <bool kTanh>
__device__ __forceinline__ void silu_and_tanh(float y, float& u, float& t) {
  if constexpr (kTanh) {
    t = approximate_tanh(y);
    u = y * t + y;
  } else {
    const float gate = one_plus_tanh(y);
    t = gate - 1;
    u = y * gate;
  }
}

// The place in a tile that a lane gives to load_rows and store_rows: row 16 warp + lane % 16, column 8 (lane / 16).
__device__ __forceinline__ uint32_t row_place(int warp, int lane) { return tile_offset(16 * warp + lane % 16, 8 * (lane / 16)); }
// The place for load_columns and store_columns: row 8 (lane / 16) + lane % 8, column 16 warp + 8 (lane / 8 % 2).
__device__ __forceinline__ uint32_t column_place(int warp, int lane) {
  const int row = 8 * (lane / 16) + lane % 8, column = 16 * warp + 8 * (lane / 8 % 2);
  return FLOWSEG_PLANTED(swizzle) ? row * kTileRowBytes + column * 2 : tile_offset(row, column);
}

// A tile's rows, or its columns as the rows of the transposed tile, in a group's registers. `at` is the address of the lane's
// place. The swizzle makes a step along the columns an exclusive or.
__device__ __forceinline__ void load_rows(uint32_t (&v)[16], uint32_t at) {
#pragma unroll
  for (int k = 0; k < 4; ++k) load_matrices(v + 4 * k, at ^ (k * kColumnStep));
}
__device__ __forceinline__ void store_rows(uint32_t at, const uint32_t (&v)[16]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) store_matrices(at ^ (k * kColumnStep), v + 4 * k);
}
__device__ __forceinline__ void load_columns(uint32_t (&v)[16], uint32_t at) {
#pragma unroll
  for (int k = 0; k < 4; ++k) load_matrices_transposed(v + 4 * k, at + k * kRowStep);
}
__device__ __forceinline__ void store_columns(uint32_t at, const uint32_t (&v)[16]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) store_matrices_transposed(at + k * kRowStep, v + 4 * k);
}

// The sum over four lanes that share a row of a fragment: lanes 4 i to 4 i + 3. Every lane gets it.
__device__ __forceinline__ float sum_of_four_lanes(float v) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// One thread: loads the four tiles of a slice's weights to a stage in shared memory, in the order that kSlice says.
template <int kHalves>
__device__ __forceinline__ void load_slice(uint32_t to, const FieldParams& f, Barrier& full, int local, int level, int slice) {
  constexpr int kInner = kHalves == 1 ? kTile : 0, kHidden = kTile - kInner;  // steps from a weight's first tile to its second
  const int matrix = (static_cast<int>(f.first) + local) * f.depth + level, inner = slice * f.slice_units<kHalves>();
  load_tile(to, f.w1, full, inner, 0, matrix);
  load_tile(to + kTileBytes, f.w1, full, inner + kInner, kHidden, matrix);
  load_tile(to + 2 * kTileBytes, f.w2, full, 0, inner, matrix);
  load_tile(to + 3 * kTileBytes, f.w2, full, kHidden, inner + kInner, matrix);
}

// Calls body.template operator()<T, kTanh>() with the operand type, and whether SiLU takes the approximate tanh.
template <class Body>
void for_operands(Real type, bool residual, Body body) {
  if (type == Real::f16) return body.template operator()<HalfPair, false>();
  if (residual) return body.template operator()<BFloatPair, true>();
  body.template operator()<BFloatPair, false>();
}

// A buffer of a ring of kBuffers, and the parity of its barriers' phase. The thread that fills it waits for parity ^ 1 of `empty`.
template <int kBuffers>
struct Turn {
  int index = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++index == kBuffers) {
      index = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ int previous() const { return index == 0 ? kBuffers - 1 : index - 1; }
};

// One arrival for a warp, after all of its lanes.
__device__ __forceinline__ void arrive_as_warp(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier.arrive();
}

}  // namespace flowseg::cuda
