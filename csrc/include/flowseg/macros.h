// What differs between a C++ and a CUDA compiler.
#pragma once

#ifdef __CUDACC__
#define FLOWSEG_INLINE __host__ __device__ __forceinline__
#else
#define FLOWSEG_INLINE inline __attribute__((always_inline))
#endif
#define FLOWSEG_RESTRICT __restrict__
