// Designs of the forward of the neural field for sm_90a: wgmma products, weights loaded by TMA. README.md explains the names.
// Usage: forward list | forward [check] [time] from=I to=J
#include "common.h"
#include "wgmma.h"
#include "wgmma8.h"
#include <thread>
#include <type_traits>
constexpr int H = 64, WIDE = 128, BLOCK_BYTES = 32768;
enum {
  // Parts that are left out, to measure the time of the others.
  NO_TANH = 1, NO_PRODUCTS = 2, NO_TMA = 4, NO_NORMS = 8, NO_NORMALISE = 1 << 12, NO_ENDS = 1 << 14,
  CLOCKS = 16,        // record the clocks that groups wait and work
  SEPARATE = 32,      // a separate group for the loads; needs TWICE
  ENDS = 64,          // first and last linear layer by wgmma, not by fp32 multiply-adds
  STAGGER = 128,      // groups start 500 ns apart
  CROSS = 256,        // two groups: the last product of a block overlaps the norm of the next block
  MIX = 512,          // one tanh of eight by a polynomial
  ALU = 1 << 10,      // squares of columns are summed in fp32, not by mma
  SCALES = 1 << 11,   // weights stay as they are; the lengths scale the results of the products
  TABLE32 = 1 << 13,  // cosine features in fp32, not in fp16
  FLAT = 1 << 16,     // second product of one half before the first product of the other half
  CHAIN = 1 << 17,    // four groups: wait for each second product before the next first product
  TWICE = 1 << 18,    // fewer registers for the normaliser: it reads the weights twice
  FOUR = 1 << 19,     // with CROSS: four blocks unrolled, not two
  PACKED = 1 << 20,   // sums of four squares in bf16 pairs
  LATE = 1 << 21,     // the norm's factor is applied after the first product
  OWN = 1 << 22,      // no normalising group: every warp scales a sixteenth of the weights two steps ahead
};
struct Args {
  const __nv_bfloat16* x; __nv_bfloat16* out; const float* table; const float* gains; const float* out_gain;
  const float* embed; const float* out_weight; const float* out_bias;
  int patches, depth, columns, per_image; float eps; uint64_t bits; uint32_t* clocks;
};
__device__ __forceinline__ void norms(const float (&h)[32], float eps, float& n0, float& n1) {
  float p0 = 0, p1 = 0; n0 = n1 = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    n0 = fmaf(h[4 * j], h[4 * j], n0); p0 = fmaf(h[4 * j + 1], h[4 * j + 1], p0);
    n1 = fmaf(h[4 * j + 2], h[4 * j + 2], n1); p1 = fmaf(h[4 * j + 3], h[4 * j + 3], p1);
  }
  n0 += p0; n1 += p1;
