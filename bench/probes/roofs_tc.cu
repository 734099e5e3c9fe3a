// Rates of the tensor cores: wgmma from registers and from shared memory, and mma.sync. One block an SM.
#include "common.h"
#include "wgmma.h"
// MODE 0: A from registers, B MN-major. 1: A, B from shared memory, A M-major, B K-major. 2: like 0 with B K-major.
template <int N, int MODE> __global__ void __launch_bounds__(N == 256 ? 256 : 512, 1) rate(float* out, long long* clocks, int iters) {
  extern __shared__ uint8_t raw[];
  uint8_t* base = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  for (int i = threadIdx.x; i < 65536 / 2; i += blockDim.x) reinterpret_cast<__nv_bfloat16*>(base)[i] = __float2bfloat16(noise(i, 1) * 0.125f);
  proxy();
  __syncthreads();
  const uint32_t at = smem(base), b = at, a = at + 32768 + group * 8192;
  float d[N / 2];
  uint32_t r[16];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) r[i] = pack(noise(threadIdx.x * 16 + i, 2), noise(threadIdx.x * 16 + i, 3));
  __syncthreads();
  const long long t0 = clock64();
#pragma unroll 1
  for (int i = 0; i < iters; ++i) {
    fence();
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t mn = descriptor(b + 2048 * k, descriptor_bits(8192, 1024)), km = descriptor(b + 32 * k, descriptor_bits(16, 1024));
        if (MODE == 0) W<0, N>::template rs<1>(d, r + 4 * k, mn, 1);
        if (MODE == 1) W<0, N>::template ss<1, 0>(d, descriptor(a + 2048 * k), km, 1);
        if (MODE == 2) W<0, N>::template rs<0>(d, r + 4 * k, km, 1);
      }
    commit();
    drain<0>();
    pin(d);
  }
  __syncthreads();
  const long long t1 = clock64();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sum += d[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0) clocks[blockIdx.x] = t1 - t0;
}
// The shape of the forward: two chains of n64 a warp group in flight.
__global__ void __launch_bounds__(512, 1) rate_two(float* out, long long* clocks, int iters) {
  extern __shared__ uint8_t raw[];
  uint8_t* base = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  for (int i = threadIdx.x; i < 65536 / 2; i += blockDim.x) reinterpret_cast<__nv_bfloat16*>(base)[i] = __float2bfloat16(noise(i, 1) * 0.125f);
  proxy();
  __syncthreads();
  const uint32_t b = smem(base);
  float d[32] = {}, e[32] = {};
  uint32_t r[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) r[i] = pack(noise(threadIdx.x * 16 + i, 2), noise(threadIdx.x * 16 + i, 3));
  __syncthreads();
  const long long t0 = clock64();
#pragma unroll 1
  for (int i = 0; i < iters; ++i) {
    fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) W<0, 64>::rs<1>(d, r + 4 * k, descriptor(b + 2048 * k), k != 0);
    commit();
    fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) W<0, 64>::rs<1>(e, r + 4 * k, descriptor(b + 8192 + 2048 * k), k != 0);
    commit();
    drain<1>(); pin(d);
    drain<0>(); pin(e);
  }
  __syncthreads();
  const long long t1 = clock64();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) sum += d[i] + e[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0) clocks[blockIdx.x] = t1 - t0;
}
__global__ void __launch_bounds__(1024, 1) rate_sync(float* out, long long* clocks, int iters) {
  float d[8][4] = {};
  uint32_t a[4], b[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack(noise(threadIdx.x * 16 + i, 2), noise(threadIdx.x * 16 + i, 3));
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = pack(noise(threadIdx.x * 16 + i, 4), noise(threadIdx.x * 16 + i, 5));
  __syncthreads();
  const long long t0 = clock64();
#pragma unroll 1
  for (int i = 0; i < iters; ++i)
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  __syncthreads();
  const long long t1 = clock64();
  float sum = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum += d[j][0] + d[j][1] + d[j][2] + d[j][3];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (threadIdx.x == 0) clocks[blockIdx.x] = t1 - t0;
}
static float* g_out; static long long* g_clocks; static int g_sms;
template <class K> void measure(const char* name, K kernel, int threads, int shared, int iters, double flop_a_block_iter) {
  if (shared) CK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  Timer t;
  const double s = t.median([&] { kernel<<<g_sms, threads, shared>>>(g_out, g_clocks, iters); }, 5);
  std::vector<long long> c(g_sms);
  CK(cudaMemcpy(c.data(), g_clocks, g_sms * 8, cudaMemcpyDeviceToHost));
  std::sort(c.begin(), c.end());
  const double flop = flop_a_block_iter * iters;
  J("roof_tc", name).f("warp_groups", threads / 128).f("tflops", flop * g_sms / s * 1e-12).f("flop_clk_sm", flop / c[g_sms / 2]).f("us", s * 1e6).f("ghz", c[g_sms / 2] / s * 1e-9);
}
int main(int argc, char** argv) {
  g_program = "roofs_tc";
  if (has(argc, argv, "--dry")) { J("dry", "ok"); return 0; }
  cudaDeviceProp p; CK(cudaGetDeviceProperties(&p, 0)); g_sms = p.multiProcessorCount;
  CK(cudaMalloc(&g_out, g_sms * 1024 * 4)); CK(cudaMalloc(&g_clocks, g_sms * 8));
  const int S = 66 * 1024 + 1024;
  for (int g = 1; g <= 4; ++g) {
    const double f = 2.0 * 64 * 16 * 16 * g;   // 2 m k of 16 products a group; times n
    measure("rs_n64_bMN", rate<64, 0>, 128 * g, S, 2000, f * 64);
    measure("rs_n128_bMN", rate<128, 0>, 128 * g, S, 1000, f * 128);
    if (g <= 2) measure("rs_n256_bMN", rate<256, 0>, 128 * g, S, 500, f * 256);
    measure("ss_n64_aM_bK", rate<64, 1>, 128 * g, S, 2000, f * 64);
    measure("ss_n128_aM_bK", rate<128, 1>, 128 * g, S, 1000, f * 128);
    measure("rs_n64_bK", rate<64, 2>, 128 * g, S, 2000, f * 64);
    measure("rs_n64_two_chains_of_4", rate_two, 128 * g, S, 4000, 2.0 * 64 * 64 * 64 * 2 * g);
  }
  for (int w = 4; w <= 32; w *= 2) measure(("mma_sync_" + std::to_string(w) + "_warps").c_str(), rate_sync, 32 * w, 0, 2000, 2.0 * 16 * 8 * 16 * 16 * w);
  // A long run (about 0.25 s) of the fastest shape: the clock under load.
  measure("rs_n128_long", rate<128, 0>, 256, S, 30000, 2.0 * 64 * 16 * 16 * 2 * 128);
  return 0;
}
