// The nearest centroids of the pixels of a block by guesses (flowseg_kernels/decode_guesses.py, which contains the proof).
//
// A thread guesses the class of its first pixel, proves the guess by one distance, and tries the same class on its other pixels.
// The lanes of a warp share the work for a pixel whose guesses are not proved: they go from the nearest guess to its nearest rival,
// and so on. If many pixels of a block are not proved, as in noise, the block compares all its pixels with all centroids.
#pragma once

#include "cuda/decode.cuh"

namespace flowseg::cuda {

// Pixels per thread, and axes of the projection that are compiled.
template <int C>
constexpr int kGuessPixels = C <= 8 ? 4 : 2;
template <int C>
constexpr int kGuessAxes = C <= 4 ? 4 : 6;
// A warp compares a pixel with all of fewer classes as fast as with the rivals of a few of them.
constexpr int kManyClasses = 512;
// Classes of a cell that a pixel tries. A warp waits for its lane with the most; with many classes a further try saves more.
constexpr int kMostTries = 8, kMostTriesOfMany = 16;

// Whether the kernels can use the guesses of a call.
inline bool has_guesses(const Guesses& guesses, const InputImage& x) {
  return guesses.projection && x.type != Real::f64 && guesses.axes <= (x.channels <= 4 ? kGuessAxes<4> : kGuessAxes<16>);
}

// Calls body.template operator()<float, C>() as for_type_and_channels does, for codes with guesses.
template <class Body>
void for_guessed_channels([[maybe_unused]] int channels, Body body) {
#ifndef FLOWSEG_ONLY_FP32_C3
  if (channels > 8) return body.template operator()<float, 16>();
  if (channels > 4) return body.template operator()<float, 8>();
#endif
  body.template operator()<float, 4>();
}

// Loads a run of pixels of any dtype but fp64. All loads are issued before the first is waited for. No load depends on a condition:
// ptxas would keep the registers of such loads for the whole kernel. Channels that the image does not have are 0, and pixels past
// the end are copies of others.
template <class S, int C, int P>
__device__ __forceinline__ void load_all_as(const InputImage& from, int channels, const PixelRun& run, float (&x)[C][P]) {
  const S* __restrict__ plane = static_cast<const S*>(from.data) + run.image * from.stride[0];
  Packed<S, P> raw[C];
  const auto channel = [&](int c) { return plane + (c < channels ? c : 0) * from.stride[1]; };
  if (from.layout.vector && run.count == P) {
#pragma unroll
    for (int c = 0; c < C; ++c) load_once(channel(c) + run.first, raw[c]);
  } else {
    const Offsets<P> offsets = offsets_of<P>(run, from);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int64_t offset = p < run.count ? offsets.at[p] : 0;
#pragma unroll
      for (int c = 0; c < C; ++c) raw[c].at[p] = channel(c)[offset];
    }
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int p = 0; p < P; ++p) x[c][p] = c < channels ? widen(raw[c].at[p]) : 0;
  }
}

template <int C, int P>
__device__ __forceinline__ void load_all(const InputImage& from, int channels, const PixelRun& run, float (&x)[C][P]) {
  switch (from.type) {
    case Real::f16: return load_all_as<Half>(from, channels, run, x);
    case Real::bf16: return load_all_as<BFloat>(from, channels, run, x);
    default: return load_all_as<float>(from, channels, run, x);
  }
}

// An axis of the projection in shared memory: C weights and the offset, padded to whole 16-byte loads.
template <int C>
struct alignas(16) Axis {
  float at[C + 4];
};
constexpr int64_t kMostAxisBytes = sizeof(Axis<16>) * kGuessAxes<16>;
#define FLOWSEG_AXES(C, name) __shared__ Axis<C> name[kGuessAxes<C>]

