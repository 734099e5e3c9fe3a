// Rates of the rest of the chip. roofs alu | mem | mix
#include "common.h"
static float* g_out; static long long* g_clocks; static int g_sms;
// ---- arithmetic: 1024 threads an SM, ILP independent chains a thread
struct Ffma { static __device__ void f(float& v, float a, float b) { asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(v) : "f"(a), "f"(b)); } };
struct Fadd { static __device__ void f(float& v, float a, float b) { asm volatile("add.rn.f32 %0, %0, %1;" : "+f"(v) : "f"(a)); } };
struct Tanh { static __device__ void f(float& v, float, float) { asm volatile("tanh.approx.f32 %0, %0;" : "+f"(v)); } };
struct Tanh2 { static __device__ void f(float& v, float, float) { asm volatile("{.reg .b32 t; mov.b32 t, %0; tanh.approx.bf16x2 t, t; mov.b32 %0, t;}" : "+f"(v)); } };
struct TanhH2 { static __device__ void f(float& v, float, float) { asm volatile("{.reg .b32 t; mov.b32 t, %0; tanh.approx.f16x2 t, t; mov.b32 %0, t;}" : "+f"(v)); } };
struct Ex2 { static __device__ void f(float& v, float, float) { asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(v)); } };
struct Ex2H2 { static __device__ void f(float& v, float, float) { asm volatile("{.reg .b32 t; mov.b32 t, %0; ex2.approx.f16x2 t, t; mov.b32 %0, t;}" : "+f"(v)); } };
struct Rcp { static __device__ void f(float& v, float a, float) { asm volatile("rcp.approx.ftz.f32 %0, %0;" : "+f"(v)); asm volatile("add.rn.f32 %0, %0, %1;" : "+f"(v) : "f"(a)); } };   // ptxas folds a reciprocal of a reciprocal
struct Rsqrt { static __device__ void f(float& v, float, float) { asm volatile("rsqrt.approx.ftz.f32 %0, %0;" : "+f"(v)); } };
struct RcpNewton { static __device__ void f(float& v, float, float) {
  float r, e; asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); asm volatile("fma.rn.f32 %0, %1, %2, 0f3F800000;" : "=f"(e) : "f"(-v), "f"(r)); asm volatile("fma.rn.f32 %0, %1, %2, %1;" : "=f"(v) : "f"(r), "f"(e)); } };
struct Rcp16 { static __device__ void f(float& v, float, float) { asm volatile("{.reg .f16 h; cvt.rn.f16.f32 h, %0; cvt.f32.f16 %0, h;}" : "+f"(v)); } };
struct Shfl { static __device__ void f(float& v, float, float) { asm volatile("{.reg .b32 t; mov.b32 t, %0; shfl.sync.bfly.b32 t, t, 1, 31, -1; mov.b32 %0, t;}" : "+f"(v)); } };
struct Pack { static __device__ void f(float& v, float a, float) { asm volatile("{.reg .b32 t; cvt.rn.bf16x2.f32 t, %0, %1; mov.b32 %0, t;}" : "+f"(v) : "f"(a)); } };
struct Iadd { static __device__ void f(float& v, float a, float) { asm volatile("{.reg .b32 t, u; mov.b32 t, %0; mov.b32 u, %1; xor.b32 t, t, u; add.s32 t, t, 77; mov.b32 %0, t;}" : "+f"(v) : "f"(a)); } };
struct Fminmax { static __device__ void f(float& v, float a, float b) { asm volatile("max.f32 %0, %0, %1;" : "+f"(v) : "f"(a)); } };
struct Ffma2 { static __device__ void f(float& v, float a, float b) { asm volatile("{.reg .b32 t, u, w; mov.b32 t, %0; mov.b32 u, %1; mov.b32 w, %2; fma.rn.bf16x2 t, t, u, w; mov.b32 %0, t;}" : "+f"(v) : "f"(a), "f"(b)); } };
// F multiply-adds for each reciprocal, as the loop of the correction
template <int F> struct Mix { static __device__ void f(float& v, float a, float b) {
  float r; asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
#pragma unroll
  for (int i = 0; i < F - 1; ++i) asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(v) : "f"(a), "f"(b));
  asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(v) : "f"(a), "f"(r)); } };
