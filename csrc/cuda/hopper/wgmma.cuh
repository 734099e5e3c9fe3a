// Matrix products of a warp group (128 threads) on Hopper: wgmma with fp32 accumulators, and the fragments that a thread holds.
//
// Terms:
// - "tile": 64 rows of 64 16-bit elements in shared memory, 128 bytes per row, 1024-byte aligned, swizzled: tile_offset.
// - A product D (64, N) += A (64, 16) B (16, N) takes B from tiles and A from registers or from a tile.
// - "rows are K": a tile whose rows run along the summed axis (PTX: the operand is MN-major). Otherwise the rows run along M or N
//   and the columns are summed (PTX: K-major).
// - The next 16 of the summed axis are 2048 bytes further if rows are K (kRowStep), else 32 bytes (kColumnStep).
//
// A build for the host includes its own definitions before this file.
#pragma once

#include <cstdint>

#include "cuda/hopper/tile.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>

#include "shared/types.h"

namespace flowseg::cuda {

// Waits until earlier accesses of the thread's accumulators and operand registers are done. Comes before the first product that
// reads or writes registers the thread has touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending of the latest groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving reads of finished accumulators before the wait, and writes of operands after the product.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void settle(uint32_t (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

#define FLOWSEG_D4(x, d, i) x(d[i]), x(d[i + 1]), x(d[i + 2]), x(d[i + 3])
#define FLOWSEG_D8(x, d, i) FLOWSEG_D4(x, d, i), FLOWSEG_D4(x, d, i + 4)
#define FLOWSEG_D16(x, d, i) FLOWSEG_D8(x, d, i), FLOWSEG_D8(x, d, i + 8)
#define FLOWSEG_D32(x, d) FLOWSEG_D16(x, d, 0), FLOWSEG_D16(x, d, 16)
#define FLOWSEG_UPDATED(v) "+f"(v)
#define FLOWSEG_WRITTEN(v) "=f"(v)
#define FLOWSEG_NAMES8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define FLOWSEG_NAMES16 FLOWSEG_NAMES8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define FLOWSEG_NAMES32 FLOWSEG_NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
// The text of one instruction: accumulators, A, B, and the number of the operand that says whether D is added to.
#define FLOWSEG_WGMMA(shape, type, names, a, b, accumulate, majors)                         \
  "{.reg .pred p; setp.ne.b32 p, " accumulate ", 0;\nwgmma.mma_async.sync.aligned." shape   \
  ".f32." type "." type " {" names "}, " a ", " b ", p, 1, 1, " majors ";}"
#define FLOWSEG_A4(a) "r"((a)[0]), "r"((a)[1]), "r"((a)[2]), "r"((a)[3])

// D += A B, or D = A B if `accumulate` is 0, with A in registers. kRowsAreK is about B.
template <class T, bool kRowsAreK>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t* a, uint64_t b, int accumulate = 1) {
  if constexpr (T::kIsBFloat) {
    asm volatile(FLOWSEG_WGMMA("m64n64k16", "bf16", FLOWSEG_NAMES32, "{%32,%33,%34,%35}", "%36", "%37", "%38")
                 : FLOWSEG_D32(FLOWSEG_UPDATED, d)
                 : FLOWSEG_A4(a), "l"(b), "r"(accumulate), "n"(int(kRowsAreK)));
  } else {
    asm volatile(FLOWSEG_WGMMA("m64n64k16", "f16", FLOWSEG_NAMES32, "{%32,%33,%34,%35}", "%36", "%37", "%38")
                 : FLOWSEG_D32(FLOWSEG_UPDATED, d)
                 : FLOWSEG_A4(a), "l"(b), "r"(accumulate), "n"(int(kRowsAreK)));
  }
}
// D = A B with A in registers; D may hold anything before.
template <class T, bool kRowsAreK>
__device__ __forceinline__ void wgmma_first(float (&d)[32], const uint32_t* a, uint64_t b) {
  if constexpr (T::kIsBFloat) {
    asm volatile(FLOWSEG_WGMMA("m64n64k16", "bf16", FLOWSEG_NAMES32, "{%32,%33,%34,%35}", "%36", "0", "%37")
                 : FLOWSEG_D32(FLOWSEG_WRITTEN, d)
                 : FLOWSEG_A4(a), "l"(b), "n"(int(kRowsAreK)));
  } else {
    asm volatile(FLOWSEG_WGMMA("m64n64k16", "f16", FLOWSEG_NAMES32, "{%32,%33,%34,%35}", "%36", "0", "%37")
                 : FLOWSEG_D32(FLOWSEG_WRITTEN, d)
                 : FLOWSEG_A4(a), "l"(b), "n"(int(kRowsAreK)));
  }
}
// The form with `accumulate`, for N = 32.
template <class T, bool kRowsAreK>
__device__ __forceinline__ void wgmma(float (&d)[16], const uint32_t* a, uint64_t b, int accumulate = 1) {
  if constexpr (T::kIsBFloat) {
    asm volatile(FLOWSEG_WGMMA("m64n32k16", "bf16", FLOWSEG_NAMES16, "{%16,%17,%18,%19}", "%20", "%21", "%22")
                 : FLOWSEG_D16(FLOWSEG_UPDATED, d, 0)
                 : FLOWSEG_A4(a), "l"(b), "r"(accumulate), "n"(int(kRowsAreK)));
  } else {
    asm volatile(FLOWSEG_WGMMA("m64n32k16", "f16", FLOWSEG_NAMES16, "{%16,%17,%18,%19}", "%20", "%21", "%22")
                 : FLOWSEG_D16(FLOWSEG_UPDATED, d, 0)
                 : FLOWSEG_A4(a), "l"(b), "r"(accumulate), "n"(int(kRowsAreK)));
  }
}
// The same for N = 16.
template <class T, bool kRowsAreK>
__device__ __forceinline__ void wgmma(float (&d)[8], const uint32_t* a, uint64_t b, int accumulate = 1) {
  if constexpr (T::kIsBFloat) {
    asm volatile(FLOWSEG_WGMMA("m64n16k16", "bf16", FLOWSEG_NAMES8, "{%8,%9,%10,%11}", "%12", "%13", "%14")
                 : FLOWSEG_D8(FLOWSEG_UPDATED, d, 0)
                 : FLOWSEG_A4(a), "l"(b), "r"(accumulate), "n"(int(kRowsAreK)));
  } else {
    asm volatile(FLOWSEG_WGMMA("m64n16k16", "f16", FLOWSEG_NAMES8, "{%8,%9,%10,%11}", "%12", "%13", "%14")
                 : FLOWSEG_D8(FLOWSEG_UPDATED, d, 0)
                 : FLOWSEG_A4(a), "l"(b), "r"(accumulate), "n"(int(kRowsAreK)));
  }
}
// D += A B, or D = A B if `accumulate` is 0, with A in a tile. kRowsAreKOfA and kRowsAreKOfB are about the tiles of A and B.
template <class T, bool kRowsAreKOfA, bool kRowsAreKOfB>
__device__ __forceinline__ void wgmma_tiles(float (&d)[32], uint64_t a, uint64_t b, int accumulate = 1) {
  if constexpr (T::kIsBFloat) {
    asm volatile(FLOWSEG_WGMMA("m64n64k16", "bf16", FLOWSEG_NAMES32, "%32", "%33", "%34", "%35, %36")
                 : FLOWSEG_D32(FLOWSEG_UPDATED, d)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int(kRowsAreKOfA)), "n"(int(kRowsAreKOfB)));
  } else {
    asm volatile(FLOWSEG_WGMMA("m64n64k16", "f16", FLOWSEG_NAMES32, "%32", "%33", "%34", "%35, %36")
                 : FLOWSEG_D32(FLOWSEG_UPDATED, d)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int(kRowsAreKOfA)), "n"(int(kRowsAreKOfB)));
  }
}
// The same for N = 32.
template <class T, bool kRowsAreKOfA, bool kRowsAreKOfB>
__device__ __forceinline__ void wgmma_tiles(float (&d)[16], uint64_t a, uint64_t b, int accumulate = 1) {
  if constexpr (T::kIsBFloat) {
    asm volatile(FLOWSEG_WGMMA("m64n32k16", "bf16", FLOWSEG_NAMES16, "%16", "%17", "%18", "%19, %20")
                 : FLOWSEG_D16(FLOWSEG_UPDATED, d, 0)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int(kRowsAreKOfA)), "n"(int(kRowsAreKOfB)));
  } else {
    asm volatile(FLOWSEG_WGMMA("m64n32k16", "f16", FLOWSEG_NAMES16, "%16", "%17", "%18", "%19, %20")
                 : FLOWSEG_D16(FLOWSEG_UPDATED, d, 0)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int(kRowsAreKOfA)), "n"(int(kRowsAreKOfB)));
  }
}

