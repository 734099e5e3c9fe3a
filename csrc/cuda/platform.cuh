// The compiler's side of a kernel. nvcc reads its own header; a test that compiles the kernels for a CPU includes one of the same names
// before every other header.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#define FLOWSEG_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

#include "shared/types.h"

#ifndef FLOWSEG_THREADS
#define FLOWSEG_THREADS 128  // a block; the host shim takes fewer
#endif

// Faults that the sanitizers' test switches on to see that they would be found; compiled out everywhere else.
#ifndef FLOWSEG_PLANTED
#define FLOWSEG_PLANTED(fault) false
#endif

namespace flowseg::cuda {

constexpr int kThreads = FLOWSEG_THREADS;
// A block that fills shared memory once for many pixels.
#ifdef __CUDACC__
constexpr int kWide = 512;
#else
constexpr int kWide = kThreads;
#endif
constexpr unsigned kAllLanes = 0xffffffffu;

}  // namespace flowseg::cuda