// Copies the projection to shared memory. An axis that the projection does not have yields 0 everywhere. Every thread calls it.
template <int C>
__device__ __forceinline__ void stage_axes(const Guesses& guesses, int channels, Axis<C>* axes) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kGuessAxes<C> * (C + 1); i += kThreads) {
    const int axis = i / (C + 1), c = i % (C + 1);
    const float* __restrict__ row = guesses.projection + axis * (channels + 1);
    const bool is_there = axis < guesses.axes && (c < channels || c == C);
    axes[axis].at[c] = is_there ? row[c < channels ? c : channels] : 0;
  }
  if (!FLOWSEG_PLANTED(axes)) __syncthreads();
}

// The codes and tables as the functions below use them.
template <int C>
struct GuessTables {
  const InputCodes& codes;
  const Guesses& guesses;
  const Axis<C>* axes;

  __device__ __forceinline__ CodeRow<float, C> code(int k) const {
    const float* __restrict__ at = static_cast<const float*>(codes.data) + static_cast<int64_t>(k) * codes.channels;
    if (codes.channels == C && reinterpret_cast<uintptr_t>(codes.data) % 16 == 0) {
      return *reinterpret_cast<const CodeRow<float, C>*>(at);
    }
    CodeRow<float, C> row;
#pragma unroll
    for (int c = 0; c < C; ++c) row.at[c] = c < codes.channels ? at[c < codes.channels ? c : 0] : 0;
    return row;
  }
  __device__ __forceinline__ const float* certain(int k) const {
    return guesses.certain + static_cast<int64_t>(k) * (guesses.rival_count + 1);
  }
  __device__ __forceinline__ const int32_t* rivals(int k) const {
    return guesses.rivals + static_cast<int64_t>(k) * guesses.rival_count;
  }

  // The cell of a point. A point beyond the outer cells, or NaN, gets one of them. Adding 2^23 to a number puts its integral part
  // into the low bits without a conversion.
  __device__ __forceinline__ int cell(const float (&x)[C][1]) const {
    constexpr float kIntegers = 8388608.0f;
    const unsigned last = (1u << guesses.log2_cells) - 1;
    const float limit = static_cast<float>(last);
    unsigned found = 0;
#pragma unroll
    for (int axis = kGuessAxes<C> - 1; axis >= 0; --axis) {
      const Axis<C> row = axes[axis];
      float v = row.at[C];
#pragma unroll
      for (int c = 0; c < C; ++c) v += x[c][0] * row.at[c];
      const float inside = std::fmin(std::fmax(v, 0.0f), limit);
      found = found << guesses.log2_cells | (same_bits<unsigned>(__fadd_rd(inside, kIntegers)) & last);
    }
    return static_cast<int>(found);
  }
};

// The nearest of the classes that a pixel was compared with; label -1 if there was none.
struct Guessed {
  int label = -1;
  float nearest = infinity<float>(), second = infinity<float>();

  // The lowest label of equals wins.
  __device__ __forceinline__ void offer(int candidate, float d) {
    const bool closer = d < nearest || (d == nearest && candidate < label);
    second = std::fmax(nearest, std::fmin(d, second));
    nearest = closer ? d : nearest;
    label = closer ? candidate : label;
  }
};

// Tries the classes of a point's cell in turn. Returns whether one is proved to be the nearest; `code` and `certain` are then its.
template <int C>
__device__ __forceinline__ bool guess(const GuessTables<C>& tables, const float (&x)[C][1], Guessed& found, CodeRow<float, C>& code,
                                      float& certain) {
  const int32_t* __restrict__ starts = tables.guesses.starts + tables.cell(x);
  int first = starts[0], left = starts[1] - first;
  const int most = tables.codes.classes < kManyClasses ? kMostTries : kMostTriesOfMany;
  left = (left < most ? left : most) + FLOWSEG_PLANTED(members);
#pragma unroll 1
  for (const int32_t* __restrict__ member = tables.guesses.members + first; left > 0; --left, ++member) {
    const int k = *member;
    code = tables.code(k);
    certain = tables.certain(k)[0];
    const float d = squared_distance(x, 0, code);
    found.offer(k, d);
    if (d < certain) return true;
  }
  return false;
}