// Sums of squares: d += A A_b^T for the 8 columns `b` of A (16, 8), on one warp (mma.sync m16n8k8). With a0, a1 and b from an
// 8 x 8 matrix each, d[0] and d[1] hold row lane / 4, columns 2 (lane % 4) and the next, of the first 8 rows; d[2] and d[3] of the
// last 8.
template <class T>
__device__ __forceinline__ void mma_16x8x8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (T::kIsBFloat) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : FLOWSEG_D4(FLOWSEG_UPDATED, d, 0)
                 : "r"(a0), "r"(a1), "r"(b));
  } else {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : FLOWSEG_D4(FLOWSEG_UPDATED, d, 0)
                 : "r"(a0), "r"(a1), "r"(b));
  }
}

#undef FLOWSEG_D4
#undef FLOWSEG_D8
#undef FLOWSEG_D16
#undef FLOWSEG_D32
#undef FLOWSEG_UPDATED
#undef FLOWSEG_WRITTEN
#undef FLOWSEG_NAMES8
#undef FLOWSEG_NAMES16
#undef FLOWSEG_NAMES32
#undef FLOWSEG_WGMMA
#undef FLOWSEG_A4

// Four 8 x 8 matrices of 16-bit elements between shared memory and a warp's registers. Lane i gives the address of row i % 8 of
// matrix i / 8; register m of a lane holds elements 2 (lane % 4) and the next of row lane / 4 of matrix m. The "transposed" forms
// swap rows and columns of each matrix.
__device__ __forceinline__ void load_matrices(uint32_t* r, uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t* r, uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void store_matrices(uint32_t at, const uint32_t* r) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(uint32_t at, const uint32_t* r) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3]) : "memory");
}

