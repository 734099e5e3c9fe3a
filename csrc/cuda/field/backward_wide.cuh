// The backward of the neural field's blocks for two halves of 64 hidden units, and the kernel for either number of halves.
// backward.cuh has the formulas and the parts that are common. What differs for two halves:
//
// A step is 64 inner units, which both inner groups share. In a visit:
// - Each group computes y, u, du and dy for 32 of the tile's pixels, and writes u and dy to shared memory.
// - When both have done so, each group adds to G and D for its half of the hidden units, from all pixels.
// Between the two, a group starts y and du of the step's next visit. They run while it waits for the other group, and the products
// for G and D run during the next visit's tanh.
//
// Here the sums of dn over slices go through global memory, since there are always several slices.
//
// Barriers as in backward.cuh, but:
// - The ring has 3 buffers. The inner groups wait for a tile one visit ahead, except at a step's end.
// - The inner groups wait for dy_full too, before the products for G and D.
// - grads_stored (1 turn): the inner groups' threads 0 (2) arrive in the first visit of a step, when the earlier step's gradients
//   have left shared memory; the inner groups wait before they write u. The gradients of W1 are in the place of u.
//
// Why two buffers of u and dy suffice: u and dy of visit i + 2 take the place of those of visit i.
// - A group writes them after it has waited for dy_full of visit i + 1.
// - Both groups arrive there after their products for G and D of visit i are complete.
// - The state group's product dn of visit i is complete too: dy_empty says so.
//
// Why a group may overwrite what it has given the other in along1: the other reads it before its first arrival at dy_full in the
// next step.
//
// Why no wait lasts for ever: as in backward.cuh, if the products for G and D of a visit count as part of the next one. They wait
// for the tile of the next visit. Its load does not wait for them, but for what was done with the tile three visits before.
#pragma once

#include <type_traits>

#include "cuda/field/backward.cuh"

namespace flowseg::cuda::backward {

constexpr int kGroupPixels = kTile / 2;  // of a tile, for which an inner group computes y and du

struct WideShared {
  static constexpr int kHalves = 2;
  static constexpr int kRing = 3;
  static constexpr int kMostAhead = 2;
  static constexpr int kStateRegisters = 112, kInnerRegisters = 184;

  char weights[kStages][kStageBytes];          // as kSlice says; the place of W2 takes its gradient at the end of a step
  char tiles[kRing][2][kHalves * kTileBytes];  // n, g
  char u[2][kTileBytes];                       // rows: inner units, columns: pixels; at the end of a step the gradient of W1
  char dy[2][kTileBytes];                      // as u
  char new_g[kHalves * kTileBytes];
  Factors<kHalves> factors[kStages];
  float column_sums[2][kInnerWarps][kTile];    // sums of G W1 and D W2 over a warp's inner units
  float slice_sums[2][kHalves][kTile];         // the same over all warps of a group and over slices
  float along1[kHalves][kTile];                // the sums of Q W1 over a half of the hidden units
  Barrier weights_full[kStages], weights_ready[kStages], weights_empty[kStages];
  Barrier tile_full[kRing], tile_empty[kRing], dy_full[2], dy_empty[2], new_g_full, new_g_empty, grads_stored;
};
static_assert(sizeof(WideShared) + 1024 <= 227 * 1024);

// A step's work of an inner group.
template <class T, bool kTanh>
struct WideStep {
  WideShared& s;
  const FieldParams& f;
  int half, thread;
  uint32_t place;        // row_place
  uint32_t place_of_w1;  // column_place, in W1 and its gradient
  Turn<kStages> stage;
  Turn<WideShared::kRing> turn;
  Turn<2> product;
  Turn<1> stored;
  bool stores;           // whether gradients of the step before have been stored

  __device__ __forceinline__ uint32_t weights() const { return shared_address(s.weights[stage.index]); }
  __device__ __forceinline__ void give_tile_back(int index) const { arrive_as_warp(s.tile_empty[index]); }
  __device__ __forceinline__ const float* half_gain(int of) const {
    return s.factors[stage.index].half_gain + of * kTile + 2 * (thread % 4);
  }

  __device__ __forceinline__ void load_operand(uint32_t (&w1)[2][16]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) load_operand_of_y<T>(w1[i], weights() + i * kTileBytes + place_of_w1, half_gain(i));
  }

