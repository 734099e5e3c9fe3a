// Designs of the middle of the backward of one block for sm_90a. Three warp groups: 1 and 2 compute z, du, dW1 and dW2 of 64 of the 128
// inner rows each; 0 loads and computes dn and the new g. README.md says what is left out.
// Usage: backward list | backward [check] [time] from=I to=J
#include "common.h"
#include "wgmma.h"
#include "wgmma8.h"
#include <thread>
constexpr int H = 64, BLOCK_BYTES = 32768;
enum {
  // Parts that are left out, to measure the time of the others.
  NO_TANH = 2, NO_TMA = 8, NO_STORE = 64, NO_DN = 256, NO_DW = 512,
  EARLY = 1,          // start z and du of the next chunk before the gradients of this one
  W1SS = 4,           // operand of the dW1 product from shared memory, not from registers
  W2SS = 16,          // operand of the dW2 product from shared memory, not from registers
  STAGGER = 32,       // groups start at different times
  STORE_TMA = 128,    // store the gradients by TMA
  STATES = 1024,      // load the states by TMA for each step
  LIGHT = 2048,       // derivative of SiLU in fewer instructions
  LAZY = 4096,        // wait for du only; the products of the gradients continue
  AHEAD = 8192,       // start the first chunk of the next step before this step ends
};
struct Back {
  alignas(1024) uint8_t weights[2][BLOCK_BYTES];      // the half of W2 holds the gradient of W2 at the end of a step
  alignas(1024) uint8_t state[2][4][8192];            // 4 chunks of [64 pixels][64 hx] bf16; the second set is used with STATES only
  alignas(1024) uint8_t g[5][8192];                   // a ring: chunk c of step s is at (c + 4 s) % 5
  alignas(1024) uint8_t dz[2][2][8192];               // [buffer][half of the inner rows][64 inner][64 pixels]
  alignas(1024) uint8_t staged[2][8192];              // the gradient of W1
  float inverse_rms[256];
  uint64_t full[2], empty[2], dz_full[2], dz_empty[2], g_ready[4];
};
struct BArgs { int items; __nv_bfloat16* grad; const __nv_bfloat16 *n, *g; const float* inverse_rms; float* g_out; };
// Byte offset of a lane in a swizzled tile of 128-byte rows: row 16 warp + lane % 16, 16-byte chunk lane / 16 (next 16 columns: ^ 32 k).
// Transposed: row 8 (lane / 16) + lane % 8 (+ 16 k), chunk 2 warp + lane / 8 % 2.
__device__ __forceinline__ uint32_t place(int warp, int lane) { const int row = warp * 16 + lane % 16; return row * 128 + (((lane / 16) ^ (row & 7)) << 4); }
__device__ __forceinline__ uint32_t place_t(int warp, int lane) { const int row = 8 * (lane / 16) + lane % 8; return row * 128 + (((2 * warp + (lane / 8 & 1)) ^ (lane & 7)) << 4); }
__device__ __forceinline__ void ldsm(uint32_t (&r)[16], uint32_t at) {
#pragma unroll
  for (int k = 0; k < 4; ++k) ldmatrix4(r + 4 * k, at ^ (32 * k));
}
__device__ __forceinline__ void ldsm_t(uint32_t (&r)[16], uint32_t at) {
#pragma unroll
  for (int k = 0; k < 4; ++k) ldmatrix4_t(r + 4 * k, at + 2048 * k);
}
__device__ __forceinline__ void stsm(uint32_t at, const uint32_t (&r)[16]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) stmatrix4(at ^ (32 * k), r + 4 * k);
}
__device__ __forceinline__ void stsm_t(uint32_t at, const uint32_t (&r)[16]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) stmatrix4_t(at + 2048 * k, r + 4 * k);
}
__device__ __forceinline__ void own(int half) { if (half) bar_sync<4, 128>(); else bar_sync<3, 128>(); }

