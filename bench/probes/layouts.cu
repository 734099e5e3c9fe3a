// Finds the wgmma descriptors that give the right product D (64, N) = A (64, 64) B (64, N) of small integers, which is exact. Each
// candidate is one thread block.
#include "common.h"
#include "wgmma.h"
struct Candidate { uint64_t a_bits, b_bits; int a_step, b_step, a_at, b_at, image_a, image_b; };
constexpr int A_BYTES = 8192, B_BYTES = 32768;   // room for N = 256
// Images in shared memory, all with 128-byte swizzle. A: 0 = rows m of 64 k (K-major), 1 = rows k of 64 m (M-major). B: 0 = rows n of 64 k
// (K-major), 1 = tiles of 64 n with rows k (MN-major).
template <int TYPE, int N, bool RS, int TA, int TB> __global__ void __launch_bounds__(128) product(const uint8_t* images_a, const uint8_t* images_b, const uint16_t* a_plain, const float* want, const Candidate* cs, int* wrong, float* dump) {
  extern __shared__ uint8_t raw[];
  uint8_t* base = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  const Candidate c = cs[blockIdx.x];
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  for (int i = t; i < 65536 / 16; i += 128) reinterpret_cast<uint4*>(base)[i] = make_uint4(0, 0, 0, 0);
  for (int i = t; i < 32768 / 16; i += 128) reinterpret_cast<uint4*>(base + 65536)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  for (int i = t; i < A_BYTES / 16; i += 128) reinterpret_cast<uint4*>(base)[i] = reinterpret_cast<const uint4*>(images_a + c.image_a * A_BYTES)[i];
  for (int i = t; i < N * 128 / 16; i += 128) reinterpret_cast<uint4*>(base + A_BYTES)[i] = reinterpret_cast<const uint4*>(images_b + c.image_b * B_BYTES)[i];
  proxy();
  __syncthreads();
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = 0;
  uint32_t r[16];
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {   // the fragment map under test: register i of k: row + 8 (i & 1), column + 8 (i >> 1)
      const int row = warp * 16 + lane / 4 + 8 * (i & 1), col = k * 16 + 2 * (lane % 4) + 8 * (i >> 1);
      r[4 * k + i] = a_plain[row * 64 + col] | (uint32_t)a_plain[row * 64 + col + 1] << 16;
    }
  const uint32_t a = smem(base) + c.a_at, b = smem(base) + A_BYTES + c.b_at;
  pin(d);
  fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t bd = descriptor(b + k * c.b_step, c.b_bits), ad = descriptor(a + k * c.a_step, c.a_bits);
    if constexpr (RS) W<TYPE, N>::template rs<TB>(d, r + 4 * k, bd, k != 0); else W<TYPE, N>::template ss<TA, TB>(d, ad, bd, k != 0);
  }
  commit(); drain<0>(); pin(d);
  int bad = 0;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int row = warp * 16 + lane / 4 + 8 * (i >> 1 & 1), col = 8 * (i / 4) + 2 * (lane % 4) + (i & 1);
    bad += !(d[i] == want[row * N + col]);
    if (dump && blockIdx.x == 0) dump[t * (N / 2) + i] = d[i];
  }
  atomicAdd(wrong + blockIdx.x, bad);
}
static int swizzled(int row, int col) { return row * 128 + (((col / 8) ^ (row & 7)) << 4) + (col % 8) * 2; }   // byte of element (row, col) of rows of 64
static uint16_t bits(float v, int type) { if (type) { __half h = __float2half(v); uint16_t u; memcpy(&u, &h, 2); return u; } uint32_t u; memcpy(&u, &v, 4); return u >> 16; }
static void put(uint8_t* at, uint16_t v) { memcpy(at, &v, 2); }
struct Problem { std::vector<uint8_t> ia, ib; std::vector<uint16_t> plain; std::vector<float> want, a, b; };
static Problem problem(int type, int n) {
  Problem p; p.ia.resize(2 * A_BYTES); p.ib.resize(2 * B_BYTES); p.plain.resize(4096); p.want.resize(64 * n); p.a.resize(4096); p.b.resize(64 * n);
  for (int i = 0; i < 4096; ++i) p.a[i] = (int)(hash32(i + 77) % 17) - 8;
  for (int i = 0; i < 64 * n; ++i) p.b[i] = (int)(hash32(i + 991) % 17) - 8;   // (k, n)
  for (int m = 0; m < 64; ++m) for (int k = 0; k < 64; ++k) {
    const uint16_t v = bits(p.a[m * 64 + k], type);
    p.plain[m * 64 + k] = v; put(&p.ia[swizzled(m, k)], v); put(&p.ia[A_BYTES + swizzled(k, m)], v);
  }
  for (int k = 0; k < 64; ++k) for (int j = 0; j < n; ++j) {
    const uint16_t v = bits(p.b[k * n + j], type);
    put(&p.ib[swizzled(j, k)], v); put(&p.ib[B_BYTES + (j / 64) * 8192 + swizzled(k, j % 64)], v);
  }
  for (int m = 0; m < 64; ++m) for (int j = 0; j < n; ++j) { double s = 0; for (int k = 0; k < 64; ++k) s += p.a[m * 64 + k] * p.b[k * n + j]; p.want[m * n + j] = s; }
  return p;
}
static std::string text(const Candidate& c, bool rs) {
  char b[256]; auto f = [](uint64_t d, int s, uint64_t m) { return (int)(d >> s & m); };
  snprintf(b, sizeof b, "B img %s lbo %d sbo %d swz %d base %d step %d at %d", c.image_b ? "MN" : "K", f(c.b_bits, 16, 0x3fff) * 16, f(c.b_bits, 32, 0x3fff) * 16, f(c.b_bits, 62, 3), f(c.b_bits, 49, 7), c.b_step, c.b_at);
  std::string s = b;
  if (!rs) { snprintf(b, sizeof b, " | A img %s lbo %d sbo %d swz %d base %d step %d at %d", c.image_a ? "M" : "K", f(c.a_bits, 16, 0x3fff) * 16, f(c.a_bits, 32, 0x3fff) * 16, f(c.a_bits, 62, 3), f(c.a_bits, 49, 7), c.a_step, c.a_at); s += b; }
  return s;
}
template <int TYPE, int N, bool RS, int TA, int TB> void test(bool sweep) {
  const Problem p = problem(TYPE, N);
  const Candidate expected{descriptor_bits(16, 1024), descriptor_bits(TB ? 8192 : 16, 1024), TA ? 2048 : 32, TB ? 2048 : 32, 0, 0, TA, TB};
  std::vector<Candidate> cs{expected};
  if (sweep) {
    const int offsets[] = {0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192}, steps[] = {32, 64, 128, 256, 1024, 2048, 4096};
    for (int lbo : offsets) for (int sbo : offsets) { Candidate c = expected; c.b_bits = descriptor_bits(lbo, sbo); cs.push_back(c); if (!RS) { c = expected; c.a_bits = descriptor_bits(lbo, sbo); cs.push_back(c); } }
    for (int s : steps) { Candidate c = expected; c.b_step = s; cs.push_back(c); if (!RS) { c = expected; c.a_step = s; cs.push_back(c); } }
    for (int swz = 0; swz < 4; ++swz) for (int base = 0; base < 8; ++base) { Candidate c = expected; c.b_bits = descriptor_bits(TB ? 8192 : 16, 1024, swz, base); cs.push_back(c); }
    for (int img = 0; img < 2; ++img) for (int lbo : {16, 1024, 8192}) for (int sbo : {16, 128, 1024, 2048}) for (int s : {32, 1024, 2048}) { Candidate c = expected; c.image_b = img; c.b_bits = descriptor_bits(lbo, sbo); c.b_step = s; cs.push_back(c); }
  }
  auto up = [](const void* h, size_t n) { void* d; CK(cudaMalloc(&d, n)); CK(cudaMemcpy(d, h, n, cudaMemcpyHostToDevice)); return d; };
  auto *ia = (uint8_t*)up(p.ia.data(), p.ia.size()), *ib = (uint8_t*)up(p.ib.data(), p.ib.size());
  auto* ap = (uint16_t*)up(p.plain.data(), 8192); auto* w = (float*)up(p.want.data(), p.want.size() * 4);
  auto* dc = (Candidate*)up(cs.data(), cs.size() * sizeof(Candidate));
  int* wrong; CK(cudaMalloc(&wrong, cs.size() * 4)); CK(cudaMemset(wrong, 0, cs.size() * 4));
  float* dump; CK(cudaMalloc(&dump, 128 * N / 2 * 4));
  auto kernel = product<TYPE, N, RS, TA, TB>;
  const int shared = 65536 + 32768 + 1024;
  CK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  char name[96]; snprintf(name, sizeof name, "%s n%d %s A%s B%s", TYPE ? "fp16" : "bf16", N, RS ? "RS" : "SS", RS ? "reg" : TA ? "M" : "K", TB ? "MN" : "K");
  kernel<<<(unsigned)cs.size(), 128, shared>>>(ia, ib, ap, w, dc, wrong, dump);
  const std::string e = sync_error();
  if (!e.empty()) { J("layout", name).t("failed", e); _Exit(4); }
  std::vector<int> bad(cs.size()); CK(cudaMemcpy(bad.data(), wrong, cs.size() * 4, cudaMemcpyDeviceToHost));
  std::string list = "["; int right = 0;
  for (size_t i = 0; i < cs.size(); ++i) if (!bad[i]) { if (right < 200) list += (right ? ",\"" : "\"") + text(cs[i], RS) + "\""; ++right; }
  list += "]";
  J j("layout", name); j.b("expected_right", !bad[0]).f("wrong_of", bad[0]).f("candidates", cs.size()).f("right", right).t("expected", text(cs[0], RS)).raw("all_right", sweep ? list : "[]");
  if (bad[0]) {   // print the first registers of some threads, the wanted values, and the places where the got values occur
    std::vector<float> d(128 * N / 2); CK(cudaMemcpy(d.data(), dump, d.size() * 4, cudaMemcpyDeviceToHost));
    std::string s; char b[128];
    for (int t : {0, 1, 4, 32}) for (int i = 0; i < 8; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + 8 * (i >> 1 & 1), col = 8 * (i / 4) + 2 * (t % 4) + (i & 1);
      int fr = -1, fc = -1, n = 0; for (int r = 0; r < 64; ++r) for (int c = 0; c < N; ++c) if (p.want[r * N + c] == d[t * (N / 2) + i]) { if (!n) fr = r, fc = c; ++n; }
      snprintf(b, sizeof b, "t%d r%d got %g want %g (%d places, first %d,%d); ", t, i, d[t * (N / 2) + i], p.want[row * N + col], n, fr, fc); s += b;
    }
    j.t("values", s);
  }
  cudaFree(ia); cudaFree(ib); cudaFree(ap); cudaFree(w); cudaFree(dc); cudaFree(wrong); cudaFree(dump);
}
// ---- swizzle of TMA, ldmatrix and stmatrix on swizzled tiles
// status, number of wrong bytes or values: 0 a 2-D box {64, 64}; 1 a 3-D box {64, 1, 64} at half 1; 2 a box {64, 128}; 3 stmatrix K-major;
// 4 stmatrix.trans M-major; 5 ldmatrix fragments of the K-major tile; 6 ldmatrix.trans fragments of the M-major tile; 7 product from a tile
// written by stmatrix; 9 product from a tile written by stmatrix.trans.
__global__ void __launch_bounds__(128) movers(const __grid_constant__ CUtensorMap two, const __grid_constant__ CUtensorMap three, const __grid_constant__ CUtensorMap tall, const __grid_constant__ CUtensorMap back, const uint8_t* want2, const uint8_t* want3, const uint8_t* want_tall,
                                              const uint8_t* image_k, const uint8_t* image_m, const uint8_t* image_b, const uint16_t* a_plain, const float* want, int* status) {
  extern __shared__ uint8_t raw[];
  uint8_t* base = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  __shared__ uint64_t bar;
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  if (t == 0) { init(&bar, 1); init_fence(); }
  __syncthreads();
  if (t == 0) { expect(&bar, 8192 + 8192 + 16384); tma2(base, &two, &bar, 0, 64); tma3(base + 8192, &three, &bar, 0, 1, 64); tma2(base + 16384, &tall, &bar, 0, 128); }
  wait(&bar, 0, 60);
  auto unlike = [&](const uint8_t* s, const uint8_t* g, int n, int at) { int bad = 0; for (int i = t; i < n; i += 128) bad += s[i] != g[i]; atomicAdd(status + at, bad); };
  unlike(base, want2, 8192, 0); unlike(base + 8192, want3, 8192, 1); unlike(base + 16384, want_tall, 16384, 2);
  __syncthreads();
  uint32_t r[16];
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = warp * 16 + lane / 4 + 8 * (i & 1), col = k * 16 + 2 * (lane % 4) + 8 * (i >> 1);
      r[4 * k + i] = a_plain[row * 64 + col] | (uint32_t)a_plain[row * 64 + col + 1] << 16;
    }
  const uint32_t s = smem(base);