  // Waits for the tile of `turn` and starts y and du of the group's pixels. y is a group of products. du's group has not ended.
  __device__ __forceinline__ void start(float (&y)[16], float (&du)[16], const uint32_t (&w1)[2][16]) const {
    const uint32_t pixels = half * kGroupPixels * kTileRowBytes, w2 = descriptor_low(weights() + 2 * kTileBytes);
    const uint32_t n = descriptor_low(shared_address(s.tiles[turn.index][0]) + pixels);
    const uint32_t g = descriptor_low(shared_address(s.tiles[turn.index][1]) + pixels);
    s.tile_full[turn.index].wait(turn.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      wgmma<T, false>(y, w1[k / 4] + k % 4 * 4, descriptor(n, k / 4 * kTileBytes + k % 4 * kColumnStep), k != 0);
    }
    wgmma_commit();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int from = k / 4 * kTileBytes + k % 4 * kColumnStep;
      wgmma_tiles<T, false, false>(du, descriptor(w2, from), descriptor(g, from), k != 0);
    }
  }

  // Writes the group's pixels, columns of a tile.
  __device__ __forceinline__ void store_pixels(const char* tile, const uint32_t (&v)[8]) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) store_matrices((shared_address(tile) + place) ^ ((2 * half + k) * kColumnStep), v + 4 * k);
  }

  // Before the first u of a step is written: gradients of the step before have left shared memory.
  __device__ __forceinline__ void wait_for_stores() {
    if (thread == 0) {
      wait_for_reads<0>();
      s.weights_empty[stage.previous()].arrive();
      s.grads_stored.arrive();
    }
    s.grads_stored.wait(stored.parity);
    stored.advance();
  }

  // u and dy of the visit, whose y and du have been started. Ends the visit before.
  __device__ __forceinline__ void compute(float (&y)[16], float (&du)[16], bool first) {
    uint32_t u[8], dy[8];
    wgmma_wait<1>();
    settle(y);
    activate<T, kTanh>(y, u);
    settle(y);
    settle(u);
    s.dy_empty[product.index].wait(product.parity ^ 1);  // this loop also keeps ptxas from waiting for du before the tanh
    if (!FLOWSEG_PLANTED(wait_group)) wgmma_wait<0>();
    settle(du);
    if (!first) give_tile_back(turn.previous());
    gradient_of_y<T>(du, y, dy);
    if (first && stores) wait_for_stores();
    store_pixels(s.u[product.index], u);
    store_pixels(s.dy[product.index], dy);
    if (!FLOWSEG_PLANTED(proxy_fence)) fence_async();
    arrive_as_warp(s.dy_full[product.index]);
    turn.advance();
  }

  // Starts D += u g and G += dy n for the group's half of the hidden units. Ends the group of products.
  __device__ __forceinline__ void add(float (&g_sum)[32], float (&d_sum)[32]) {
    const uint32_t u = descriptor_low(shared_address(s.u[product.index]));
    const uint32_t dy = descriptor_low(shared_address(s.dy[product.index]));
    const uint32_t n = descriptor_low(shared_address(s.tiles[turn.previous()][0]) + half * kTileBytes);
    const uint32_t g = descriptor_low(shared_address(s.tiles[turn.previous()][1]) + half * kTileBytes);
    s.dy_full[product.index].wait(product.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_tiles<T, false, true>(d_sum, descriptor(u, k * kColumnStep), descriptor(g, k * kRowStep));
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_tiles<T, false, true>(g_sum, descriptor(dy, k * kColumnStep), descriptor(n, k * kRowStep));
    wgmma_commit();
    product.advance();
  }

  // Adds up the warps' sums of the group's half of the hidden units. The first 64 threads take D W2, the others G W1. Stores what
  // later kernels need of them.
  __device__ __forceinline__ void finish_sums(const Visit<2>& v) const {
    const int column = thread % kTile, unit = half * kTile + column;
    const bool of_w2 = thread < kTile;
    if (of_w2 ? !f.both : !f.residual) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kGroupWarps; ++w) sum += s.column_sums[of_w2][half * kGroupWarps + w][column];
    if (v.slice > 0) sum += s.slice_sums[of_w2][half][column];
    s.slice_sums[of_w2][half][column] = sum;
    if (!v.in_last_slice(f)) return;
    const int64_t block = int64_t{v.local} * f.depth + v.level;  // of the round
    if (!of_w2) {
      f.gain_sums[(f.first * f.depth + block) * f.padded_hidden<2>() + unit] = 0.5f * sum;
    } else {
      // `project` takes the sums with W2 as it was generated.
      f.along2[block * f.padded_hidden<2>() + unit] = sum / s.factors[stage.index].inverse2[unit];
    }
  }

  // The gradient of W2, packed. What comes from the lengths of its columns is missing: they run through several slices.
  __device__ __forceinline__ void finish_w2(const float (&d_sum)[32], uint32_t (&grad)[16]) const {
    const float* inverse2 = s.factors[stage.index].inverse2 + half * kTile + 2 * (thread % 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const Pair inverse = *reinterpret_cast<const Pair*>(inverse2 + 8 * j);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float low = inverse.x * d_sum[4 * j + 2 * r], high = inverse.y * d_sum[4 * j + 2 * r + 1];
        grad[2 * j + r] = T::pack(in_range<T>(low), in_range<T>(high));
      }
    }
  }

  // The gradients of the step's weights on the group's half of the hidden units, from the complete sums over pixels.
  __device__ __forceinline__ void finish(float (&g_sum)[32], float (&d_sum)[32], const Visit<2>& v) const {
    const int warp = thread / 32, lane = thread % 32, unit = 16 * warp + lane / 4, all_warps = half * kGroupWarps + warp;
    const uint32_t w1_tile = weights() + half * kTileBytes, w2_tile = w1_tile + 2 * kTileBytes;
    const float(&inverse1)[kTile] = s.factors[stage.index].inverse1;
    uint32_t w1[16], grad[16];
    float column[16], along[2] = {0, 0};
    load_columns(w1, w1_tile + place_of_w1);
    weigh_w1<T>(g_sum, w1, half_gain(half), column, along);
    if (lane % 4 == 0) {
      for (int r = 0; r < 2; ++r) s.along1[half][unit + 8 * r] = along[r];
    }
    if (f.residual) reinterpret_cast<Pair*>(s.column_sums[0][all_warps])[lane] = sum_columns(column);
    if (f.both) {
      load_rows(grad, w2_tile + place);
      sum_w2<T>(d_sum, grad, s.column_sums[1][all_warps]);
    }
    // From here on all products have read their operands: u and W2 may change.
    named_barrier<1, 2 * kGroupThreads>();
    finish_w2(d_sum, grad);
    store_rows(w2_tile + place, grad);
    for (int r = 0; r < 2; ++r) along[r] += s.along1[1 - half][unit + 8 * r];
    const float inverse[2] = {inverse1[unit], inverse1[unit + 8]};
    gradient_of_w1<T>(g_sum, w1, along, inverse, grad);
    store_columns(shared_address(s.u[half]) + place_of_w1, grad);
    finish_sums(v);
    fence_async();
    join_group(half);
    if (thread == 0) {
      const int matrix = (static_cast<int>(f.first) + v.local) * f.depth + v.level, inner = v.slice * f.slice_units<2>();
      store_tile(f.grad_w1, shared_address(s.u[half]), inner, half * kTile, matrix);
      store_tile(f.grad_w2, w2_tile, half * kTile, inner, matrix);
      commit_copies();
    }
  }
};