// 8 FFMA, 2 FADD, 1 FMNMX, 1 integer add, 1 reciprocal
struct Mixed { static __device__ void f(float& v, float a, float b) {
  float r; asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
#pragma unroll
  for (int i = 0; i < 7; ++i) asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(v) : "f"(a), "f"(b));
  asm volatile("add.rn.f32 %0, %0, %1;" : "+f"(v) : "f"(a)); asm volatile("max.f32 %0, %0, %1;" : "+f"(v) : "f"(b)); asm volatile("add.rn.f32 %0, %0, %1;" : "+f"(v) : "f"(b));
  asm volatile("{.reg .b32 t; mov.b32 t, %0; add.s32 t, t, 77; mov.b32 %0, t;}" : "+f"(v));
  asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(v) : "f"(a), "f"(r)); } };
// FFMA + LDS: one 16-byte broadcast load for each 12 FFMA (class codes from shared memory)
template <class Op, int ILP> __global__ void __launch_bounds__(1024) alu(float* out, long long* clocks, int iters, float a, float b) {
  float v[ILP];
#pragma unroll
  for (int i = 0; i < ILP; ++i) v[i] = 0.5f + 0.001f * (threadIdx.x + i);
  __syncthreads();
  const long long t0 = clock64();
#pragma unroll 1
  for (int i = 0; i < iters; ++i)
#pragma unroll
    for (int u = 0; u < 4; ++u)
#pragma unroll
      for (int j = 0; j < ILP; ++j) Op::f(v[j], a, b);
  __syncthreads();
  const long long t1 = clock64();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < ILP; ++i) sum += v[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0) clocks[blockIdx.x] = t1 - t0;
}
template <class Op, int ILP = 8> void op(const char* name, double instructions, int threads = 1024, int iters = 1000) {
  Timer t;
  const double s = t.median([&] { alu<Op, ILP><<<g_sms, threads>>>(g_out, g_clocks, iters, 0.99f, 0.01f); }, 3);
  std::vector<long long> c(g_sms);
  CK(cudaMemcpy(c.data(), g_clocks, g_sms * 8, cudaMemcpyDeviceToHost));
  std::sort(c.begin(), c.end());
  const double n = 4.0 * ILP * iters * threads;   // uses a block
  J("roof_alu", name).f("threads", threads).f("ops_clk_sm", n / c[g_sms / 2]).f("gops", n * g_sms / s * 1e-9).f("warp_instr_clk_sm", n * instructions / 32 / c[g_sms / 2]).f("ghz", c[g_sms / 2] / s * 1e-9);
}
// ---- shared memory
template <int KIND> __global__ void __launch_bounds__(1024) shared_rate(float* out, long long* clocks, int iters) {
  __shared__ alignas(1024) uint8_t raw[32768];
  for (int i = threadIdx.x; i < 8192; i += blockDim.x) reinterpret_cast<uint32_t*>(raw)[i] = hash32(i);
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // a warp's own 1 KiB; swizzled rows for the matrix loads
  const uint32_t at0 = smem(raw) + (KIND == 2 || KIND == 3 ? (warp % 8) * 2048 + (lane % 16) * 128 + (((lane / 16) ^ (lane & 7)) << 4) : KIND == 4 ? (warp & 7) * 16 : warp * 512 + lane * 16);
  uint32_t s0 = lane, s1 = 0, s2 = 0, s3 = 0;
  __syncthreads();
  const long long t0 = clock64();
#pragma unroll 1
  for (int i = 0; i < iters; ++i) {
    const uint32_t at = at0 ^ ((i & 1) * 64);
#pragma unroll
    for (int u = 0; u < 8; ++u) {
      uint32_t q0 = s0, q1 = s1, q2 = s2, q3 = s3;
      if (KIND == 0 || KIND == 4) asm volatile("ld.volatile.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(q0), "=r"(q1), "=r"(q2), "=r"(q3) : "r"(at + u * 2048));
      if (KIND == 1) asm volatile("st.shared.v4.b32 [%4], {%0,%1,%2,%3};" ::"r"(q0), "r"(q1), "r"(q2), "r"(q3), "r"(at + u * 2048));
      if (KIND == 2) asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(q0), "=r"(q1), "=r"(q2), "=r"(q3) : "r"(at + (u & 7) * 2048));
      if (KIND == 3) asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%4], {%0,%1,%2,%3};" ::"r"(q0), "r"(q1), "r"(q2), "r"(q3), "r"(at + (u & 7) * 2048));
      s0 ^= q0; s1 ^= q1; s2 ^= q2; s3 ^= q3;
    }
  }
  __syncthreads();
  const long long t1 = clock64();
  out[blockIdx.x * blockDim.x + threadIdx.x] = s0 ^ s1 ^ s2 ^ s3;
  if (threadIdx.x == 0) clocks[blockIdx.x] = t1 - t0;
}
template <int KIND> void shared_op(const char* name) {
  Timer t; const int iters = 500;
  const double s = t.median([&] { shared_rate<KIND><<<g_sms, 1024>>>(g_out, g_clocks, iters); }, 3);
  std::vector<long long> c(g_sms);
  CK(cudaMemcpy(c.data(), g_clocks, g_sms * 8, cudaMemcpyDeviceToHost));
  std::sort(c.begin(), c.end());
  J("roof_shared", name).f("bytes_clk_sm", 8.0 * iters * 1024 * 16 / c[g_sms / 2]).f("tb_s", 8.0 * iters * 1024 * 16 * g_sms / s * 1e-12);
}
// ---- global memory
__global__ void __launch_bounds__(512) copy(const uint4* __restrict__ from, uint4* __restrict__ to, size_t n) {
  const size_t step = (size_t)gridDim.x * blockDim.x;
  size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  for (; i + 3 * step < n; i += 4 * step) {
    const uint4 a = __ldcs(from + i), b = __ldcs(from + i + step), c = __ldcs(from + i + 2 * step), d = __ldcs(from + i + 3 * step);
    __stcs(to + i, a); __stcs(to + i + step, b); __stcs(to + i + 2 * step, c); __stcs(to + i + 3 * step, d);
  }
  for (; i < n; i += step) to[i] = from[i];
}
__global__ void __launch_bounds__(256) copy_flat(const uint4* __restrict__ from, uint4* __restrict__ to, size_t n) {   // one block 16 KiB
  const size_t i = blockIdx.x * (size_t)1024 + threadIdx.x;
  if (i + 768 < n) {
    const uint4 a = from[i], b = from[i + 256], c = from[i + 512], d = from[i + 768];
    to[i] = a; to[i + 256] = b; to[i + 512] = c; to[i + 768] = d;
  }
}
__global__ void __launch_bounds__(512) read(const uint4* __restrict__ from, uint32_t* out, size_t n, int times) {
  const size_t step = (size_t)gridDim.x * blockDim.x;
  uint32_t sum = 0;
  for (int t = 0; t < times; ++t) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    for (; i < n; i += 4 * step) {
      uint4 q[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) { q[j] = make_uint4(0, 0, 0, 0); if (i + j * step < n) asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(q[j].x), "=r"(q[j].y), "=r"(q[j].z), "=r"(q[j].w) : "l"(from + i + j * step)); }
#pragma unroll
      for (int j = 0; j < 4; ++j) sum ^= q[j].x ^ q[j].y ^ q[j].z ^ q[j].w;
    }
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
__global__ void __launch_bounds__(512) write(uint4* to, size_t n) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) to[i] = make_uint4(i, 1, 2, 3);
}
// The copy engine: each block takes every gridDim-th piece of PIECE bytes through STAGES stages; one thread issues, waits, forgets.
template <int PIECE, int STAGES> __global__ void __launch_bounds__(32) bulk_read(const uint8_t* from, int pieces, int each, float* out) {
  extern __shared__ uint8_t raw[];
  uint8_t* base = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  __shared__ uint64_t full[STAGES];
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) init(&full[i], 1);
    init_fence();
    const int mine = (pieces - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    auto load = [&](int i) {
      const int s = i % STAGES;
      expect(&full[s], PIECE);
      const uint8_t* p = from + ((size_t)blockIdx.x + (size_t)i * gridDim.x) * PIECE;
      for (int k = 0; k < PIECE; k += each) bulk(base + s * PIECE + k, p + k, &full[s], each);
    };
    for (int i = 0; i < STAGES && i < mine; ++i) load(i);
    for (int i = 0; i < mine; ++i) { wait(&full[i % STAGES], i / STAGES & 1, 50); if (i + STAGES < mine) load(i + STAGES); }
    out[blockIdx.x] = base[0];
  }
}
// In and out by the copy engine, the traffic of the backward: load stage, store stage, reuse when the store two pieces back has read it.
template <int PIECE, int STAGES> __global__ void __launch_bounds__(32) bulk_copy(const uint8_t* from, uint8_t* to, int pieces) {
  extern __shared__ uint8_t raw[];
  uint8_t* base = raw + (-smem(raw) & 1023);
  __shared__ uint64_t full[STAGES];
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) init(&full[i], 1);
    init_fence();
    const int mine = (pieces - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    auto load = [&](int i) {
      if (i >= mine) return;
      const int s = i % STAGES;
      expect(&full[s], PIECE);
      bulk(base + s * PIECE, from + ((size_t)blockIdx.x + (size_t)i * gridDim.x) * PIECE, &full[s], PIECE);
    };
    for (int i = 0; i < STAGES - 2; ++i) load(i);
    for (int i = 0; i < mine; ++i) {
      const int s = i % STAGES;
      wait(&full[s], i / STAGES & 1, 52);
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to + ((size_t)blockIdx.x + (size_t)i * gridDim.x) * PIECE), "r"(smem(base + s * PIECE)), "r"(PIECE) : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      asm volatile("cp.async.bulk.wait_group.read 2;" ::: "memory");
      load(i + STAGES - 2);
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
__device__ __forceinline__ void bulk_hint(void* to, const void* from, uint64_t* bar, int bytes, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(smem(to)), "l"(from), "r"(bytes), "r"(smem(bar)), "l"(policy) : "memory");
}
template <int PIECE, int STAGES> __global__ void __launch_bounds__(32) bulk_read_first(const uint8_t* from, int pieces, int, float* out) {   // evict first
  extern __shared__ uint8_t raw[];
  uint8_t* base = raw + (-smem(raw) & 1023);
  __shared__ uint64_t full[STAGES];
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) init(&full[i], 1);
    init_fence();
    uint64_t policy; asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    const int mine = (pieces - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    auto load = [&](int i) { const int s = i % STAGES; expect(&full[s], PIECE); bulk_hint(base + s * PIECE, from + ((size_t)blockIdx.x + (size_t)i * gridDim.x) * PIECE, &full[s], PIECE, policy); };
    for (int i = 0; i < STAGES && i < mine; ++i) load(i);
    for (int i = 0; i < mine; ++i) { wait(&full[i % STAGES], i / STAGES & 1, 53); if (i + STAGES < mine) load(i + STAGES); }
    out[blockIdx.x] = base[0];
  }
}
template <int PIECE, int STAGES> __global__ void __launch_bounds__(32) tensor_read(const __grid_constant__ CUtensorMap map, int pieces, float* out) {   // rows of 128 bytes, boxes of 64 rows
  extern __shared__ uint8_t raw[];
  uint8_t* base = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  __shared__ uint64_t full[STAGES];
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) init(&full[i], 1);
    init_fence();
    const int mine = (pieces - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    auto load = [&](int i) {
      const int s = i % STAGES;
      expect(&full[s], PIECE);
      for (int k = 0; k < PIECE; k += 16384) tma2(base + s * PIECE + k, &map, &full[s], 0, (int)(((size_t)blockIdx.x + (size_t)i * gridDim.x) * (PIECE / 128) + k / 128));
    };
    for (int i = 0; i < STAGES && i < mine; ++i) load(i);
    for (int i = 0; i < mine; ++i) { wait(&full[i % STAGES], i / STAGES & 1, 51); if (i + STAGES < mine) load(i + STAGES); }
    out[blockIdx.x] = base[0];
  }
}
// Latencies: one thread.
__global__ void latencies(long long* to, const uint32_t* chase, float x) {
  __shared__ uint32_t s[64];
  s[threadIdx.x] = (threadIdx.x * 4 + 4) & 127;
  __syncwarp();
  if (threadIdx.x) return;
  uint32_t at = 0; long long t0;
  t0 = clock64(); for (int i = 0; i < 256; ++i) at = *(volatile uint32_t*)((char*)s + at); to[0] = clock64() - t0;
  uint32_t g = at & 0;
  for (int i = 0; i < 64; ++i) g = __ldcg(chase + g);
  g = g & 0;
  t0 = clock64(); for (int i = 0; i < 256; ++i) g = __ldcg(chase + g); to[1] = clock64() - t0 + (g == 12345678);
  float v = x;
  t0 = clock64();
#pragma unroll 1
  for (int i = 0; i < 16; ++i) {
#pragma unroll
    for (int j = 0; j < 16; ++j) v = tanh_(v);
  }
  to[2] = clock64() - t0; 
  t0 = clock64();
#pragma unroll 1
  for (int i = 0; i < 16; ++i) {
#pragma unroll
    for (int j = 0; j < 16; ++j) v = fmaf(v, x, x);
  }
  to[3] = clock64() - t0; to[4] = (long long)v + at;
}
__global__ void empty() {}
static void memory(double gb) {
  Timer t;
  const size_t bytes = (size_t)(gb * 1e9) / 16777216 * 16777216, n = bytes / 16;
  uint8_t *a, *b; CK(cudaMalloc(&a, bytes)); CK(cudaMalloc(&b, bytes));
  fill_bf16<<<g_sms * 8, 512>>>((__nv_bfloat16*)a, bytes / 2, 1, 1.0f); CK(cudaDeviceSynchronize());
  double best, s;
  for (int k : {2, 4}) { s = t.median([&] { copy<<<g_sms * k, 512>>>((uint4*)a, (uint4*)b, n); }, 7, &best); J("roof_mem", "copy_persistent").f("blocks_sm", k).f("gb", bytes * 1e-9).f("gb_s", 2 * bytes / s * 1e-9).f("best_gb_s", 2 * bytes / best * 1e-9); }
  s = t.median([&] { copy_flat<<<(unsigned)(n / 1024), 256>>>((uint4*)a, (uint4*)b, n); }, 7, &best); J("roof_mem", "copy_flat").f("gb_s", 2 * bytes / s * 1e-9).f("best_gb_s", 2 * bytes / best * 1e-9);
  s = t.median([&] { cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice); }, 5, &best); J("roof_mem", "memcpy").f("gb_s", 2 * bytes / s * 1e-9).f("best_gb_s", 2 * bytes / best * 1e-9);
  s = t.median([&] { read<<<g_sms * 4, 512>>>((uint4*)a, (uint32_t*)g_out, n, 1); }, 7, &best); J("roof_mem", "read").f("gb_s", bytes / s * 1e-9).f("best_gb_s", bytes / best * 1e-9);
  s = t.median([&] { write<<<g_sms * 4, 512>>>((uint4*)b, n); }, 5, &best); J("roof_mem", "write").f("gb_s", bytes / s * 1e-9).f("best_gb_s", bytes / best * 1e-9);
  // 512 MB: the weights of XL 4096
  const size_t part = (size_t)512 << 20;
  for (int k = 0; k < 2; ++k) { int i = 0; s = t.median([&] { read<<<g_sms * 4, 512>>>((uint4*)(a + part * (i++ % 4)), (uint32_t*)g_out, part / 16, 1); }, 9, &best); }
  J("roof_mem", "read_512MB").f("gb_s", part / s * 1e-9).f("us", s * 1e6);
  auto bulk_run = [&](auto kernel, const char* name, int piece, int stages, int each, int blocks) {
    CK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, piece * stages + 1024));
    int i = 0;
    s = t.median([&] { kernel<<<g_sms * blocks, 32, piece * stages + 1024>>>(a + part * (i++ % 4), (int)(part / piece), each, g_out); }, 9, &best);
    J("roof_mem", name).f("piece", piece).f("stages", stages).f("each", each).f("blocks_sm", blocks).f("gb_s", part / s * 1e-9).f("best_gb_s", part / best * 1e-9);
  };
  bulk_run(bulk_read<32768, 2>, "bulk_read_512MB", 32768, 2, 32768, 1);
  bulk_run(bulk_read<32768, 3>, "bulk_read_512MB", 32768, 3, 32768, 1);
  bulk_run(bulk_read<32768, 4>, "bulk_read_512MB", 32768, 4, 32768, 1);
  bulk_run(bulk_read<32768, 6>, "bulk_read_512MB", 32768, 6, 32768, 1);
  bulk_run(bulk_read<32768, 4>, "bulk_read_512MB", 32768, 4, 8192, 1);
  bulk_run(bulk_read<16384, 6>, "bulk_read_512MB", 16384, 6, 16384, 2);
  bulk_run(bulk_read_first<32768, 4>, "bulk_read_evict_first_512MB", 32768, 4, 32768, 1);
  {
    auto k = bulk_copy<32768, 6>; CK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, 32768 * 6 + 1024));
    int i = 0;
    s = t.median([&] { k<<<g_sms, 32, 32768 * 6 + 1024>>>(a + part * (i % 4), b + part * (i % 4), (int)(part / 32768)); ++i; }, 9, &best);
    J("roof_mem", "bulk_copy_512MB_in_and_out").f("gb_s", 2 * part / s * 1e-9).f("copy_best_gb_s", 2 * part / best * 1e-9);
  }
  for (int st : {2, 3, 4, 6}) {
    CUtensorMap m[4];
    for (int i = 0; i < 4; ++i) m[i] = tensor_map(a + part * i, {64, part / 128}, {64, 128});
    int i = 0;
    auto go = [&](auto kernel) {
      CK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 32768 * st + 1024));
      s = t.median([&] { kernel<<<g_sms, 32, 32768 * st + 1024>>>(m[i++ % 4], (int)(part / 32768), g_out); }, 9, &best);
    };
    if (st == 2) go(tensor_read<32768, 2>); else if (st == 3) go(tensor_read<32768, 3>); else if (st == 4) go(tensor_read<32768, 4>); else go(tensor_read<32768, 6>);
    J("roof_mem", "tensor_read_512MB").f("piece", 32768).f("stages", st).f("gb_s", part / s * 1e-9).f("best_gb_s", part / best * 1e-9);
  }
  for (int mb : {8, 16, 24, 32, 40}) { const size_t l = (size_t)mb << 20; s = t.median([&] { read<<<g_sms * 2, 512>>>((uint4*)a, (uint32_t*)g_out, l / 16, 20); }, 5); J("roof_l2", "read").f("mb", mb).f("tb_s", 20.0 * l / s * 1e-12); }
  bulk_run(bulk_read<32768, 4>, "bulk_read_512MB_again", 32768, 4, 32768, 1);
  // launches
  s = t.median([&] { for (int i = 0; i < 200; ++i) empty<<<1, 32>>>(); }, 5); J("launch", "stream").f("us", s / 200 * 1e6);
  cudaStream_t st; CK(cudaStreamCreate(&st)); cudaGraph_t g; cudaGraphExec_t x;
  CK(cudaStreamBeginCapture(st, cudaStreamCaptureModeGlobal)); for (int i = 0; i < 200; ++i) empty<<<g_sms, 384, 0, st>>>(); CK(cudaStreamEndCapture(st, &g)); CK(cudaGraphInstantiate(&x, g, 0));
  { cudaEvent_t e0, e1; cudaEventCreate(&e0); cudaEventCreate(&e1); double m = 1; for (int i = 0; i < 5; ++i) { cudaEventRecord(e0, st); cudaGraphLaunch(x, st); cudaEventRecord(e1, st); cudaEventSynchronize(e1); float ms; cudaEventElapsedTime(&ms, e0, e1); m = std::min(m, ms * 1e-3); } J("launch", "graph").f("us", m / 200 * 1e6); }
  long long* l; uint32_t* chase; CK(cudaMalloc(&l, 64)); CK(cudaMalloc(&chase, 4 << 20));
  { std::vector<uint32_t> c(1 << 20); for (int i = 0; i < 1 << 20; ++i) c[i] = (i + 4093 * 32) & ((1 << 20) - 1); CK(cudaMemcpy(chase, c.data(), 4 << 20, cudaMemcpyHostToDevice)); }
  latencies<<<1, 32>>>(l, chase, 0.5f); CK(cudaDeviceSynchronize());
  latencies<<<1, 32>>>(l, chase, 0.5f); CK(cudaDeviceSynchronize());
  long long h[5]; CK(cudaMemcpy(h, l, 40, cudaMemcpyDeviceToHost));
  J("latency", "clocks").f("shared", h[0] / 256.0).f("l2", h[1] / 256.0).f("tanh", h[2] / 256.0).f("ffma", h[3] / 256.0);
}
static void arithmetic() {
  op<Ffma>("ffma", 1); op<Ffma, 16>("ffma_ilp16", 1); op<Ffma>("ffma_512_threads", 1, 512); op<Ffma>("ffma_256_threads", 1, 256);
  op<Fadd>("fadd", 1); op<Fminmax>("fmnmx", 1); op<Ffma2>("hfma2_bf16", 1); op<Iadd>("lop_iadd_pair", 2);
  op<Tanh>("tanh_approx_f32", 1); op<Tanh2>("tanh_approx_bf16x2", 1); op<TanhH2>("tanh_approx_f16x2", 1); op<Ex2>("ex2_approx_f32", 1); op<Ex2H2>("ex2_approx_f16x2", 1);
  op<Rcp>("rcp_approx_f32_and_add", 2); op<Rsqrt>("rsqrt_approx_f32", 1); op<RcpNewton>("rcp_newton", 3); op<Tanh>("tanh_256_threads", 1, 256);
  op<Pack>("cvt_bf16x2", 1); op<Rcp16>("cvt_f16_and_back", 2); op<Shfl>("shfl", 1);
  shared_op<0>("ld_v4"); shared_op<4>("ld_v4_broadcast"); shared_op<1>("st_v4"); shared_op<2>("ldmatrix_x4"); shared_op<3>("stmatrix_x4");
}
static void mixes() {   // warp_instr_clk_sm against 4 is the question
  op<Mix<8>>("ffma8_rcp1", 9); op<Mix<10>>("ffma10_rcp1", 11); op<Mix<11>>("ffma11_rcp1", 12); op<Mix<12>>("ffma12_rcp1", 13); op<Mix<16>>("ffma16_rcp1", 17); op<Mix<7>>("ffma7_rcp1", 8); op<Mix<6>>("ffma6_rcp1", 7); op<Mix<4>>("ffma4_rcp1", 5);
  op<Mixed>("ffma8_fadd2_fmnmx_iadd_rcp", 13); op<Mix<12>, 4>("ffma12_rcp1_ilp4", 13); op<Mix<12>, 2>("ffma12_rcp1_ilp2", 13); op<Mix<12>, 4>("ffma12_rcp1_ilp4_512", 13, 512); op<Mix<12>, 4>("ffma12_rcp1_ilp4_256", 13, 256);
}
int main(int argc, char** argv) {
  g_program = "roofs";
  if (has(argc, argv, "--dry")) { J("dry", "ok"); return 0; }
  cudaDeviceProp p; CK(cudaGetDeviceProperties(&p, 0)); g_sms = p.multiProcessorCount;
  int rate = 0, mem_rate = 0; cudaDeviceGetAttribute(&rate, cudaDevAttrClockRate, 0); cudaDeviceGetAttribute(&mem_rate, cudaDevAttrMemoryClockRate, 0);
  CK(cudaMalloc(&g_out, g_sms * 4096 * 4)); CK(cudaMalloc(&g_clocks, g_sms * 8));
  if (has(argc, argv, "mem")) {
    J("device", p.name).f("sms", g_sms).f("l2", p.l2CacheSize).f("shared_optin", p.sharedMemPerBlockOptin).f("shared_sm", p.sharedMemPerMultiprocessor).f("clock_khz", rate).f("mem_khz", mem_rate).f("gib", p.totalGlobalMem / 1073741824.0);
    make_fault(); load_driver(); memory(number(argc, argv, "gb", 4.0));
  }
  if (has(argc, argv, "alu")) arithmetic();
  if (has(argc, argv, "mix")) mixes();
  return 0;
}