#pragma unroll
  for (int k = 0; k < 4; ++k) {   // K-major: rows m
    const int row = warp * 16 + lane % 16;
    stmatrix4(s + row * 128 + (((2 * k + lane / 16) ^ (row & 7)) << 4), r + 4 * k);
    // M-major: rows k; matrix i holds m chunk 2 warp + (i & 1), k rows 16 k + 8 (i >> 1)
    const int kr = 16 * k + 8 * (lane / 16) + lane % 8;
    stmatrix4_t(s + 8192 + kr * 128 + (((2 * warp + (lane / 8 & 1)) ^ (kr & 7)) << 4), r + 4 * k);
  }
  for (int i = t; i < 512; i += 128) reinterpret_cast<uint4*>(base + 16384)[i] = reinterpret_cast<const uint4*>(image_b)[i];
  proxy();
  __syncthreads();
  unlike(base, image_k, 8192, 3); unlike(base + 8192, image_m, 8192, 4);
  uint32_t q[16], v[16];
  int bad = 0, bad2 = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int row = warp * 16 + lane % 16, kr = 16 * k + 8 * (lane / 16) + lane % 8;
    ldmatrix4(q + 4 * k, s + row * 128 + (((2 * k + lane / 16) ^ (row & 7)) << 4));
    ldmatrix4_t(v + 4 * k, s + 8192 + kr * 128 + (((2 * warp + (lane / 8 & 1)) ^ (kr & 7)) << 4));
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) { bad += q[i] != r[i]; bad2 += v[i] != r[i]; }
  atomicAdd(status + 5, bad); atomicAdd(status + 6, bad2);
  float d[32] = {}, e[32] = {};
  pin(d); pin(e);
  fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) W<0, 64>::ss<0, 1>(d, descriptor(s + 32 * k), descriptor(s + 16384 + 2048 * k), k != 0);
