// Shared by the probes: error checks, JSON output, timing, mbarriers with a bounded wait, TMA.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
static const char* g_program = "?";
struct J {
  std::string s;
  J(const char* kind, const std::string& name) { s = std::string("{\"program\":\"") + g_program + "\",\"kind\":\"" + kind + "\",\"name\":\"" + name + "\""; }
  J& f(const char* k, double v) {
    char b[64];
    if (std::isfinite(v)) snprintf(b, sizeof b, ",\"%s\":%.6g", k, v); else snprintf(b, sizeof b, ",\"%s\":null", k);
    s += b; return *this;
  }
  J& t(const char* k, const std::string& v) {
    s += std::string(",\"") + k + "\":\"";
    for (char c : v) if (c == '"' || c == '\\') { s += '\\'; s += c; } else if (c >= 32) s += c;
    s += "\""; return *this;
  }
  J& b(const char* k, bool v) { s += std::string(",\"") + k + "\":" + (v ? "true" : "false"); return *this; }
  J& raw(const char* k, const std::string& v) { s += std::string(",\"") + k + "\":" + v; return *this; }
  ~J() { s += "}\n"; fputs(s.c_str(), stdout); fflush(stdout); }
};
static int* g_fault_host = nullptr;
#define CK(x) do { cudaError_t e_ = (x); if (e_ != cudaSuccess) { { J("error", #x).t("what", cudaGetErrorString(e_)).f("line", __LINE__).t("file", __FILE__).f("fault", g_fault_host ? *g_fault_host : 0); } _Exit(3); } } while (0)
// The CUDA error as a string, "" for none: for steps whose failure must not end the program.
static std::string sync_error() { cudaError_t a = cudaGetLastError(), b = cudaDeviceSynchronize(); return a != cudaSuccess ? cudaGetErrorString(a) : b != cudaSuccess ? cudaGetErrorString(b) : ""; }
static bool has(int argc, char** argv, const char* flag) { for (int i = 1; i < argc; ++i) if (!strcmp(argv[i], flag)) return true; return false; }
static double number(int argc, char** argv, const char* key, double otherwise) {   // key=value
  const size_t n = strlen(key);
  for (int i = 1; i < argc; ++i) if (!strncmp(argv[i], key, n) && argv[i][n] == '=') return atof(argv[i] + n + 1);
  return otherwise;
}
struct Timer {
  cudaEvent_t a, b;
  Timer() { CK(cudaEventCreate(&a)); CK(cudaEventCreate(&b)); }
  template <class F> double once(F&& f) { CK(cudaEventRecord(a)); f(); CK(cudaEventRecord(b)); CK(cudaEventSynchronize(b)); CK(cudaGetLastError()); float ms; CK(cudaEventElapsedTime(&ms, a, b)); return ms * 1e-3; }
  // Median and best seconds of `reps` runs, after one warm-up run.
  template <class F> double median(F&& f, int reps, double* best = nullptr) {
    f(); CK(cudaDeviceSynchronize());
    std::vector<double> v; for (int i = 0; i < reps; ++i) v.push_back(once(f));
    std::sort(v.begin(), v.end()); if (best) *best = v[0]; return v[v.size() / 2];
  }
};
static CUresult (*g_encode)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) = nullptr;
static void load_driver() {
  cudaDriverEntryPointQueryResult q;
  CK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&g_encode, 12000, cudaEnableDefault, &q));
  if (!g_encode) { { J("error", "cuTensorMapEncodeTiled").t("what", "not found"); } _Exit(3); }
}
// Tensor map of a contiguous bf16 array, innermost dimension first.
static CUtensorMap tensor_map(void* at, std::vector<uint64_t> dims, std::vector<uint32_t> box, CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  CUtensorMap m; cuuint64_t d[5], st[5]; cuuint32_t b[5], e[5]; uint64_t stride = 2;
  for (size_t i = 0; i < dims.size(); ++i) { d[i] = dims[i]; b[i] = box[i]; e[i] = 1; stride *= dims[i]; st[i] = stride; }
  const CUresult r = g_encode(&m, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, (cuuint32_t)dims.size(), at, d, st, b, e, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS) { { J("error", "encode").f("code", (int)r); } _Exit(3); }
  return m;
}
__device__ int* g_fault;
static void make_fault() {
  CK(cudaHostAlloc(&g_fault_host, 64, cudaHostAllocMapped)); *g_fault_host = 0;
  int* p; CK(cudaHostGetDevicePointer(&p, g_fault_host, 0)); CK(cudaMemcpyToSymbol(g_fault, &p, sizeof p));
}
__device__ __forceinline__ uint32_t smem(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ bool try_wait(uint32_t bar, int parity) {
  uint32_t ok;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}" : "=r"(ok) : "r"(bar), "r"(parity) : "memory");
  return ok;
}
__device__ __forceinline__ bool test(uint64_t* bar, int parity) {
  uint32_t ok;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}" : "=r"(ok) : "r"(smem(bar)), "r"(parity) : "memory");
  return ok;
}
__device__ __forceinline__ uint32_t nanoseconds() { uint32_t t; asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(t)); return t; }
// Wait at most 0.3 s, then record the code of the barrier and trap.
__device__ __forceinline__ void wait(uint64_t* bar, int parity, int code = 0) {
  const uint32_t at = smem(bar);
  if (try_wait(at, parity)) return;
  const uint32_t start = nanoseconds();
  while (!try_wait(at, parity))
    if (nanoseconds() - start > 300000000u) { *(volatile int*)g_fault = 1000 + code; __threadfence_system(); asm volatile("trap;"); }
}
// Unbounded wait for the consumers: with the bounded wait, ptxas serialises the products of the backward (C7512). The bounded waits of
// the producer still end a kernel that hangs.
__device__ __forceinline__ void spin(uint64_t* bar, int parity) { const uint32_t at = smem(bar); while (!try_wait(at, parity)); }
__device__ __forceinline__ void init(uint64_t* bar, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem(bar)), "r"(count) : "memory"); }
__device__ __forceinline__ void init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive(uint64_t* bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem(bar)) : "memory"); }
__device__ __forceinline__ void expect(uint64_t* bar, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem(bar)), "r"(bytes) : "memory"); }
__device__ __forceinline__ void tma3(void* to, const CUtensorMap* map, uint64_t* bar, int a, int b, int c) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem(to)), "l"(map), "r"(smem(bar)), "r"(a), "r"(b), "r"(c) : "memory");
}
__device__ __forceinline__ void tma2(void* to, const CUtensorMap* map, uint64_t* bar, int a, int b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(smem(to)), "l"(map), "r"(smem(bar)), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void tma3_store(const CUtensorMap* map, const void* from, int a, int b, int c) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(smem(from)), "r"(a), "r"(b), "r"(c) : "memory");
}
__device__ __forceinline__ void tma2_store(const CUtensorMap* map, const void* from, int a, int b) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(smem(from)), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void bulk(void* to, const void* from, uint64_t* bar, int bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem(to)), "l"(from), "r"(bytes), "r"(smem(bar)) : "memory");
}
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void drain() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
template <int N> __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ __forceinline__ void proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Bits of a wgmma descriptor: leading and stride byte offsets, by default with 128-byte swizzle.
__device__ __host__ constexpr uint64_t descriptor_bits(uint32_t lbo, uint32_t sbo, int swizzle = 1, int base = 0) {
  return (uint64_t)(lbo >> 4 & 0x3fff) << 16 | (uint64_t)(sbo >> 4 & 0x3fff) << 32 | (uint64_t)(base & 7) << 49 | (uint64_t)swizzle << 62;
}
__device__ __forceinline__ uint64_t descriptor(uint32_t at, uint64_t bits = descriptor_bits(16, 1024)) { return (uint64_t)((at & 0x3ffff) >> 4) | bits; }
__device__ __forceinline__ void lds4(uint32_t (&q)[4], uint32_t at) { asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(q[0]), "=r"(q[1]), "=r"(q[2]), "=r"(q[3]) : "r"(at)); }
__device__ __forceinline__ void sts4(uint32_t at, const uint32_t (&q)[4]) { asm volatile("st.shared.v4.b32 [%4], {%0,%1,%2,%3};" ::"r"(q[0]), "r"(q[1]), "r"(q[2]), "r"(q[3]), "r"(at) : "memory"); }
template <int ID, int N> __device__ __forceinline__ void bar_sync() { asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(N) : "memory"); }
template <int N> __device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
__device__ __forceinline__ void ldmatrix4(uint32_t* r, uint32_t at) { asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory"); }
__device__ __forceinline__ void ldmatrix4_t(uint32_t* r, uint32_t at) { asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory"); }
__device__ __forceinline__ void stmatrix4(uint32_t at, const uint32_t* r) { asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"); }
__device__ __forceinline__ void stmatrix4_t(uint32_t at, const uint32_t* r) { asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"); }
__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) { uint32_t r; asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) { uint32_t r; asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ __forceinline__ uint32_t pack(float a, float b) { uint32_t r; asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b)); return r; }
__device__ __forceinline__ float tanh_(float y) { float t; asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(y)); return t; }
__device__ __host__ inline uint32_t hash32(uint32_t x) { x ^= x >> 16; x *= 0x7feb352dU; x ^= x >> 15; x *= 0x846ca68bU; x ^= x >> 16; return x; }
// Approximately normal with variance 1: the sum of four uniform bytes.
__device__ __host__ inline float noise(uint32_t i, uint32_t seed) {
  const uint32_t h = hash32(i * 0x9E3779B1u + hash32(seed));
  return ((float)(h & 255) + (float)(h >> 8 & 255) + (float)(h >> 16 & 255) + (float)(h >> 24) - 510.0f) * (1.0f / 147.8f);
}
static __global__ void fill_bf16(__nv_bfloat16* p, size_t n, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) p[i] = __float2bfloat16(scale * noise((uint32_t)i, seed));
}
// Helpers of the host references.
static float rounded(float v) { return __bfloat162float(__float2bfloat16(v)); }
static double relative(const std::vector<float>& a, const std::vector<float>& b) { double d = 0, s = 0; for (size_t i = 0; i < a.size(); ++i) { const double e = (double)a[i] - b[i]; d += e * e; s += (double)b[i] * b[i]; } return std::sqrt(d / s); }
template <class T> static T* up(const std::vector<T>& v) { T* d; CK(cudaMalloc(&d, v.size() * sizeof(T) + 16)); CK(cudaMemcpy(d, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice)); return d; }