// Whether the classes that `certain` of the nearest class is about are farther than the second nearest so far. The factor covers
// the rounding of all distances.
__device__ __forceinline__ bool are_farther(float certain, float nearest_root, float second) {
  return 2 * std::sqrt(certain) - nearest_root > 1.00001f * std::sqrt(second);
}

// The squared distance from a point to the second nearest centroid, found among the rivals of the nearest one; -1 if there may be
// a nearer one. A centroid at distance D from the nearest one is at least D - `nearest` away from the point.
template <int C>
__device__ __forceinline__ float second_among_rivals(const GuessTables<C>& tables, const float (&x)[C][1], int label,
                                                     float nearest) {
  const float* __restrict__ certain = tables.certain(label);
  const int32_t* __restrict__ rivals = tables.rivals(label);
  const float root = std::sqrt(nearest);
  float second = infinity<float>();
#pragma unroll 1
  for (int j = 0;; ++j) {
    if (are_farther(certain[j], root, second)) return second;
    if (j == tables.guesses.rival_count) return -1;
    second = std::fmin(second, squared_distance(x, 0, tables.code(rivals[j])));
  }
}

// The nearest, and with kSecond the second nearest, of `count` classes and of those in `found`, for a point that every lane of the
// warp has. The classes are `list`, or all if it is null. Each lane takes every 32nd class.
template <bool kSecond, int C>
__device__ __forceinline__ Guessed search_by_lanes(const GuessTables<C>& tables, const float (&x)[C][1],
                                                   const int32_t* __restrict__ list, int count, Guessed found) {
  const int lane = threadIdx.x % 32;
  if (lane > 0) found = {};
#pragma unroll (C <= 8 ? 2 : 1)
  for (int i = lane; i < count; i += 32) {
    const int k = list ? list[i] : i;
    found.offer(k, squared_distance(x, 0, tables.code(k)));
  }
  // Bits of non-negative floats compare like integers.
  const unsigned own = same_bits<unsigned>(found.nearest), nearest = __reduce_min_sync(kAllLanes, own);
  const unsigned label = __reduce_min_sync(kAllLanes, own == nearest ? static_cast<unsigned>(found.label) : UINT32_MAX);
  if constexpr (kSecond) {
    const bool has_it = own == nearest && static_cast<unsigned>(found.label) == label;
    found.second = same_bits<float>(__reduce_min_sync(kAllLanes, same_bits<unsigned>(has_it ? found.second : found.nearest)));
  }
  found.nearest = same_bits<float>(nearest);
  found.label = label == UINT32_MAX ? 0 : static_cast<int>(label);  // every distance overflows: the search too answers 0
  return found;
}

template <int C>
__device__ __forceinline__ bool has_nan(const float (&x)[C][1]) {
  bool found = false;
#pragma unroll
  for (int c = 0; c < C; ++c) found |= x[c][0] != x[c][0];
  return found;
}

// Decides a point that is not proved, from the nearest class so far. Compares the rivals of that class, then those of the nearest
// rival, until a class and its rivals decide or no rival is nearer. Only then it compares all classes.
template <bool kSecond, int C>
__device__ __forceinline__ Guessed decide(const GuessTables<C>& tables, const float (&x)[C][1], Guessed found) {
  // A point that was not guessed, because most guesses of its warp failed, may be NaN.
  if (has_nan(x)) return {-1, static_cast<float>(NAN), static_cast<float>(NAN)};
  const int rivals = tables.guesses.rival_count, classes = tables.codes.classes;
#pragma unroll 1
  while (true) {
    const bool decides = found.label >= 0 && found.nearest < tables.certain(found.label)[rivals];
    const bool asks_rivals = decides || (found.label >= 0 && classes >= kManyClasses);
    if (!asks_rivals) found = {};
    const int32_t* list = asks_rivals ? tables.rivals(found.label) : nullptr;
    const Guessed next = search_by_lanes<kSecond>(tables, x, list, asks_rivals ? rivals : classes, found);
    if (!asks_rivals) return next;
    const bool is_same = next.label == found.label;
    found = next;
    if (decides) break;
    if (is_same) found.label = -1;
    found.second = infinity<float>();
  }
  if constexpr (kSecond) {
    const float second = search_by_lanes<false>(tables, x, tables.rivals(found.label), rivals, {}).nearest;
    if (!are_farther(tables.certain(found.label)[rivals], std::sqrt(found.nearest), second)) {
      return search_by_lanes<true>(tables, x, nullptr, classes, {});
    }
    found.second = second;
  }
  return found;
}

