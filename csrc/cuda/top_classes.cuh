// top_classes on a GPU.
#pragma once

#include "cuda/params.h"
#include "cuda/probabilities.cuh"

namespace flowseg::cuda {

struct TopParams {
  InputImage x;      // (B, C, H, W)
  InputCodes codes;  // (K, C)
  Correction correction;
  int kept;  // classes per pixel, from 1 to kMostKept
  int64_t ignore;
  void* labels;  // (B, kept, H, W) contiguous
  Integer label_type;
  bool label_vector;          // every run of labels starts at a multiple of 16 bytes
  OutputImage probabilities;  // (B, kept, H, W)
  bool fast = false;
  unsigned blocks_per_image = 0;
};

// Pixels per thread: the kept classes take 2 N registers per pixel.
template <class T, int C, int N>
constexpr int kTopPixels = sizeof(T) == 4 && C <= 8 && N <= 8 ? 2 : 1;

// The N nearest classes of one pixel. NaN marks an entry that is still empty: every distance then comes before it, infinity too.
template <class T, int N>
struct Kept {
  T squared[N];
  int label[N];

  // An equal distance keeps its place: it belongs to a lower class. Few classes come before the last one kept, so the branch saves
  // most of the comparisons.
  __device__ __forceinline__ void offer(T d, int k) {
    if (d >= squared[N - 1]) return;
#pragma unroll
    for (int j = N - 1; j > 0; --j) {
      const bool before = !(d >= squared[j - 1]), here = !(d >= squared[j]);
      squared[j] = before ? squared[j - 1] : here ? d : squared[j];
      label[j] = before ? label[j - 1] : here ? k : label[j];
    }
    const bool first = !(d >= squared[0]);
    squared[0] = first ? d : squared[0];
    label[0] = first ? k : label[0];
  }
};

template <class S, int P>
__device__ __forceinline__ void store_rank_as(const TopParams& a, const PixelRun& run, int rank, const int (&label)[P]) {
  Packed<S, P> packed;
#pragma unroll
  for (int p = 0; p < P; ++p) packed.at[p] = static_cast<S>(label[p] < 0 ? a.ignore : label[p]);
  S* plane = static_cast<S*>(a.labels) + (run.image * a.kept + rank) * a.probabilities.pixels;
  store_run<S, P>(plane, a.label_vector, run, packed);
}

template <int P>
__device__ __forceinline__ void store_rank(const TopParams& a, const PixelRun& run, int rank, const int (&label)[P]) {
  switch (a.label_type) {
    case Integer::u8: return store_rank_as<uint8_t>(a, run, rank, label);
    case Integer::i16: return store_rank_as<int16_t>(a, run, rank, label);
    case Integer::i32: return store_rank_as<int32_t>(a, run, rank, label);
    case Integer::i64: return store_rank_as<int64_t>(a, run, rank, label);
  }
}

// Finds the nearest classes of P pixels. kSum: also adds up the weights 1 / (d + eps), kRun classes per partial sum.
template <bool kSum, class T, int C, int N, int P>
__device__ __forceinline__ void find_nearest(const TopParams& a, const CodeTile<T, C>& tile, const Pack<T, P> (&x)[C], T eps,
                                             bool& staged, Kept<T, N> (&kept)[P], Pack<T, P>& total) {
  using V = Pack<T, P>;
  FLOWSEG_EACH(P) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      kept[p].squared[j] = static_cast<T>(NAN);
      kept[p].label[j] = 0;
    }
  }
  for_each_part(a.codes, tile, staged, [&](int first, int count) {
    for (int start = 0; start < count; start += static_cast<int>(kRun)) {
      const int last = start + static_cast<int>(kRun) < count ? start + static_cast<int>(kRun) : count;
      V run{};
#pragma unroll 1
      for (int k = start; k < last; ++k) {
        const V d = squared_distance<C>(x, tile[k]);
        if constexpr (kSum) run += reciprocal(d + eps);
        FLOWSEG_EACH(P) kept[p].offer(d.at[p], first + k);
      }
      total += run;
    }
  });
}

// Replaces the squared distances of the kept classes by probability(squared distance).
template <int N, class T, int P, class Probability>
__device__ __forceinline__ void replace_distances(Kept<T, N> (&kept)[P], Probability probability) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    Pack<T, P> d;
    FLOWSEG_EACH(P) d.at[p] = kept[p].squared[j];
    d = probability(d);
    FLOWSEG_EACH(P) kept[p].squared[j] = d.at[p];
  }
}

template <class T, int C, int N>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 4) keep_top_classes(const TopParams a) {
  constexpr int P = kTopPixels<T, C, N>;
  using V = Pack<T, P>;
  FLOWSEG_CODE_TILE(T, C, tile);
  const PixelRun run = run_of_block<P>(a.probabilities.pixels, a.blocks_per_image);
  V x[C], total{};
  load_packs(a.x, a.codes.channels, run, x);
  // NaN for a pixel that is not finite or whose square overflows.
  const V poison = squared_norm<C>(x) * T(0);
  bool unknown[P] = {};
#pragma unroll
  for (int c = 0; c < C; ++c) {
    FLOWSEG_EACH(P) unknown[p] |= x[c].at[p] != x[c].at[p];
  }
  Kept<T, N> kept[P];
  const T eps = static_cast<T>(a.correction.eps), inverse_temperature = static_cast<T>(1 / a.correction.temperature);
  bool staged = false;
  if (a.fast) {
    find_nearest<true>(a, tile, x, eps, staged, kept, total);
    // A true division: the sum of far points may lie beyond the range of the fast reciprocal.
    const V share = T(1) / total + poison;
    replace_distances(kept, [&](const V& d) { return reciprocal(d + eps) * share; });
  } else {
    find_nearest<false>(a, tile, x, eps, staged, kept, total);
    for_transform_of(a.correction, [&]<Transform transform>() {
      V smallest;
      FLOWSEG_EACH(P) smallest.at[p] = kept[p].squared[0];
      const V largest = logit_of<transform>(smallest, eps, inverse_temperature);
      for_each_part(a.codes, tile, staged, [&](int, int count) {
        add_exponentials<transform, C>(x, tile, count, eps, inverse_temperature, largest, total);
      });
      const V share = T(1) / total + poison;
      replace_distances(kept, [&](const V& d) {
        return exponential(logit_of<transform>(d, eps, inverse_temperature) - largest) * share;
      });
    });
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < a.kept) {
      T probability[P];
      int label[P];
      FLOWSEG_EACH(P) {
        probability[p] = kept[p].squared[j];
        label[p] = unknown[p] ? -1 : kept[p].label[j];
      }
      store_rank(a, run, j, label);
      store_plane(a.probabilities, j, run, probability);
    }
  }
}

template <class Launch>
void launch_top_classes(TopParams a, const Launch& launch) {
  a.fast = takes_reciprocals(a.correction);
  for_type_and_channels(a.x.type, a.codes.channels, [&]<class T, int C>() {
    const auto launch_kept = [&](auto kernel, int pixels_per_thread) {
      const int64_t blocks = blocks_per_image(a.probabilities.pixels, pixels_per_thread);
      a.blocks_per_image = static_cast<unsigned>(blocks);
      launch(kernel, blocks * a.x.batch, 0, a);
    };
    a.kept <= 8 ? launch_kept(keep_top_classes<T, C, 8>, kTopPixels<T, C, 8>)
                : launch_kept(keep_top_classes<T, C, kMostKept>, kTopPixels<T, C, kMostKept>);
  });
}

}  // namespace flowseg::cuda
