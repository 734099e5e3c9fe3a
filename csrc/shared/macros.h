// What differs between a C++ and a CUDA compiler.
#pragma once

#ifdef __CUDACC__
#define FLOWSEG_INLINE __host__ __device__ __forceinline__
// The loop over classes of C channels: a vector compiler unrolls over pixels already, many channels fill a loop by themselves.
#define FLOWSEG_UNROLL_CLASSES _Pragma("unroll (C <= 4 ? 4 : 16 / C)")
#define FLOWSEG_ONE_CLASS_AT_A_TIME _Pragma("unroll 1")  // where registers are short
#else
#ifndef FLOWSEG_INLINE
#define FLOWSEG_INLINE inline __attribute__((always_inline))
#endif
#define FLOWSEG_UNROLL_CLASSES
#define FLOWSEG_ONE_CLASS_AT_A_TIME
#endif
#define FLOWSEG_RESTRICT __restrict__