// The results of a run of pixels: classes (-1 for NaN) and squared distances.
template <int P>
struct RunResults {
  int label[P];
  float nearest[P], second[P];

  __device__ __forceinline__ void set(int at, const Guessed& found) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      label[p] = p == at ? found.label : label[p];
      nearest[p] = p == at ? found.nearest : nearest[p];
      second[p] = p == at ? found.second : second[p];
    }
  }
  __device__ __forceinline__ Guessed get(int at) const {
    Guessed found{label[0], nearest[0], second[0]};
#pragma unroll
    for (int p = 1; p < P; ++p) {
      found.label = p == at ? label[p] : found.label;
      found.nearest = p == at ? nearest[p] : found.nearest;
    }
    return found;
  }
};

template <int C, int P>
__device__ __forceinline__ void take(const float (&x)[C][P], int at, float (&point)[C][1]) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    point[c][0] = x[c][0];
#pragma unroll
    for (int p = 1; p < P; ++p) point[c][0] = p == at ? x[c][p] : point[c][0];
  }
}

// The pixels of a run that are not decided, bit p for pixel p. `far` has those that the rivals of the nearest guess do not decide.
struct Undecided {
  int any = 0, far = 0;
};

// Guesses the classes of a run. Every thread of the warp calls it. Each pass guesses one pixel per lane. The warp makes as many
// passes as its lane with the most.
template <int C, int P>
__device__ __forceinline__ Undecided guess_run(const GuessTables<C>& tables, const float (&x)[C][P], int count,
                                               RunResults<P>& found) {
  Undecided undecided;
  unsigned pending = (1u << count) - 1;
  bool tries_others = true;  // a proved class on the lane's other pixels
  bool is_first = true;
#pragma unroll 1
  while (const unsigned lanes = __ballot_sync(kAllLanes, pending)) {
    bool helped = false;
    compiler_barrier(pending);  // the axes stay in shared memory
    if (pending) {
      const int at = __ffs(static_cast<int>(pending)) - 1;
      pending &= pending - 1;
      float point[C][1], certain;
      take(x, at, point);
      CodeRow<float, C> code;
      Guessed own;
      const bool proved = guess(tables, point, own, code, certain);
      found.set(at, own);
      if (proved) {
        if (tries_others) {
#pragma unroll
          for (int p = 1; p < P; ++p) {
            const float d = squared_distance(x, p, code);
            if ((pending >> p & 1) && d < certain) {
              found.label[p] = own.label;
              found.nearest[p] = d;
              pending &= ~(1u << p);
              helped = true;
            }
          }
        }
      } else {
        if (has_nan(point)) {
          found.set(at, {-1, static_cast<float>(NAN), static_cast<float>(NAN)});
        } else {
          const bool is_near = own.label >= 0 && own.nearest < tables.certain(own.label)[tables.guesses.rival_count];
          undecided.any |= 1 << at;
          undecided.far |= is_near ? 0 : 1 << at;
        }
      }
    }
    if (is_first) {
      // Trying a class on other pixels costs a distance per pixel: too much where neighbours are of different classes. Where most
      // guesses fail, as in noise, more of them would fail too.
      const int tried = __popc(lanes);
      tries_others = 4 * __popc(__ballot_sync(kAllLanes, helped)) >= tried;
      if (2 * __popc(__ballot_sync(kAllLanes, undecided.far)) > tried) {
        undecided.any |= static_cast<int>(pending);
        undecided.far |= static_cast<int>(pending);
        pending = 0;
      }
      is_first = false;
    }
  }
  return undecided;
}