__device__ __forceinline__ uint32_t low_word(uint32_t at) { return (at >> 4 & 0x3fff) | (uint32_t)descriptor_bits(16, 1024); }
__device__ __forceinline__ uint64_t offset(uint32_t low, uint32_t bytes) { return (uint64_t)(low + (bytes >> 4)) | (descriptor_bits(16, 1024) >> 32 << 32); }
template <int SKIP> __global__ void __launch_bounds__(384, 1) field_backward(const __grid_constant__ CUtensorMap map1, const __grid_constant__ CUtensorMap map2, const __grid_constant__ CUtensorMap out1, const __grid_constant__ CUtensorMap out2, const __grid_constant__ CUtensorMap states, const BArgs a) {
  extern __shared__ uint8_t raw[];
  Back& s = *reinterpret_cast<Back*>(raw + (-smem(raw) & 1023));
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), t = threadIdx.x % 128, lane = t % 32, warp = t / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) { init(&s.full[i], 1); init(&s.empty[i], 2 + 4); init(&s.dz_full[i], 8); init(&s.dz_empty[i], 4); }
    for (int i = 0; i < 4; ++i) init(&s.g_ready[i], 4);
    init_fence();
  }
  for (int i = threadIdx.x; i < 256 * H / 8; i += 384) {   // 16-byte chunks
    const int row = i / 8, chunk = i % 8, to = (row & 63) * 128 + ((chunk ^ (row & 7)) << 4);
    *reinterpret_cast<uint4*>(s.state[0][row / 64] + to) = reinterpret_cast<const uint4*>(a.n)[i];
    if (!(SKIP & STATES)) *reinterpret_cast<uint4*>(s.state[1][row / 64] + to) = reinterpret_cast<const uint4*>(a.n)[i];
    *reinterpret_cast<uint4*>(s.g[row / 64] + to) = reinterpret_cast<const uint4*>(a.g)[i];
  }
  for (int i = threadIdx.x; i < 256; i += 384) s.inverse_rms[i] = a.inverse_rms[i];
  if (SKIP & NO_TMA) for (int i = threadIdx.x; i < BLOCK_BYTES; i += 384) reinterpret_cast<__nv_bfloat16*>(s.weights)[i] = __float2bfloat16(0.06f * noise(i, 5));
  proxy();
  __syncthreads();
  const int steps = (a.items - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  if (group == 0) {
    give_registers<72>();
    const uint32_t own_place = place(warp, lane);
    int loaded = 0;
    auto load = [&](bool must) {   // load the weights of the next step if their stage is empty
      if (loaded >= steps) return;
      const int stage = loaded & 1, parity = (loaded / 2 & 1) ^ 1;
      if (must) spin(&s.empty[stage], parity); else if (!test(&s.empty[stage], parity)) return;
      const int row = (blockIdx.x + loaded * gridDim.x) * 128;
      ++loaded;
      if (SKIP & NO_TMA) { arrive(&s.full[stage]); return; }
      expect(&s.full[stage], BLOCK_BYTES * (SKIP & STATES ? 2 : 1));
      tma3(s.weights[stage], &map1, &s.full[stage], 0, 0, row);
      tma3(s.weights[stage] + 8192, &map1, &s.full[stage], 0, 1, row);
      tma2(s.weights[stage] + 16384, &map2, &s.full[stage], 0, 2 * row + 128);
      if (SKIP & STATES) for (int c = 0; c < 4; ++c) tma2(s.state[stage][c], &states, &s.full[stage], 0, (blockIdx.x * 4 + ((loaded - 1) & 3)) * 256 + c * 64);
    };
    if (t == 0) { load(true); load(true); }
    int base = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t w = low_word(smem(s.weights[step & 1]));
#pragma unroll 1
      for (int c = 0; c < 4; ++c) {
        if (t == 0 && loaded < step + 2) load(c == 3 && loaded < step + 2);
        const int slot = base + c >= 5 ? base + c - 5 : base + c, next = slot == 0 ? 4 : slot - 1;
        const uint32_t n = smem(s.state[step & 1][c]), g = smem(s.g[slot]);
        if (c == 0) spin(&s.full[step & 1], step / 2 & 1);
        spin(&s.dz_full[c & 1], (step * 2 + c / 2) & 1);
        if (SKIP & NO_DN) {
          __syncwarp();
          if (lane == 0) arrive(&s.dz_empty[c & 1]);
          for (int i = t; i < 512; i += 128) reinterpret_cast<uint4*>(s.g[next])[i] = reinterpret_cast<const uint4*>(s.g[slot])[i];
        } else {
          // dn (64 pixels, 64): A = dz of both halves, pixels along the rows; B = W1 in its stored layout.
          float dn[32];
          const uint32_t d = low_word(smem(s.dz[c & 1][0]));
          fence();
#pragma unroll
          for (int q = 0; q < 2; ++q)
#pragma unroll
            for (int k = 0; k < 4; ++k) W<0, 64>::ss<1, 0>(dn, offset(d, q * 8192 + 2048 * k), offset(w, q * 8192 + 32 * k), q + k != 0);
          commit();
          const int row = warp * 16 + lane / 4;
          const float r0 = s.inverse_rms[c * 64 + row], r1 = s.inverse_rms[c * 64 + row + 8];
          drain<0>(); pin(dn);
          __syncwarp();
          if (lane == 0) arrive(&s.dz_empty[c & 1]);
          float along0 = 0, along1 = 0;
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            uint32_t nn[4];
            ldmatrix4(nn, (n + own_place) ^ (32 * k));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float lo = __uint_as_float(nn[i] << 16), hi = __uint_as_float(nn[i] & 0xffff0000u);
              float& along = i % 2 ? along1 : along0;
              along = fmaf(dn[8 * k + 2 * i], lo, along); along = fmaf(dn[8 * k + 2 * i + 1], hi, along);
            }
          }
#pragma unroll
          for (int m = 1; m < 4; m *= 2) { along0 += __shfl_xor_sync(~0u, along0, m); along1 += __shfl_xor_sync(~0u, along1, m); }
          along0 *= -1.0f / H; along1 *= -1.0f / H;
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            uint32_t nn[4], gg[4];
            ldmatrix4(nn, (n + own_place) ^ (32 * k));
            ldmatrix4(gg, (g + own_place) ^ (32 * k));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float lo = __uint_as_float(nn[i] << 16), hi = __uint_as_float(nn[i] & 0xffff0000u);
              const float along = i % 2 ? along1 : along0, r = i % 2 ? r1 : r0;
              gg[i] = pack(fmaf(r, fmaf(lo, along, dn[8 * k + 2 * i]), __uint_as_float(gg[i] << 16)), fmaf(r, fmaf(hi, along, dn[8 * k + 2 * i + 1]), __uint_as_float(gg[i] & 0xffff0000u)));
            }
            stmatrix4((smem(s.g[next]) + own_place) ^ (32 * k), gg);
          }
        }
        proxy();
        __syncwarp();
        if (lane == 0) { arrive(&s.g_ready[c]); if (c == 3) arrive(&s.empty[step & 1]); }
      }
      base = base == 0 ? 4 : base - 1;
    }
    bar_sync<2, 384>();
    if (a.g_out)
      for (int i = t; i < 256 * H; i += 128) {
        const int row = i / H, col = i % H, slot = (base + row / 64) % 5;
        a.g_out[(size_t)blockIdx.x * 256 * H + i] = __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(s.g[slot] + (row & 63) * 128 + (((col / 8) ^ (row & 7)) << 4) + (col % 8) * 2));
      }
  } else {
    take_registers<216>();
    const int half = group - 1;
    const uint32_t own_place = place(warp, lane);
    if ((SKIP & STAGGER) && half) sleep_(400);
    int base = 0;
    float z[32], du[32];
    uint32_t w1t[16], w2[16];
    if ((SKIP & AHEAD) && steps == 0) return;
#pragma unroll 1
    for (int step = (SKIP & AHEAD ? -1 : 0); step < steps; ++step) {
      const uint32_t wa = smem(s.weights[step & 1]) + half * 8192;
      const uint32_t n0 = low_word(smem(s.state[step & 1][0]));
      auto lows = [&](int c, int base) { const int slot = base + c >= 5 ? base + c - 5 : base + c; return low_word(smem(s.g[0]) + slot * 8192); };
      auto fetch = [&](uint32_t wa) {
        if (!(SKIP & W1SS)) ldsm_t(w1t, wa + place_t(warp, lane));
        if (!(SKIP & W2SS)) ldsm(w2, wa + 16384 + own_place);
      };
      auto both = [&](int c, int step, int base, uint32_t wa) {   // z and du of a chunk
        if (step > 0) spin(&s.g_ready[c], (step - 1) & 1);
        const uint32_t g = lows(c, base), n = low_word(smem(s.state[step & 1][c])), w = low_word(wa);
        fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (SKIP & W1SS) W<0, 64>::ss<1, 0>(z, offset(w, k * 2048), offset(n, 32 * k), k != 0);
          else if (k) W<0, 64>::rs<0>(z, w1t + 4 * k, offset(n, 32 * k), 1); else W<0, 64>::rs_new<0>(z, w1t, offset(n, 0));
        commit();
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (SKIP & W2SS) W<0, 64>::ss<0, 0>(du, offset(w, 16384 + 32 * k), offset(g, 32 * k), k != 0);
          else if (k) W<0, 64>::rs<0>(du, w2 + 4 * k, offset(g, 32 * k), 1); else W<0, 64>::rs_new<0>(du, w2, offset(g, 0));
        commit();
      };
      auto ahead = [&] {   // the first chunk of the next step; after the last step the result is unused
        const int after = step + 1;
        const uint32_t wn = smem(s.weights[after & 1]) + half * 8192;
        if (after < steps) spin(&s.full[after & 1], after / 2 & 1);
        fetch(wn);
        both(0, after, after ? (base == 0 ? 4 : base - 1) : base, wn);
      };
      if ((SKIP & AHEAD) && step < 0) { ahead(); drain<0>(); pin(z); pin(du); continue; }
      float dw1[32], dw2[32];
      if (!(SKIP & AHEAD)) {
        spin(&s.full[step & 1], step / 2 & 1);
        fetch(wa);
        if (SKIP & EARLY) both(0, step, base, wa);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (!(SKIP & EARLY)) both(c, step, base, wa);
        if ((SKIP & AHEAD) && !c) ; else if ((SKIP & EARLY) && c && !(SKIP & NO_DW)) drain<2>(); else drain<1>();
        pin(z);
        uint32_t u[16], dz[16];
        if (SKIP & LIGHT) {   // 1 + slope = 1 + t + y (1 - t t), in fewer instructions
#pragma unroll
          for (int i = 0; i < 32; i += 2) {
            const float t0 = SKIP & NO_TANH ? z[i] : tanh_(z[i]), t1 = SKIP & NO_TANH ? z[i + 1] : tanh_(z[i + 1]);
            const float u0 = fmaf(z[i], t0, z[i]), u1 = fmaf(z[i + 1], t1, z[i + 1]);
            u[i / 2] = pack(u0, u1);
            z[i] = fmaf(-u0, t0, u0) + t0; z[i + 1] = fmaf(-u1, t1, u1) + t1;
          }
        } else {
#pragma unroll
          for (int i = 0; i < 32; i += 2) {
            const float t0 = SKIP & NO_TANH ? z[i] : tanh_(z[i]), t1 = SKIP & NO_TANH ? z[i + 1] : tanh_(z[i + 1]);
            const float u0 = fmaf(z[i], t0, z[i]), u1 = fmaf(z[i + 1], t1, z[i + 1]);
            z[i] = fmaf(u0, 1 - t0, t0); z[i + 1] = fmaf(u1, 1 - t1, t1);
            u[i / 2] = pack(u0, u1);
          }
        }
        pin(z); pinu(u);
        spin(&s.dz_empty[c & 1], (step * 2 + c / 2 & 1) ^ 1);   // this loop keeps ptxas from waiting for du before the tanh
        if ((SKIP & LAZY) && (SKIP & EARLY) && c && !(SKIP & NO_DW)) drain<1>(); else drain<0>();
        pin(du);
#pragma unroll
        for (int i = 0; i < 32; i += 2) dz[i / 2] = pack(fmaf(du[i], z[i], du[i]), fmaf(du[i + 1], z[i + 1], du[i + 1]));
        stsm(smem(s.dz[c & 1][half]) + own_place, dz);
        proxy();
        __syncwarp();
        if (lane == 0) arrive(&s.dz_full[c & 1]);
        if ((SKIP & EARLY) && c < 3) both(c + 1, step, base, wa);
        if ((SKIP & AHEAD) && c == 3) ahead();
        if (!(SKIP & NO_DW)) {
          const uint32_t g = lows(c, base), n = n0 + (c * 8192 >> 4);
          fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) if (c + k) W<0, 64>::rs<1>(dw2, u + 4 * k, offset(g, 2048 * k), 1); else W<0, 64>::rs_new<1>(dw2, u, offset(g, 0));
#pragma unroll
          for (int k = 0; k < 4; ++k) if (c + k) W<0, 64>::rs<1>(dw1, dz + 4 * k, offset(n, 2048 * k), 1); else W<0, 64>::rs_new<1>(dw1, dz, offset(n, 0));
          commit();
        } else if (!c) { for (int i = 0; i < 32; ++i) dw1[i] = dw2[i] = __uint_as_float(u[i / 2]); }
        if (c == 0 && step && t == 0) { if (SKIP & STORE_TMA) bulk_wait_read(); arrive(&s.empty[(step - 1) & 1]); }   // the gradients of the previous step are stored
      }
      drain<0>(); pin(dw1); pin(dw2);
      if (SKIP & AHEAD) { pin(z); pin(du); }
      base = base == 0 ? 4 : base - 1;
      own(half);   // all products of the group have read their operands, and the previous staged gradient is stored
      if (SKIP & STORE_TMA) {
        const int item = blockIdx.x + step * gridDim.x;
        uint32_t p[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) p[i] = pack(dw1[2 * i], dw1[2 * i + 1]);
        stsm_t(smem(s.staged[half]) + place_t(warp, lane), p);   // dW1^T (inner, hx) to rows of hx
#pragma unroll
        for (int i = 0; i < 16; ++i) p[i] = pack(dw2[2 * i], dw2[2 * i + 1]);
        stsm(wa + 16384 + own_place, p);
        proxy();
        own(half);
        if (t == 0) {
          tma3_store(&out1, s.staged[half], 0, half, item * 128);
          tma2_store(&out2, s.weights[step & 1] + 16384 + half * 8192, 0, item * 256 + 128 + half * 64);
          bulk_commit();
        }
      } else if (dw1[0] + dw1[31] + dw2[0] + dw2[31] == 12345.678f) a.grad[t] = __float2bfloat16(1.0f);
    }
    if (SKIP & STORE_TMA) if (t == 0) bulk_wait();
    bar_sync<2, 384>();
  }
}
#include "backward_reference.h"
struct Device { std::vector<CUtensorMap> m1, m2, o1, o2; CUtensorMap st; BArgs args; __nv_bfloat16* grad; };
static Device device(int items, std::vector<__nv_bfloat16*> w, std::vector<__nv_bfloat16*> grads, const Host& h, float* g_out, int blocks) {
  Device d; const uint64_t rows = (uint64_t)items * 128;
  for (auto p : w) { d.m1.push_back(tensor_map(p, {64, 2, rows}, {64, 1, 64})); d.m2.push_back(tensor_map(p, {64, rows * 2}, {64, 128})); }
  for (auto p : grads) { d.o1.push_back(tensor_map(p, {64, 2, rows}, {64, 1, 64})); d.o2.push_back(tensor_map(p, {64, rows * 2}, {64, 64})); }
  __nv_bfloat16* states; const size_t ns = (size_t)blocks * 4 * 256 * H; CK(cudaMalloc(&states, ns * 2)); fill_bf16<<<264, 512>>>(states, ns, 31, 1.0f);
  d.st = tensor_map(states, {64, (uint64_t)blocks * 4 * 256}, {64, 64});
  d.grad = grads[0];
  d.args = BArgs{items, grads[0], up16(h.n), up16(h.g), up(h.r), g_out};
  return d;
}
template <int SKIP> static void launch(const Device& d, int set, int grid, cudaStream_t st = 0) {
  const int shared = sizeof(Back) + 1024;
  static bool once = false;
  if (!once) { CK(cudaFuncSetAttribute(field_backward<SKIP>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)); once = true; }
  field_backward<SKIP><<<grid, 384, shared, st>>>(d.m1[set], d.m2[set], d.o1[set % d.o1.size()], d.o2[set % d.o2.size()], d.st, d.args);
}
template <int SKIP> static void timed(const char* name, const Device& d, int patches, int depth, int grid) {
  cudaStream_t st; CK(cudaStreamCreate(&st)); const int runs = 8;
  launch<SKIP>(d, 0, grid, st); CK(cudaStreamSynchronize(st)); CK(cudaGetLastError());
  cudaEvent_t e0, e1; CK(cudaEventCreate(&e0)); CK(cudaEventCreate(&e1));
  std::vector<double> v;
  for (int i = 0; i < 4; ++i) { CK(cudaEventRecord(e0, st)); for (int k = 0; k < runs; ++k) launch<SKIP>(d, k % (int)d.m1.size(), grid, st); CK(cudaEventRecord(e1, st)); CK(cudaEventSynchronize(e1)); CK(cudaGetLastError()); float ms; CK(cudaEventElapsedTime(&ms, e0, e1)); v.push_back(ms * 1e-3 / runs); }
  std::sort(v.begin(), v.end());
  const int products = 5 - (SKIP & NO_DN ? 1 : 0) - (SKIP & NO_DW ? 2 : 0);
  const double n = (double)patches * depth, s = v[1], bytes = n * BLOCK_BYTES * ((SKIP & NO_TMA ? 0 : 1) + (SKIP & NO_STORE ? 0 : 1));
  J("backward_time", name).f("patches", patches).f("depth", depth).f("products", products).f("us", s * 1e6).f("best_us", v[0] * 1e6).f("tflops", n * products * 2.0 * 256 * 64 * 128 / s * 1e-12).f("gb_s", bytes / s * 1e-9).f("us_patch_block_sm", s * 1e6 / (n / grid));
  cudaStreamDestroy(st);
}
template <int SKIP> static bool check(const char* name, bool transposed) {
  const int items = 10, grid = 4;   // 3, 3, 2, 2 steps
  const Host h = make(items, grid);
  __nv_bfloat16* grad; CK(cudaMalloc(&grad, (size_t)items * BLOCK_BYTES)); CK(cudaMemset(grad, 0xff, (size_t)items * BLOCK_BYTES));
  float* g_out; CK(cudaMalloc(&g_out, grid * 256 * H * 4));
  const Device d = device(items, {up16(h.w)}, {grad}, h, g_out, grid);
  launch<SKIP>(d, 0, grid);
  const std::string e = sync_error();
  if (!e.empty()) { J("backward_check", name).t("failed", e).f("fault", *g_fault_host); _Exit(4); }
  std::vector<__nv_bfloat16> b((size_t)items * 16384), b2(b.size()); CK(cudaMemcpy(b.data(), grad, b.size() * 2, cudaMemcpyDeviceToHost));
  std::vector<float> go(grid * 256 * H); CK(cudaMemcpy(go.data(), g_out, go.size() * 4, cudaMemcpyDeviceToHost));
  launch<SKIP>(d, 0, grid); CK(cudaDeviceSynchronize()); CK(cudaMemcpy(b2.data(), grad, b.size() * 2, cudaMemcpyDeviceToHost));
  std::vector<std::vector<float>> dw(grid), gl(grid), dwr(grid), glr(grid);
  std::vector<std::thread> ts;
  for (int i = 0; i < grid; ++i) { ts.emplace_back([&, i] { reference<false>(h, i, dw[i], gl[i]); }); ts.emplace_back([&, i] { reference<true>(h, i, dwr[i], glr[i]); }); }
  for (auto& t : ts) t.join();
  std::vector<float> a1, w1, r1, a2, w2, r2, ag, wg, rg, f1, v1;
  for (int i = 0; i < grid; ++i) {
    int step = 0;
    for (int item = i; item < items; item += grid, ++step)
      for (int k = 0; k < 16384; ++k) {
        const int at = k < 8192 && transposed ? (k % 128) * 64 + k / 128 : k;   // dW1 as (inner, hx)
        const float v = __bfloat162float(b[(size_t)item * 16384 + at]);
        (k < 8192 ? a1 : a2).push_back(v); (k < 8192 ? w1 : w2).push_back(dw[i][step * 16384 + k]); (k < 8192 ? r1 : r2).push_back(dwr[i][step * 16384 + k]);
        if (!step && k < 8192) { f1.push_back(v); v1.push_back(dw[i][k]); }
      }
    for (int k = 0; k < 256 * H; ++k) { ag.push_back(go[(size_t)i * 256 * H + k]); wg.push_back(gl[i][k]); rg.push_back(glr[i][k]); }
  }
  const double e1 = relative(a1, w1), e2 = relative(a2, w2), eg = relative(ag, wg);
  const bool right = e1 < 0.03 && e2 < 0.03 && eg < 0.03;
  J("backward_check", name).b("right", right).f("dW1", e1).f("dW2", e2).f("g", eg).f("dW1_rounded_cpu", relative(r1, w1)).f("dW2_rounded_cpu", relative(r2, w2)).f("g_rounded_cpu", relative(rg, wg)).f("dW1_first_step", relative(f1, v1)).f("dW2_to_rounded", relative(a2, r2)).b("bitwise_repeat", !memcmp(b.data(), b2.data(), b.size() * 2));
  return right;
}
struct Variant { const char* name; bool whole; bool (*check)(const char*, bool); void (*timed)(const char*, const Device&, int, int, int); };
template <int SKIP> static Variant variant(const char* name) { return {name, (SKIP & STORE_TMA) && !(SKIP & (NO_TANH | NO_TMA | NO_DN | NO_DW | STATES)), check<SKIP>, timed<SKIP>}; }
#include "backward_variants.h"
int main(int argc, char** argv) {
  g_program = "backward";
  const std::vector<Variant> all = variants();
  if (has(argc, argv, "list")) { for (auto& v : all) printf("%s\n", v.name); return 0; }
  cudaDeviceProp p; CK(cudaGetDeviceProperties(&p, 0)); const int sms = p.multiProcessorCount;
  make_fault(); load_driver();
  const int from = (int)number(argc, argv, "from", 0), to = (int)number(argc, argv, "to", 1000);
  const Host h = make(1, 1);
  if (has(argc, argv, "once")) { const int items = 132 * 16; __nv_bfloat16 *w, *g; CK(cudaMalloc(&w, (size_t)items * BLOCK_BYTES)); CK(cudaMalloc(&g, (size_t)items * BLOCK_BYTES)); fill_bf16<<<1056, 512>>>(w, (size_t)items * 16384, 50, 0.06f); const Device d = device(items, {w}, {g}, h, nullptr, sms); CK(cudaDeviceSynchronize()); for (int i = from; i < (int)all.size() && i < to; ++i) all[i].timed(all[i].name, d, items, 1, sms); return 0; }
  const int patches = 4096, depth = 4, items = patches * depth; std::vector<__nv_bfloat16*> w(2), g(2);
  for (int i = 0; i < 2; ++i) { CK(cudaMalloc(&w[i], (size_t)items * BLOCK_BYTES)); CK(cudaMalloc(&g[i], (size_t)items * BLOCK_BYTES)); fill_bf16<<<1056, 512>>>(w[i], (size_t)items * 16384, 50 + i, 0.06f); }
  const Device d = device(items, w, g, h, nullptr, sms);
  CK(cudaDeviceSynchronize());
  for (int i = from; i < (int)all.size() && i < to; ++i) {
    const Variant& v = all[i];
    { J("begin", v.name).f("index", i); }
    if (v.whole && has(argc, argv, "check")) v.check(v.name, false);
    if (has(argc, argv, "time")) v.timed(v.name, d, patches, depth, sms);
  }
  return 0;
}