#pragma unroll
  for (int m = 1; m < 4; m *= 2) { n0 += __shfl_xor_sync(~0u, n0, m); n1 += __shfl_xor_sync(~0u, n1, m); }
  n0 = rsqrtf(n0 * (1.0f / H) + eps); n1 = rsqrtf(n1 * (1.0f / H) + eps);
}
// tanh by a clamped odd polynomial on the multiply-add units. It is too inexact for the tails; it only measures the speed.
__device__ __forceinline__ float tanh_poly(float y) {
  const float c = fminf(fmaxf(y, -2.9f), 2.9f), s = c * c;
  float p = fmaf(s, -2.2337e-5f, 6.5226e-4f); p = fmaf(p, s, -7.7093e-3f); p = fmaf(p, s, 4.8735e-2f); p = fmaf(p, s, -1.9135e-1f); p = fmaf(p, s, 8.8047e-1f + 0.1129f);
  return c * p;
}
template <int F> __device__ __forceinline__ void silu(const float (&z)[32], uint32_t (&u)[16], float n0, float n1) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    float a = z[2 * j], b = z[2 * j + 1];
    if (F & LATE) { a *= j % 2 ? n1 : n0; b *= j % 2 ? n1 : n0; }
    if (F & NO_TANH) u[j] = pack(fmaf(a, a, a), fmaf(b, b, b));
    else if ((F & MIX) && j % 4 == 3) u[j] = pack(fmaf(a, tanh_(a), a), fmaf(b, tanh_poly(b), b));
    else u[j] = pack(fmaf(a, tanh_(a), a), fmaf(b, tanh_(b), b));
  }
}
__device__ __forceinline__ void split(float a, float b, uint32_t& hi, uint32_t& lo) { hi = pack(a, b); lo = pack(a - __uint_as_float(hi << 16), b - __uint_as_float(hi & 0xffff0000u)); }
__device__ __forceinline__ void vec(float (&v)[16], const float* from, int quad) {   // the 16 of 64 columns of a quad
  const float4* p = reinterpret_cast<const float4*>(from + quad * 20);
#pragma unroll
  for (int i = 0; i < 4; ++i) { const float4 f = p[i]; v[4 * i] = f.x; v[4 * i + 1] = f.y; v[4 * i + 2] = f.z; v[4 * i + 3] = f.w; }
}
__device__ __forceinline__ int permuted(int col) { return col % 8 / 2 * 20 + col / 8 * 2 + col % 2; }
// The descriptor of a stage: a low word, to which offsets are added without carry, and a constant high word.
__device__ __forceinline__ uint32_t low_word(uint32_t at) { return (at >> 4 & 0x3fff) | (uint32_t)descriptor_bits(16, 1024); }
__device__ __forceinline__ uint64_t offset(uint32_t low, uint32_t bytes) { return (uint64_t)(low + (bytes >> 4)) | (descriptor_bits(16, 1024) >> 32 << 32); }
template <int STAGES, int F> struct Shared {
  alignas(1024) uint8_t weights[STAGES][BLOCK_BYTES];  // W1 left half, W1 right half, W2
  alignas(1024) uint8_t embed_b[2048], out_b[1024];    // B operands of the ends: embed high and low parts (16, 64) MN-major; out (8, 64) K-major
  alignas(128) uint8_t x[STAGES][1536];
  uint4 table[4][F & TABLE32 ? 8 : 4][128];
  float gains[4][80], out_gain[80], embed[3][80], out_weight[3][80];   // permuted
  uint2 gain_pairs[4][H / 2];
  float s1[STAGES][2][F & SCALES ? 80 : 4], s2[STAGES][F & SCALES ? 80 : 4], length2[STAGES][F & SCALES ? 80 : 4];
  uint64_t full[STAGES], ready[STAGES], empty[STAGES];
};
template <int GROUPS, int F> struct Shape {
  static constexpr int THREADS = (F & OWN ? 0 : 128) + GROUPS * 128 + (F & SEPARATE ? 128 : 0);   // a single warp would take the registers of a whole group
  static constexpr int CONSUMER = GROUPS == 4 ? (F & TWICE ? 112 : 104) : 224, NORMALISER = GROUPS == 4 ? (F & TWICE ? 32 : 64) : F & SEPARATE ? 40 : 56;
};
template <int GROUPS, int STAGES, int LEAD, int F> __global__ void __launch_bounds__(Shape<GROUPS, F>::THREADS, 1) field(const __grid_constant__ CUtensorMap map1, const __grid_constant__ CUtensorMap map2, const __grid_constant__ CUtensorMap mapx, const Args a) {
  using S = Shared<STAGES, F>;
  constexpr int THREADS = Shape<GROUPS, F>::THREADS;
  extern __shared__ uint8_t raw[];
  S& s = *reinterpret_cast<S*>(raw + (-smem(raw) & 1023));
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) + (F & OWN ? 1 : 0), t = threadIdx.x % 128, lane = t % 32, warp = t / 32, quad = lane % 4;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) { init(&s.full[i], 1); init(&s.ready[i], F & OWN ? 16 : 128); init(&s.empty[i], GROUPS * 4); }
    init_fence();
  }
  for (int i = threadIdx.x; i < a.depth * H; i += THREADS) s.gains[i / H][permuted(i % H)] = a.gains[i];
  for (int i = threadIdx.x; i < a.depth * H / 2; i += THREADS) { uint2 g; split(a.gains[2 * i], a.gains[2 * i + 1], g.x, g.y); s.gain_pairs[2 * i / H][i % (H / 2)] = g; }
  for (int i = threadIdx.x; i < H; i += THREADS) s.out_gain[permuted(i)] = a.out_gain[i];
  for (int i = threadIdx.x; i < 3 * H; i += THREADS) { s.embed[i / H][permuted(i % H)] = a.embed[i]; s.out_weight[i / H][permuted(i % H)] = a.out_weight[i] * a.out_gain[i % H]; }
  for (int i = threadIdx.x; i < 16 * H; i += THREADS) {
    const int k = i / H, col = i % H;
    const float v = k < 6 ? a.embed[k % 3 * H + col] : 0, hi = __bfloat162float(__float2bfloat16(v));
    *reinterpret_cast<__nv_bfloat16*>(s.embed_b + k * 128 + (((col / 8) ^ (k & 7)) << 4) + col % 8 * 2) = __float2bfloat16(k < 3 ? hi : v - hi);
  }
  for (int i = threadIdx.x; i < 8 * H; i += THREADS) {
    const int n = i / H, k = i % H;
    const float v = n % 4 < 3 ? a.out_weight[n % 4 * H + k] * a.out_gain[k] : 0, hi = __bfloat162float(__float2bfloat16(v));
    *reinterpret_cast<__nv_bfloat16*>(s.out_b + n * 128 + (((k / 8) ^ (n & 7)) << 4) + k % 8 * 2) = __float2bfloat16(n < 4 ? hi : v - hi);
  }
  for (int i = threadIdx.x; i < 256 * H / 2; i += THREADS) {   // pairs: (tile, row, col)
    const int row = i / 32, col = i % 32 * 2, q = col % 8 / 2, r = row % 16 / 8, who = row % 64 / 16 * 32 + row % 8 * 4 + q, at = 4 * (col / 8) + 2 * r;   // index in h
    const float v0 = a.table[row * H + col], v1 = a.table[row * H + col + 1];
    if (F & TABLE32) { float* to = reinterpret_cast<float*>(&s.table[row / 64][at / 4][who]) + at % 4; to[0] = v0; to[1] = v1; }
    else { __half* to = reinterpret_cast<__half*>(&s.table[row / 64][at / 8][who]) + at % 8; to[0] = __float2half(v0); to[1] = __float2half(v1); }
  }
  if (F & NO_TMA) for (int i = threadIdx.x; i < STAGES * BLOCK_BYTES / 2; i += THREADS) reinterpret_cast<__nv_bfloat16*>(s.weights)[i] = __float2bfloat16(0.06f * noise(i, 5));
  proxy();
  __syncthreads();
  const int steps = a.depth * ((a.patches - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x);
  auto load = [&](int step, bool must = true) {
    if (step >= steps) return true;
    const int stage = step % STAGES;
    if (must) wait(&s.empty[stage], (step / STAGES & 1) ^ 1, 1); else if (!test(&s.empty[stage], (step / STAGES & 1) ^ 1)) return false;
    if (F & NO_TMA) { arrive(&s.full[stage]); return true; }
    const int patch = blockIdx.x + step / a.depth * gridDim.x, level = step % a.depth, row = (patch * a.depth + level) * 128;
    expect(&s.full[stage], BLOCK_BYTES + (level ? 0 : 1536));
    tma3(s.weights[stage], &map1, &s.full[stage], 0, 0, row);
    tma3(s.weights[stage] + 8192, &map1, &s.full[stage], 0, 1, row);
    tma2(s.weights[stage] + 16384, &map2, &s.full[stage], 0, 2 * row + 128);
    if (!level) { const int image = patch / a.per_image, cell = patch % a.per_image; tma3(s.x[stage], &mapx, &s.full[stage], cell % a.columns * 16, cell / a.columns * 16, image * 3); }
    return true;
  };
  if ((F & SEPARATE) && group == GROUPS + 1) {
    give_registers<24>();
    if (t == 0) {
      for (int step = 0; step < steps; ++step) load(step);
      for (int step = steps; step < steps + STAGES; ++step) wait(&s.empty[step % STAGES], (step / STAGES & 1) ^ 1, 3);   // only to detect a hang
    }
  } else if (!(F & OWN) && group == 0) {
    give_registers<Shape<GROUPS, F>::NORMALISER>();
    uint32_t waited = 0, worked = 0, begun = F & CLOCKS ? clock() : 0;
    int next = 0;   // next step to load: as far ahead as stages are empty; only the current step is waited for
    int stage = 0, phase = 0;
    for (int step = 0; step < steps; ++step) {
      if (!(F & SEPARATE) && t == 0) while (next < steps && next < step + STAGES && load(next, next == step)) ++next;
      const uint32_t c0 = F & CLOCKS ? clock() : 0;
      wait(&s.full[stage], phase, 2);
      const uint32_t c1 = F & CLOCKS ? clock() : 0;
      if (F & CLOCKS) waited += c1 - c0;
      if (!(F & NO_NORMALISE)) {
      const uint32_t w = smem(s.weights[stage]) + (8 * (lane / 16) + lane % 8) * 128;
      const int own = (lane & 28) | (lane >> 3);   // the lane that holds the diagonal element of this lane's row
      const uint2* gains = s.gain_pairs[step % a.depth];
      // Normalise 16 columns of KF times 16 rows; col and half select the place of their scales.
      auto block = [&](uint32_t at, auto kf, bool one, int col, int half) {
        constexpr int KF = decltype(kf)::value;
        constexpr bool AGAIN = (F & TWICE) != 0;    // read the weights again to scale them, which saves registers
        uint32_t q[AGAIN ? 1 : KF][4];
        float s0 = 0, s1 = 0, d0[4] = {}, d1[4] = {}; uint32_t p0 = 0, p1 = 0;
        if (!AGAIN)
#pragma unroll
          for (int k = 0; k < KF; ++k) ldmatrix4_t(q[AGAIN ? 0 : k], at + 2048 * k);
#pragma unroll
        for (int k = 0; k < KF; ++k) {
          uint32_t (&r)[4] = q[AGAIN ? 0 : k];
          if (AGAIN) ldmatrix4_t(r, at + 2048 * k);
          if (F & PACKED) {
            p0 = k % 2 ? fma2(r[0], r[0], p0) : mul2(r[0], r[0]); p0 = fma2(r[2], r[2], p0);
            p1 = k % 2 ? fma2(r[1], r[1], p1) : mul2(r[1], r[1]); p1 = fma2(r[3], r[3], p1);
            if (k % 2) { s0 += __uint_as_float(p0 << 16); s0 += __uint_as_float(p0 & 0xffff0000u); s1 += __uint_as_float(p1 << 16); s1 += __uint_as_float(p1 & 0xffff0000u); }
          } else if (F & ALU) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float lo = __uint_as_float(r[i] << 16), hi = __uint_as_float(r[i] & 0xffff0000u);
              float& to = i % 2 ? s1 : s0;
              to = fmaf(lo, lo, to); to = fmaf(hi, hi, to);
            }
          } else {
            mma8(d0, r[0], r[1], r[0]); mma8(d1, r[0], r[1], r[1]);
            mma8(d0, r[2], r[3], r[2]); mma8(d1, r[2], r[3], r[3]);
          }
        }
        if (F & (ALU | PACKED)) {
#pragma unroll
          for (int m = 1; m < 4; m *= 2) { s0 += __shfl_xor_sync(~0u, s0, m); s1 += __shfl_xor_sync(~0u, s1, m); }
        } else {
          s0 = lane & 4 ? d0[1] : d0[0]; s1 = lane & 4 ? d1[3] : d1[2];
          if (!(F & SCALES)) { s0 = __shfl_sync(~0u, s0, own); s1 = __shfl_sync(~0u, s1, own); }
        }
        s0 = fmaxf(s0, 1e-24f); s1 = fmaxf(s1, 1e-24f);
        const float f0 = (one ? 0.5f : 1.0f) * rsqrtf(s0), f1 = (one ? 0.5f : 1.0f) * rsqrtf(s1);
        if (F & SCALES) {
          if (lane == own) {
            const int c0 = permuted(col + lane / 4), c1 = permuted(col + 8 + lane / 4);
            if (one) { s.s1[stage][half][c0] = f0; s.s1[stage][half][c1] = f1; }
            else { s.s2[stage][c0] = f0; s.s2[stage][c1] = f1; s.length2[stage][c0] = s0 * f0; s.length2[stage][c1] = s1 * f1; }
          }
          return;
        }
        uint32_t hi[2], lo[2];
        split(f0, f0, hi[0], lo[0]); split(f1, f1, hi[1], lo[1]);
#pragma unroll
        for (int k = 0; k < KF; ++k) {
          uint32_t (&r)[4] = q[AGAIN ? 0 : k];
          if (AGAIN) ldmatrix4_t(r, at + 2048 * k);
#pragma unroll
          for (int i = 0; i < 4; ++i) r[i] = fma2(r[i], hi[i % 2], mul2(r[i], lo[i % 2]));
          if (one) {
            const uint2 g0 = gains[8 * k + quad], g1 = gains[8 * k + 4 + quad];
            r[0] = fma2(r[0], g0.x, mul2(r[0], g0.y)); r[1] = fma2(r[1], g0.x, mul2(r[1], g0.y));
            r[2] = fma2(r[2], g1.x, mul2(r[2], g1.y)); r[3] = fma2(r[3], g1.x, mul2(r[3], g1.y));
          }
          stmatrix4_t(at + 2048 * k, r);
        }
      };
      const int low = lane / 8 & 1, sw = lane & 7;
#pragma unroll
      for (int j = 0; j < 2; ++j) block(w + warp / 2 * 8192 + (((4 * (warp % 2) + 2 * j + low) ^ sw) << 4), std::integral_constant<int, 4>{}, true, 16 * (2 * (warp % 2) + j), warp / 2);
      block(w + 16384 + (((2 * warp + low) ^ sw) << 4), std::integral_constant<int, 8>{}, false, 16 * warp, 0);
      if (!(F & SCALES)) proxy();
      }
      arrive(&s.ready[stage]);
      if (F & CLOCKS) worked += (uint32_t)clock() - c1;
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    if ((F & CLOCKS) && t == 0) { a.clocks[blockIdx.x * 8] = waited; a.clocks[blockIdx.x * 8 + 1] = worked; a.clocks[blockIdx.x * 8 + 2] = (uint32_t)clock() - begun; }
  } else {
    if (!(F & OWN)) take_registers<Shape<GROUPS, F>::CONSUMER>();
    if (F & STAGGER) sleep_((group - 1) * 500 + (F & MIX ? 0 : 1));
    uint32_t waited = 0, begun = F & CLOCKS ? clock() : 0;
    int stage = 0, phase = 0;
    auto enter = [&](float (&h)[32], int tile, int st) {
      const uint32_t t = tid_() % 128, quad = t % 4, row0 = t / 32 * 16 + t % 32 / 4;   // recomputed to save registers
      const uint4* from = s.table[tile][0] + t;
#pragma unroll
      for (int i = 0; i < (F & TABLE32 ? 8 : 4); ++i) {
        const uint4 v = from[i * 128];
        if (F & TABLE32) { h[4 * i] = __uint_as_float(v.x); h[4 * i + 1] = __uint_as_float(v.y); h[4 * i + 2] = __uint_as_float(v.z); h[4 * i + 3] = __uint_as_float(v.w); }
        else {
          const float2 p0 = halves(v.x), p1 = halves(v.y), p2 = halves(v.z), p3 = halves(v.w);
          h[8 * (i & 3)] = p0.x; h[8 * (i & 3) + 1] = p0.y; h[8 * (i & 3) + 2] = p1.x; h[8 * (i & 3) + 3] = p1.y; h[8 * (i & 3) + 4] = p2.x; h[8 * (i & 3) + 5] = p2.y; h[8 * (i & 3) + 6] = p3.x; h[8 * (i & 3) + 7] = p3.y;
        }
      }
      if (F & NO_ENDS) return;
      const uint32_t x = smem(s.x[st]) + (tile * 64 + row0) * 2;
      if (F & ENDS) {
        const uint32_t ca = (2 * quad) % 3 * 512, cb = (2 * quad + 1) % 3 * 512;
        uint32_t e[4] = {0, 0, 0, 0};
        if (quad < 3) { e[0] = lds16(x + ca) | lds16(x + cb) << 16; e[1] = lds16(x + ca + 16) | lds16(x + cb + 16) << 16; }
        fence();
        W<0, 64>::rs<1>(h, e, descriptor(smem(s.embed_b)), 1);
        commit(); drain<0>(); pin(h);
      } else {
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          const float p0 = __uint_as_float(lds16(x + c * 512) << 16), p1 = __uint_as_float(lds16(x + c * 512 + 16) << 16);
          float e[16]; vec(e, s.embed[c], quad);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            h[4 * j] = fmaf(p0, e[2 * j], h[4 * j]); h[4 * j + 1] = fmaf(p0, e[2 * j + 1], h[4 * j + 1]);
            h[4 * j + 2] = fmaf(p1, e[2 * j], h[4 * j + 2]); h[4 * j + 3] = fmaf(p1, e[2 * j + 1], h[4 * j + 3]);
          }
        }
      }
    };
    auto leave = [&](const float (&h)[32], int tile, int patch) {
      const uint32_t t = tid_() % 128, quad = t % 4, row0 = t / 32 * 16 + t % 32 / 4;
      const int image = patch / a.per_image, cell = patch % a.per_image, width = a.columns * 16, plane = a.per_image * 256;
      const int r0 = tile * 64 + row0;
      __nv_bfloat16* out = a.out + (int64_t)image * 3 * plane + (cell / a.columns * 16 + r0 / 16) * width + cell % a.columns * 16 + r0 % 16;
      if (F & NO_ENDS) { if (h[0] + h[13] + h[31] == 12345.678f) out[0] = __float2bfloat16(1.0f); return; }
      float n0, n1;
      if (F & ENDS) {
        uint32_t e[16];
#pragma unroll
        for (int j = 0; j < 8; ++j) { e[2 * j] = pack(h[4 * j], h[4 * j + 1]); e[2 * j + 1] = pack(h[4 * j + 2], h[4 * j + 3]); }
        float v[4] = {0, 0, 0, 0};
        fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) W<0, 8>::rs<0>(v, e + 4 * k, descriptor(smem(s.out_b) + 32 * k), k != 0);
        commit();
        norms(h, a.eps, n0, n1);
        drain<0>(); pin(v);
        v[0] *= n0; v[1] *= n0; v[2] *= n1; v[3] *= n1;
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] += __shfl_xor_sync(~0u, v[i], 2);   // add the products of the high and low parts
        if (quad < 2) {
          const float b0 = __ldg(a.out_bias + 2 * quad);
          out[2 * quad * plane] = __float2bfloat16(v[0] + b0); out[2 * quad * plane + 8] = __float2bfloat16(v[2] + b0);
          if (quad == 0) { const float b1 = __ldg(a.out_bias + 1); out[plane] = __float2bfloat16(v[1] + b1); out[plane + 8] = __float2bfloat16(v[3] + b1); }
        }
      } else {
        norms(h, a.eps, n0, n1);
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          float o[16], s0 = 0, s1 = 0; vec(o, s.out_weight[c], quad);
#pragma unroll
          for (int j = 0; j < 8; ++j) { s0 = fmaf(h[4 * j], o[2 * j], s0); s0 = fmaf(h[4 * j + 1], o[2 * j + 1], s0); s1 = fmaf(h[4 * j + 2], o[2 * j], s1); s1 = fmaf(h[4 * j + 3], o[2 * j + 1], s1); }
          s0 *= n0; s1 *= n1;
#pragma unroll
          for (int m = 1; m < 4; m *= 2) { s0 += __shfl_xor_sync(~0u, s0, m); s1 += __shfl_xor_sync(~0u, s1, m); }
          const float b = __ldg(a.out_bias + c);
          if (quad == 0) { out[c * plane] = __float2bfloat16(s0 + b); out[c * plane + 8] = __float2bfloat16(s1 + b); }
        }
      }
    };
    auto entering = [&](const float (&h)[32], uint32_t (&e)[16], int level) {
      if (F & LATE) {
#pragma unroll
        for (int i = 0; i < 16; ++i) e[i] = pack(h[2 * i], h[2 * i + 1]);
        return;
      }
      float n0, n1;
      if (F & NO_NORMS) n0 = n1 = 0.7f; else norms(h, a.eps, n0, n1);
      if (F & SCALES) {
        float g[16]; vec(g, s.gains[level], tid_() % 4);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          e[2 * j] = pack(h[4 * j] * n0 * g[2 * j], h[4 * j + 1] * n0 * g[2 * j + 1]);
          e[2 * j + 1] = pack(h[4 * j + 2] * n1 * g[2 * j], h[4 * j + 3] * n1 * g[2 * j + 1]);
        }
        return;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) { e[2 * j] = pack(h[4 * j] * n0, h[4 * j + 1] * n0); e[2 * j + 1] = pack(h[4 * j + 2] * n1, h[4 * j + 3] * n1); }
    };
    auto times = [&](float (&h)[32], const float* by) {
      float g[16]; vec(g, by, tid_() % 4);
#pragma unroll
      for (int j = 0; j < 8; ++j) { h[4 * j] *= g[2 * j]; h[4 * j + 1] *= g[2 * j + 1]; h[4 * j + 2] *= g[2 * j]; h[4 * j + 3] *= g[2 * j + 1]; }
    };
    auto first = [&](float (&z)[32], const uint32_t (&e)[16], uint32_t w, int half) {
      if (F & NO_PRODUCTS) {
#pragma unroll
        for (int i = 0; i < 32; ++i) z[i] = __uint_as_float(e[i / 2]);
        return;
      }
      W<0, 64>::rs_new<1>(z, e, offset(w, half * 8192));
#pragma unroll
      for (int k = 1; k < 4; ++k) W<0, 64>::rs<1>(z, e + 4 * k, offset(w, half * 8192 + k * 2048), 1);
      commit();
    };
    auto second = [&](float (&h)[32], const uint32_t (&u)[16], uint32_t w, int half) {
      if (F & NO_PRODUCTS) {
#pragma unroll
        for (int i = 0; i < 16; ++i) h[2 * i] += __uint_as_float(u[i]);
        return;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) W<0, 64>::rs<1>(h, u + 4 * k, offset(w, 16384 + half * 8192 + k * 2048), 1);
      commit();
    };
    auto active = [&](float (&z)[32], uint32_t (&u)[16], int st, int half, float n0, float n1) {
      if (F & SCALES) times(z, s.s1[st][half]);
      silu<F>(z, u, n0, n1);
    };
    auto there = [&] {
      const uint32_t c0 = F & CLOCKS ? clock() : 0;
      spin(&s.full[stage], phase); spin(&s.ready[stage], phase);
      if (F & CLOCKS) waited += (uint32_t)clock() - c0;
    };
    auto done = [&](int st) { __syncwarp(); if (tid_() % 32 == 0) arrive(&s.empty[st]); };
    int next = 0, step = 0;
    auto feed = [&] { if (tid_() == 0) while (next < steps && next < step + STAGES && load(next, false)) ++next; };
    auto part = [&](int at, int st, int ph, int level) {   // this warp's part of the weights of step `at`
      if (at >= steps) return;
      const uint32_t tid = tid_(), lane = tid % 32, warp = tid / 32 % 4, g = tid / 128;
      spin(&s.full[st], ph);
      uint32_t q[4][4]; float s0 = 0, s1 = 0;
      const bool one = warp < 2;
      uint32_t w = smem(s.weights[st]); int stride;
      if (one) { const uint32_t b = 2 * g + warp; w += b / 4 * 8192 + (8 * (lane / 16) + lane % 8) * 128 + (((2 * (b % 4) + (lane / 8 & 1)) ^ (lane & 7)) << 4); stride = 2048; }
      else { w += 16384 + lane * 128 + (((2 * g + warp - 2) ^ (lane & 7)) << 4); stride = 4096; }
#pragma unroll
      for (int k = 0; k < 4; ++k) ldmatrix4_t(q[k], w + stride * k);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t p0 = fma2(q[k][2], q[k][2], mul2(q[k][0], q[k][0])), p1 = fma2(q[k][3], q[k][3], mul2(q[k][1], q[k][1]));
        s0 += __uint_as_float(p0 << 16); s0 += __uint_as_float(p0 & 0xffff0000u); s1 += __uint_as_float(p1 << 16); s1 += __uint_as_float(p1 & 0xffff0000u);
      }
      if (!one) s0 = s1 = s0 + s1;