// Finds the second nearest of the decided pixels among rivals. Pixels where that fails become undecided.
template <int C, int P>
__device__ __forceinline__ void find_second(const GuessTables<C>& tables, const float (&x)[C][P], int count, RunResults<P>& found,
                                            Undecided& undecided) {
  int left = ((1 << count) - 1) & ~undecided.any;
#pragma unroll 1
  for (; left; left &= left - 1) {
    const int at = __ffs(left) - 1;
    float point[C][1];
    take(x, at, point);
    Guessed own = found.get(at);
    if (own.label < 0) continue;  // NaN
    own.second = second_among_rivals(tables, point, own.label, own.nearest);
    if (own.second < 0) undecided.any |= 1 << at;
    found.set(at, own);
  }
}

// Decodes a run of pixels. Returns false in every thread of the block if a search of the whole block is faster. Every thread of the
// block calls it.
template <bool kSecond, int C, int P>
__device__ __forceinline__ bool decode_run(const GuessTables<C>& tables, const InputImage& image, const PixelRun& run,
                                           RunResults<P>& found) {
  float x[C][P];
  load_all(image, tables.codes.channels, run, x);
#pragma unroll
  for (int p = 0; p < P; ++p) found.label[p] = -1, found.nearest[p] = found.second[p] = 0;
  Undecided undecided = guess_run(tables, x, run.count, found);
  if constexpr (kSecond) find_second(tables, x, run.count, found, undecided);
  // A warp that searches for one pixel reads all codes for it alone.
  if (8 * __syncthreads_count(2 * __popc(static_cast<unsigned>(undecided.far)) >= P) >= kThreads) return false;
#pragma unroll 1
  while (const unsigned lanes = __ballot_sync(kAllLanes, undecided.any)) {
    const int lane = __ffs(static_cast<int>(lanes)) - 1, at = __ffs(undecided.any) - 1;
    float point[C][1];
    take(x, at, point);
#pragma unroll
    for (int c = 0; c < C; ++c) point[c][0] = __shfl_sync(kAllLanes, point[c][0], lane);
    Guessed own = found.get(at);
    own.label = __shfl_sync(kAllLanes, own.label, lane);
    own.nearest = __shfl_sync(kAllLanes, own.nearest, lane);
    own.second = infinity<float>();
    own = decide<kSecond>(tables, point, own);
    if (threadIdx.x % 32 == static_cast<unsigned>(lane)) {
      found.set(at, own);
      undecided.any &= ~(1 << at);
    }
  }
  return true;
}

// Decodes the block's tile and calls use(run, label, nearest, second) for runs that cover it. Every thread of the block calls it.
// kInLoop: as for `stage`.
template <bool kSecond, bool kInLoop, class T, int C, class Use>
__device__ __forceinline__ void decode_tile(const GuessTables<C>& tables, const InputImage& image, const CodeTile<T, C>& tile,
                                            const PixelRun& run, Use use) {
  constexpr int P = kGuessPixels<C>, kParts = P / kSearchPixels<T, C>;
  RunResults<P> found;
  if (decode_run<kSecond>(tables, image, run, found)) return use(run, found.label, found.nearest, found.second);
  const int64_t pixels = image.height * image.width;
  const auto first = static_cast<unsigned>((run.first - static_cast<int64_t>(threadIdx.x) * P) / (kThreads * P) * kParts);
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    const PixelRun own = run_in_image<P / kParts>(pixels, static_cast<unsigned>(run.image), first + part, kThreads);
    T x[C][P / kParts], nearest[P / kParts], second[P / kParts];
    int label[P / kParts];
    load_all(image, tables.codes.channels, own, x);
    search<kSecond, kInLoop>(tables.codes, tile, x, label, nearest, second);
    use(own, label, nearest, second);
  }
}

}  // namespace flowseg::cuda