// tanh with a relative error of up to 2^-11.
__device__ __forceinline__ float approximate_tanh(float y) {
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(y));
  return t;
}

// 1 + tanh(y) = 2 / (1 + exp(-2 y)), with a relative error of about 2^-20. CUDA's own functions take 60 % more instructions, for
// results below 2^-125.
__device__ __forceinline__ float one_plus_tanh(float y) {
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(y * -2.88539008f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1 + e));
  return r + r;
}

// Changes the number of registers of every thread of a warp group. All its warps call it. N is a multiple of 8.
template <int N>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// The two 16-bit operand types. Two elements share a 32-bit word, the first in its low half.
struct BFloatPair {
  static constexpr bool kIsBFloat = true;
  using Element = BFloat;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(low), "f"(high));
    return r;
  }
  static __device__ __forceinline__ float low(uint32_t v) { return __uint_as_float(v << 16); }
  static __device__ __forceinline__ float high(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  // a b + c, rounded once.
  static __device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
  }
};
struct HalfPair {
  static constexpr bool kIsBFloat = false;
  using Element = Half;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(low), "f"(high));
    return r;
  }
  static __device__ __forceinline__ float low(uint32_t v) { return __low2float(*reinterpret_cast<const __half2*>(&v)); }
  static __device__ __forceinline__ float high(uint32_t v) { return __high2float(*reinterpret_cast<const __half2*>(&v)); }
};

}  // namespace flowseg::cuda
#endif  // __CUDACC__