#pragma unroll
      for (int m = 1; m < 4; m *= 2) { s0 += __shfl_xor_sync(~0u, s0, m); s1 += __shfl_xor_sync(~0u, s1, m); }
      const float f0 = (one ? 0.5f : 1.0f) * rsqrtf(fmaxf(s0, 1e-24f)), f1 = (one ? 0.5f : 1.0f) * rsqrtf(fmaxf(s1, 1e-24f));
      uint32_t hi[2], lo[2];
      split(f0, f0, hi[0], lo[0]); split(f1, f1, hi[1], lo[1]);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) q[k][i] = fma2(q[k][i], hi[i % 2], mul2(q[k][i], lo[i % 2]));
      if (one) {
        const uint2* gains = s.gain_pairs[level];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const uint2 g0 = gains[8 * k + lane % 4], g1 = gains[8 * k + 4 + lane % 4];
          q[k][0] = fma2(q[k][0], g0.x, mul2(q[k][0], g0.y)); q[k][1] = fma2(q[k][1], g0.x, mul2(q[k][1], g0.y));
          q[k][2] = fma2(q[k][2], g1.x, mul2(q[k][2], g1.y)); q[k][3] = fma2(q[k][3], g1.x, mul2(q[k][3], g1.y));
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) stmatrix4_t(w + stride * k, q[k]);
      proxy();
      __syncwarp();
      if (lane == 0) arrive(&s.ready[st]);
    };
    if (F & OWN) { feed(); part(0, 0, 0, 0); part(1, 1, 0, a.depth > 1 ? 1 : 0); }
    if constexpr (GROUPS == 4) {
      float h[32];
#pragma unroll 1
      for (int patch = blockIdx.x; patch < a.patches; patch += gridDim.x) {
        spin(&s.full[stage], phase);
        enter(h, tid_() / 128 - (F & OWN ? 0 : 1), stage);
#pragma unroll 1
        for (int level = 0; level < a.depth; ++level) {
          uint32_t e[16], u[16]; float z[32];
          entering(h, e, level);
          there();
          const uint32_t w = low_word(smem(s.weights[stage]));
          fence();
          first(z, e, w, 0);
          float n0 = 1, n1 = 1;
          if (F & LATE) norms(h, a.eps, n0, n1);
          if (F & SCALES) times(h, s.length2[stage]);
          if (F & OWN) { int ahead = level + 2; while (ahead >= a.depth) ahead -= a.depth; feed(); part(step + 2, stage + 2 < STAGES ? stage + 2 : stage + 2 - STAGES, stage + 2 < STAGES ? phase : phase ^ 1, ahead); ++step; }
          drain<0>(); pin(z);
          active(z, u, stage, 0, n0, n1);
          fence();
          if (F & CHAIN) { second(h, u, w, 0); drain<0>(); pin(h); fence(); first(z, e, w, 1); }
          else { first(z, e, w, 1); second(h, u, w, 0); }
          if (F & FLAT) { drain<0>(); pin(h); } else drain<1>();
          pin(z);
          if (F & FLAT) { active(z, u, stage, 1, n0, n1); fence(); second(h, u, w, 1); }
          else { uint32_t v[16]; active(z, v, stage, 1, n0, n1); fence(); second(h, v, w, 1); }
          drain<0>(); pin(h);
          if (F & SCALES) times(h, s.s2[stage]);
          done(stage);
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
        leave(h, tid_() / 128 - (F & OWN ? 0 : 1), patch);
      }
    } else {
      float h0[32], h1[32];
      const int tile = 2 * (group - 1);
#pragma unroll 1
      for (int patch = blockIdx.x; patch < a.patches; patch += gridDim.x) {
        spin(&s.full[stage], phase);
        enter(h0, tile, stage);
        enter(h1, tile + 1, stage);
        int before = 0;
        // CROSS works inside an unrolled run of levels only: ptxas waits for all products at the end of a loop iteration.
        constexpr int RUN = F & CROSS ? (F & FOUR ? 4 : 2) : 1;
#pragma unroll 1
        for (int level0 = 0; level0 < a.depth; level0 += RUN) {
#pragma unroll
        for (int run = 0; run < RUN; ++run) {
          const int level = level0 + run;
          uint32_t e0[16], e1[16], u0[16], u1[16], v0[16], v1[16]; float z0[32], z1[32];
          entering(h0, e0, level);
          there();
          const uint32_t w = low_word(smem(s.weights[stage]));
          fence();
          first(z0, e0, w, 0);
          float n00 = 1, n01 = 1, n10 = 1, n11 = 1;
          if (F & LATE) norms(h0, a.eps, n00, n01);
          if (F & SCALES) times(h0, s.length2[stage]);
          if (run) { drain<1>(); pin(h1); if (F & SCALES) times(h1, s.s2[before]); done(before); }
          entering(h1, e1, level);
          fence();
          first(z1, e1, w, 0);
          if (F & LATE) norms(h1, a.eps, n10, n11);
          if (F & SCALES) times(h1, s.length2[stage]);
          drain<1>(); pin(z0);
          active(z0, u0, stage, 0, n00, n01);
          fence();
          if (F & FLAT) { second(h0, u0, w, 0); first(z0, e0, w, 1); } else { first(z0, e0, w, 1); second(h0, u0, w, 0); }
          drain<2>(); pin(z1);
          active(z1, u1, stage, 0, n10, n11);
          fence();
          if (F & FLAT) { second(h1, u1, w, 0); first(z1, e1, w, 1); drain<2>(); } else { first(z1, e1, w, 1); second(h1, u1, w, 0); drain<3>(); }
          pin(z0);
          active(z0, v0, stage, 1, n00, n01);
          fence();
          second(h0, v0, w, 1);
          if (F & FLAT) drain<1>(); else drain<2>();
          pin(z1);
          active(z1, v1, stage, 1, n10, n11);
          fence();
          second(h1, v1, w, 1);
          drain<1>(); pin(h0);
          if (F & SCALES) times(h0, s.s2[stage]);
          if (run == RUN - 1) { drain<0>(); pin(h1); if (F & SCALES) times(h1, s.s2[stage]); done(stage); }
          before = stage;
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
        }
        leave(h0, tile, patch);
        leave(h1, tile + 1, patch);
      }
    }
    if ((F & CLOCKS) && t == 0 && group == 1) { a.clocks[blockIdx.x * 8 + 3] = waited; a.clocks[blockIdx.x * 8 + 4] = (uint32_t)clock() - begun; }
  }
}
#include "forward_reference.h"
struct Device { std::vector<__nv_bfloat16*> weights; Args args; std::vector<CUtensorMap> m1, m2; CUtensorMap mx; };
static Device device(const Host& h, int sets, uint64_t bits) {
  Device d; const size_t n = (size_t)h.patches * h.depth * 16384, nx = (size_t)h.patches * 768;
  for (int s = 0; s < sets; ++s) {
    __nv_bfloat16* w; CK(cudaMalloc(&w, n * 2));
    if (h.weights.empty()) fill_bf16<<<1056, 512>>>(w, n, 100 + s, 0.3f);
    else { std::vector<__nv_bfloat16> b(n); for (size_t i = 0; i < n; ++i) b[i] = __float2bfloat16(h.weights[i]); CK(cudaMemcpy(w, b.data(), n * 2, cudaMemcpyHostToDevice)); }
    d.weights.push_back(w);
    const uint64_t rows = (uint64_t)h.patches * h.depth * 128;
    d.m1.push_back(tensor_map(w, {64, 2, rows}, {64, 1, 64})); d.m2.push_back(tensor_map(w, {64, rows * 2}, {64, 128}));
  }
  __nv_bfloat16 *x, *out; CK(cudaMalloc(&x, nx * 2)); CK(cudaMalloc(&out, nx * 2)); CK(cudaMemset(out, 0xff, nx * 2));
  if (h.x.empty()) fill_bf16<<<1056, 512>>>(x, nx, 9, 1.0f); else { std::vector<__nv_bfloat16> b(nx); for (size_t i = 0; i < nx; ++i) b[i] = __float2bfloat16(h.x[i]); CK(cudaMemcpy(x, b.data(), nx * 2, cudaMemcpyHostToDevice)); }
  d.mx = tensor_map(x, {(uint64_t)h.columns * 16, (uint64_t)h.per_image / h.columns * 16, (uint64_t)h.patches / h.per_image * 3}, {16, 16, 3}, CU_TENSOR_MAP_SWIZZLE_NONE);
  uint32_t* clocks; CK(cudaMalloc(&clocks, 132 * 16 * 4)); CK(cudaMemset(clocks, 0, 132 * 16 * 4));
  d.args = Args{x, out, up(h.table), up(h.gains), up(h.out_gain), up(h.embed), up(h.out_weight), up(h.out_bias), h.patches, h.depth, h.columns, h.per_image, 1e-6f, bits, clocks};
  return d;
}
static void release(Device& d) { for (auto w : d.weights) cudaFree(w); cudaFree((void*)d.args.x); cudaFree(d.args.out); cudaFree(d.args.clocks); }
static int g_sms = 132;
template <int G, int STAGES, int LEAD, int F> static void launch(const Device& d, int set, cudaStream_t st = 0) {
  const int shared = sizeof(Shared<STAGES, F>) + 1024;
  static bool once = false;
  if (!once) { CK(cudaFuncSetAttribute(field<G, STAGES, LEAD, F>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)); once = true; }
  field<G, STAGES, LEAD, F><<<std::min(g_sms, d.args.patches), Shape<G, F>::THREADS, shared, st>>>(d.m1[set], d.m2[set], d.mx, d.args);
}
static int g_right = -1;
template <int G, int STAGES, int LEAD, int F> static void timed(const char* name, const Device& d, int runs) {
  cudaStream_t st; CK(cudaStreamCreate(&st)); cudaGraph_t g; cudaGraphExec_t x;
  launch<G, STAGES, LEAD, F>(d, 0, st);
  CK(cudaStreamSynchronize(st)); CK(cudaGetLastError());
  CK(cudaStreamBeginCapture(st, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < runs; ++i) launch<G, STAGES, LEAD, F>(d, i % (int)d.weights.size(), st);
  CK(cudaStreamEndCapture(st, &g)); CK(cudaGraphInstantiate(&x, g, 0));
  cudaEvent_t e0, e1; CK(cudaEventCreate(&e0)); CK(cudaEventCreate(&e1));
  std::vector<double> v;
  for (int i = 0; i < 3; ++i) { CK(cudaEventRecord(e0, st)); CK(cudaGraphLaunch(x, st)); CK(cudaEventRecord(e1, st)); CK(cudaEventSynchronize(e1)); float ms; CK(cudaEventElapsedTime(&ms, e0, e1)); v.push_back(ms * 1e-3 / runs); }
  std::sort(v.begin(), v.end());
  const double s = v[1], flop = (double)d.args.patches * d.args.depth * 4.0 * 64 * 128 * 256, bytes = (double)d.args.patches * (d.args.depth * 32768.0 + 3072);
  J j("forward_time", name);
  j.f("patches", d.args.patches).f("depth", d.args.depth).f("groups", G).f("stages", STAGES).f("us", s * 1e6).f("best_us", v[0] * 1e6).f("tflops", flop / s * 1e-12).f("gb_s", bytes / s * 1e-9).b("right", g_right != 0);
  if (F & CLOCKS) {
    std::vector<uint32_t> c(g_sms * 8); CK(cudaMemcpy(c.data(), d.args.clocks, c.size() * 4, cudaMemcpyDeviceToHost));
    double m[8] = {}; for (int i = 0; i < g_sms; ++i) for (int k = 0; k < 8; ++k) m[k] += c[i * 8 + k] / (double)g_sms;
    const double n = (double)d.args.patches * d.args.depth / g_sms;
    j.f("normaliser_wait_full_clk", m[0] / n).f("normaliser_work_clk", m[1] / n).f("normaliser_all_clk", m[2] / n).f("consumer_wait_clk", m[3] / n).f("consumer_all_clk", m[4] / n);
  }
  cudaGraphExecDestroy(x); cudaGraphDestroy(g); cudaStreamDestroy(st);
}
template <int G, int STAGES, int LEAD, int F> static bool check(const char* name, const Host& h, const Device& d, const std::vector<float>& exact, const std::vector<float>& emu) {
  const int patches = h.patches, columns = h.columns, per_image = h.per_image;
  CK(cudaMemset(d.args.out, 0xff, (size_t)patches * 768 * 2));
  launch<G, STAGES, LEAD, F>(d, 0);
  const std::string e = sync_error();
  if (!e.empty()) { J("forward_check", name).t("failed", e).f("fault", *g_fault_host); _Exit(4); }
  std::vector<__nv_bfloat16> b((size_t)patches * 768); CK(cudaMemcpy(b.data(), d.args.out, b.size() * 2, cudaMemcpyDeviceToHost));
  std::vector<float> got(b.size()); const size_t plane = (size_t)per_image * 256, width = columns * 16; int nan = 0;
  for (int p = 0; p < patches; ++p) for (int c = 0; c < 3; ++c) for (int i = 0; i < 256; ++i) {
    const int image = p / per_image, cell = p % per_image;
    const float v = __bfloat162float(b[(image * 3 + c) * plane + (cell / columns * 16 + i / 16) * width + cell % columns * 16 + i % 16]);
    got[(size_t)p * 768 + c * 256 + i] = v; nan += !std::isfinite(v);
  }
  launch<G, STAGES, LEAD, F>(d, 0); CK(cudaDeviceSynchronize());
  std::vector<__nv_bfloat16> b2(b.size()); CK(cudaMemcpy(b2.data(), d.args.out, b.size() * 2, cudaMemcpyDeviceToHost));
  const double r = relative(got, exact);
  { J("forward_check", name).f("patches", patches).f("depth", h.depth).b("right", r < 0.02 && !nan).f("relative", r).f("relative_of_rounded_cpu", relative(emu, exact)).f("relative_to_rounded_cpu", relative(got, emu)).f("nan", nan).b("bitwise_repeat", !memcmp(b.data(), b2.data(), b.size() * 2)); }
  return r < 0.02 && !nan;
}
struct Variant { const char* name; bool whole; bool (*check)(const char*, const Host&, const Device&, const std::vector<float>&, const std::vector<float>&); void (*timed)(const char*, const Device&, int); };
template <int G, int STAGES, int LEAD, int F> static Variant variant(const char* name) { return {name, !(F & (NO_TANH | NO_PRODUCTS | NO_TMA | NO_NORMS | NO_NORMALISE | NO_ENDS)), check<G, STAGES, LEAD, F>, timed<G, STAGES, LEAD, F>}; }
#include "forward_variants.h"
int main(int argc, char** argv) {
  g_program = "forward";
  const std::vector<Variant> all = variants();
  if (has(argc, argv, "reference")) {
    const Host h = make(140, 4, 10, 70, false); const auto e = reference_all<double, false>(h), r = reference_all<float, true>(h);
    FILE* f = fopen("bin/reference.bin", "wb"); fwrite(e.data(), 4, e.size(), f); fwrite(r.data(), 4, r.size(), f); fclose(f);
    printf("rounded %g\n", relative(r, e)); return 0;
  }
  if (has(argc, argv, "list")) { for (auto& v : all) printf("%s\n", v.name); return 0; }
  cudaDeviceProp p; CK(cudaGetDeviceProperties(&p, 0)); g_sms = p.multiProcessorCount;
  make_fault(); load_driver();
  const int from = (int)number(argc, argv, "from", 0), to = (int)number(argc, argv, "to", 1000);
  const bool small = has(argc, argv, "sizes");
  if (has(argc, argv, "once")) { const Host h = make(1056, 4, 4, 16, true); Device d = device(h, 1, 0); CK(cudaDeviceSynchronize()); for (int i = from; i < (int)all.size() && i < to; ++i) all[i].timed(all[i].name, d, 1); return 0; }
  const Host hc = make(140, 4, 10, 70, false);   // two patches per SM and more steps than stages
  std::vector<float> exact, emu;
  if (has(argc, argv, "check")) {
    const std::string at = std::string(argv[0]).substr(0, std::string(argv[0]).rfind('/') + 1) + "reference.bin";
    exact.resize(140 * 768); emu.resize(140 * 768);
    FILE* f = fopen(at.c_str(), "rb");
    if (!f || fread(exact.data(), 4, exact.size(), f) != exact.size() || fread(emu.data(), 4, emu.size(), f) != emu.size()) { exact = reference_all<double, false>(hc); emu = reference_all<float, true>(hc); }
    if (f) fclose(f);
  }
  const Host h = make(4096, 4, 16, 256, true), h2 = make(4096, 2, 16, 256, true), h3 = make(1024, 4, 16, 256, true), h4 = make(1024, 2, 16, 256, true);
  Device d = device(h, 2, 0); CK(cudaDeviceSynchronize());
  Device dc; if (has(argc, argv, "check")) dc = device(hc, 1, 0);
  for (int i = from; i < (int)all.size() && i < to; ++i) {
    const Variant& v = all[i];
    g_right = -1;
    { J("begin", v.name).f("index", i); }
    if (v.whole && has(argc, argv, "check")) g_right = v.check(v.name, hc, dc, exact, emu);
    if (has(argc, argv, "time")) v.timed(v.name, d, (int)number(argc, argv, "runs", 12));
  }
  if (small) {   // also time the other sizes of the chosen variant
    for (const Host* o : {&h2, &h3, &h4}) { if (o->depth == 2 && from < (int)all.size() && strstr(all[from].name, "four")) continue; Device e = device(*o, 4, 0); CK(cudaDeviceSynchronize()); for (int i = from; i < (int)all.size() && i < to; ++i) all[i].timed(all[i].name, e, 10); release(e); }
  }
  return 0;
}