#pragma unroll
  for (int k = 0; k < 4; ++k) W<0, 64>::ss<1, 1>(e, descriptor(s + 8192 + 2048 * k), descriptor(s + 16384 + 2048 * k), k != 0);
  commit(); drain<0>(); pin(d); pin(e);
  bad = bad2 = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) { const int row = warp * 16 + lane / 4 + 8 * (i >> 1 & 1), col = 8 * (i / 4) + 2 * (lane % 4) + (i & 1); bad += d[i] != want[row * 64 + col]; bad2 += e[i] != want[row * 64 + col]; }
  atomicAdd(status + 7, bad); atomicAdd(status + 9, bad2);
  __syncthreads();
  if (t == 0) { tma2_store(&back, base, 0, 0); bulk_commit(); bulk_wait(); }
}
static void movers_test() {
  const Problem p = problem(0, 64);
  const int rows = 256;   // a (256, 2, 64) array
  std::vector<uint16_t> g(rows * 128); for (size_t i = 0; i < g.size(); ++i) g[i] = hash32(i) & 0xffff;
  std::vector<uint8_t> w2(8192), w3(8192), wt(16384);
  for (int r = 0; r < 64; ++r) for (int c = 0; c < 64; ++c) { put(&w2[swizzled(r, c)], g[(64 + r) * 64 + c]); put(&w3[swizzled(r, c)], g[(64 + r) * 128 + 64 + c]); }
  for (int r = 0; r < 128; ++r) for (int c = 0; c < 64; ++c) put(&wt[swizzled(r, c)], g[(128 + r) * 64 + c]);
  auto up = [](const void* h, size_t n) { void* d; CK(cudaMalloc(&d, n)); CK(cudaMemcpy(d, h, n, cudaMemcpyHostToDevice)); return d; };
  void* dg = up(g.data(), g.size() * 2); void* back; CK(cudaMalloc(&back, 8192)); CK(cudaMemset(back, 0xff, 8192));
  int* st; CK(cudaMalloc(&st, 64)); CK(cudaMemset(st, 0, 64));
  const CUtensorMap two = tensor_map(dg, {64, (uint64_t)rows * 2}, {64, 64}), three = tensor_map(dg, {64, 2, (uint64_t)rows}, {64, 1, 64}), tall = tensor_map(dg, {64, (uint64_t)rows * 2}, {64, 128}), bm = tensor_map(back, {64, 64}, {64, 64});
  CK(cudaFuncSetAttribute(movers, cudaFuncAttributeMaxDynamicSharedMemorySize, 33 * 1024 + 1024));
  movers<<<1, 128, 34 * 1024>>>(two, three, tall, bm, (uint8_t*)up(w2.data(), 8192), (uint8_t*)up(w3.data(), 8192), (uint8_t*)up(wt.data(), 16384), (uint8_t*)up(p.ia.data(), 8192), (uint8_t*)up(p.ia.data() + A_BYTES, 8192),
                                (uint8_t*)up(p.ib.data() + B_BYTES, 8192), (uint16_t*)up(p.plain.data(), 8192), (float*)up(p.want.data(), p.want.size() * 4), st);
  const std::string e = sync_error();
  if (!e.empty()) { J("movers", "all").t("failed", e).f("fault", *g_fault_host); _Exit(4); }
  int s[16]; CK(cudaMemcpy(s, st, 64, cudaMemcpyDeviceToHost));
  std::vector<uint16_t> b(4096); CK(cudaMemcpy(b.data(), back, 8192, cudaMemcpyDeviceToHost));
  int bad = 0; for (int i = 0; i < 4096; ++i) bad += b[i] != p.plain[i];
  const char* names[] = {"tma box 2d swizzle", "tma box 3d half", "tma box 2d tall", "stmatrix K-major bytes", "stmatrix.trans M-major bytes", "ldmatrix A fragments", "ldmatrix.trans A fragments", "product A from stmatrix K-major", "", "product A from stmatrix.trans M-major"};
  for (int i = 0; i < 10; ++i) if (*names[i]) J("mover", names[i]).b("right", !s[i]).f("wrong", s[i]);
  J("mover", "tma store of a swizzled tile").b("right", !bad).f("wrong", bad);
}
int main(int argc, char** argv) {
  g_program = "layouts";
  if (has(argc, argv, "--dry")) {
    const Problem p = problem(0, 128); int bad = 0;
    for (int m = 0; m < 64; ++m) for (int k = 0; k < 64; ++k) { uint16_t u, v; memcpy(&u, &p.ia[swizzled(m, k)], 2); memcpy(&v, &p.ia[A_BYTES + swizzled(k, m)], 2); bad += u != v || u != p.plain[m * 64 + k]; }
    J("dry", "images").f("wrong", bad);
    return 0;
  }
  make_fault(); load_driver();
  const bool sweep = !has(argc, argv, "--plain");
  // The products that the kernels need, before any sweep.
  test<0, 64, true, 0, 1>(false); test<0, 64, true, 0, 0>(false); test<0, 64, false, 1, 0>(false); test<0, 64, false, 0, 0>(false); test<0, 64, false, 1, 1>(false); test<0, 64, false, 0, 1>(false);
  test<0, 128, true, 0, 1>(false); test<0, 128, true, 0, 0>(false); test<0, 256, true, 0, 1>(false); test<0, 128, false, 1, 1>(false); test<0, 128, false, 1, 0>(false);
  test<1, 64, true, 0, 1>(false); test<1, 64, true, 0, 0>(false); test<1, 64, false, 1, 0>(false); test<1, 64, false, 1, 1>(false); test<1, 128, true, 0, 1>(false);
  movers_test();
  if (sweep) { test<0, 64, true, 0, 1>(true); test<0, 64, true, 0, 0>(true); test<0, 128, true, 0, 1>(true); test<0, 64, false, 1, 0>(true); test<0, 64, false, 1, 1>(true); test<0, 64, false, 0, 0>(true); test<1, 64, true, 0, 1>(true); }
  return 0;
}