template <class T, bool kTanh>
__device__ __forceinline__ void differentiate_weights(WideShared& s, const FieldParams& f, int half) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread % 32, warp = thread / 32;
  WideStep<T, kTanh> step{.s = s, .f = f, .half = half, .thread = thread, .place = row_place(warp, lane),
                          .place_of_w1 = column_place(warp, lane), .stage = {}, .turn = {}, .product = {}, .stored = {},
                          .stores = false};
#pragma unroll 1
  for (Visit<2> v(f); v.exists(f); v.next_step(f)) {
    uint32_t w1[2][16];
    float g_sum[32] = {}, d_sum[32] = {}, y[16], du[16];
    s.weights_ready[step.stage.index].wait(step.stage.parity);
    step.load_operand(w1);
    settle(g_sum);  // zero before products start, not between them
    settle(d_sum);
    step.start(y, du, w1);
    wgmma_commit();
#pragma unroll 1
    for (v.tile = 0;; ++v.tile) {
      step.compute(y, du, v.tile == 0);
      if (v.ends_step(f)) break;
      step.start(y, du, w1);
      step.add(g_sum, d_sum);
    }
    step.add(g_sum, d_sum);
    wgmma_wait<0>();
    settle(g_sum);
    settle(d_sum);
    step.give_tile_back(step.turn.previous());
    step.finish(g_sum, d_sum, v);
    step.stage.advance();
    step.stores = true;
  }
  if (thread == 0) wait_for_copies<0>();
}

// ---- The kernel, for either number of halves

template <class T, bool kTanh, int kHalves>
__global__ void __launch_bounds__(kThreads, 1) backward_blocks(FLOWSEG_GRID_CONSTANT FieldParams f) {
  using Memory = std::conditional_t<kHalves == 1, Shared, WideShared>;
  FLOWSEG_DYNAMIC_SHARED(char, raw);
  Memory& s = *reinterpret_cast<Memory*>(raw + (-shared_address(raw) & 1023));
  const int group = __shfl_sync(kAllLanes, threadIdx.x / kGroupThreads, 0);
  if (threadIdx.x == 0) {
    init_barriers(s);
    if constexpr (kHalves == 2) s.grads_stored.init(2);
    fence_barrier_init();
  }
  __syncthreads();
  if (group == 0) {
    give_registers<kLoaderRegisters>();
    load_all<T>(s, f);
  } else if (group == 1) {
    give_registers<Memory::kStateRegisters>();
    propagate_state<T>(s, f);
  } else {
    take_registers<Memory::kInnerRegisters>();
    differentiate_weights<T, kTanh>(s, f, group - 2);
  }
}

}  // namespace flowseg::cuda::backward
