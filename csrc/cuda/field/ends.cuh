// The neural field's kernels around its blocks: the embedding's table, both ends of the backward, column norms of a W2 of several
// slices, and the sums over patches.
//
// A block of `leave` or `enter` takes the same part (64 / kHalves pixels) of all patches of a group in turn. So the sums over
// patches have a fixed order, and no two blocks add to the same memory. A thread reads a state in chunks of 8 hidden units:
// kRowLanes neighbouring lanes hold one row.
#pragma once

#include <cstdint>

#include "cuda/block.cuh"
#include "cuda/field/params.h"

namespace flowseg::cuda {

constexpr int kEndThreads = 256;
constexpr int kEndWarps = kEndThreads / 32;
constexpr int kChunk = 8;                            // elements of 16 bytes
constexpr int kHalfLanes = kTile / kChunk;           // lanes that share 64 hidden units of a row
template <int kHalves>
constexpr int kRowLanes = kHalves * kHalfLanes;      // lanes that share a row
template <int kHalves>
constexpr int kRowsAtOnce = kEndThreads / kRowLanes<kHalves>;
constexpr int kSteps = kTile / kRowsAtOnce<1>;       // rows of a part per thread
constexpr int kFewChannels = 4;                      // the compiled numbers of channels: this one and kMostChannels
template <int kHalves>
constexpr int kTablePixels = kEndThreads / (kTile * kHalves);  // pixels per block of `table`
constexpr int kFoldRows = 256;                       // rows that one launch of `fold` adds up
constexpr int kFoldColumns = 64;

template <class T>
struct alignas(16) Chunk {
  T at[kChunk];
};

// The sum over the lanes that share a row, in each of them.
template <int kHalves>
__device__ __forceinline__ float row_sum(float v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < kRowLanes<kHalves>; step *= 2) v += __shfl_sync(kAllLanes, v, lane ^ step);
  return v;
}

// Sums N values over 8 lanes. Of the values, lane i gets the sums N / 8 i to N / 8 (i + 1) - 1, in v[0] to v[N / 8 - 1]. Callers
// leave out kLanes.
template <int kLanes = kHalfLanes, int N>
__device__ __forceinline__ void scatter_sums(float (&v)[N]) {
  if constexpr (kLanes > 1) {
    constexpr int kStep = kLanes / 2, kKept = N * kLanes / (2 * kHalfLanes);
    const int lane = threadIdx.x % 32;
    const bool upper = lane & kStep;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const float sent = upper ? v[i] : v[i + kKept], own = upper ? v[i + kKept] : v[i];
      v[i] = own + __shfl_sync(kAllLanes, sent, lane ^ kStep);
    }
    scatter_sums<kStep>(v);
  }
}

// The same over the lanes that share a row: 8 of them for each half, which all get their sums.
template <int kHalves, int N>
__device__ __forceinline__ void scatter_row_sums(float (&v)[N]) {
  if constexpr (kHalves == 2) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += __shfl_sync(kAllLanes, v[i], lane ^ kHalfLanes);
  }
  scatter_sums(v);
}

// The sum of each hidden unit over a block's rows. Each thread gives its sums for the 8 hidden units of its chunk. Thread h gets
// the sum of unit h.
template <int kHalves>
__device__ __forceinline__ float unit_sum(const float (&own)[kChunk]) {
  __shared__ float warps[kEndWarps][kTile * kHalves];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // threads may still read earlier sums
#pragma unroll
  for (int k = 0; k < kChunk; ++k) {
    float v = own[k];
#pragma unroll
    for (int step = kRowLanes<kHalves>; step < 32; step *= 2) v += __shfl_sync(kAllLanes, v, lane ^ step);
    if (lane < kRowLanes<kHalves>) warps[warp][lane * kChunk + k] = v;
  }
  __syncthreads();
  float sum = 0;
  if (threadIdx.x < kTile * kHalves) {
#pragma unroll
    for (int w = 0; w < kEndWarps; ++w) sum += warps[w][threadIdx.x];
  }
  return sum;
}

// The pixels of one part that a thread holds, at every patch of a group: rows `first_row` + kRowsAtOnce i of the part.
template <int kHalves>
struct PartPlace {
  using Sums = GroupSums<kHalves>;
  int part, group, chunk, first_row;

  static __device__ __forceinline__ PartPlace of(const FieldParams& f) {
    return {.part = static_cast<int>(blockIdx.x) % (f.tiles() * kHalves),
            .group = static_cast<int>(blockIdx.x) / (f.tiles() * kHalves),
            .chunk = static_cast<int>(threadIdx.x) % kRowLanes<kHalves>,
            .first_row = static_cast<int>(threadIdx.x) / kRowLanes<kHalves>};
  }
  __device__ __forceinline__ int row(int step) const { return first_row + step * kRowsAtOnce<kHalves>; }
  __device__ __forceinline__ int pixel(int step) const { return part * Sums::kRows + row(step); }
  // The offset in bytes of the thread's chunk in a patch's state.
  __device__ __forceinline__ uint32_t offset(int step) const {
    const int tile = part / kHalves * kHalves + chunk / kHalfLanes;
    return tile * kTileBytes + tile_offset(part % kHalves * Sums::kRows + row(step), chunk % kHalfLanes * kChunk);
  }
  __device__ __forceinline__ float* sums(const FieldParams& f) const {
    return f.group_sums + ((f.groups_before + group) * (f.tiles() * kHalves) + part) * Sums::kSize;
  }
  __device__ __forceinline__ int begin(const FieldParams& f) const { return group * static_cast<int>(f.per_group); }
  __device__ __forceinline__ int end(const FieldParams& f) const {
    const int64_t next = begin(f) + f.per_group;
    return static_cast<int>(next < f.count ? next : f.count);
  }
};

// A thread's part of one patch: chunks of its state of level L, and an image at the same pixels. Zero beyond the patch.
template <class T, int C>
struct Entries {
  Chunk<T> state[kSteps];
  T pixels[kSteps][C];
};

template <class T, int C, int kHalves>
__device__ __forceinline__ Entries<T, C> load_entries(const FieldParams& f, const PartPlace<kHalves>& place, const Image& image,
                                                      const int64_t (&within)[kSteps], int local) {
  Entries<T, C> found;
  const char* state = state_of<kHalves>(f, local, f.depth);
  const T* pixels = static_cast<const T*>(image.data) + first_pixel_of(f, image, f.first + local);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const bool exists = place.pixel(step) < f.pixels();
    found.state[step] = exists ? *reinterpret_cast<const Chunk<T>*>(state + place.offset(step)) : Chunk<T>{};
#pragma unroll
    for (int c = 0; c < C; ++c) {
      found.pixels[step][c] = exists && c < image.channels ? pixels[within[step] + c * image.stride[1]] : T{};
    }
  }
  return found;
}

// Calls body(local, entries) for the patches of a group. The next patch's entries are loaded before the body runs, unless there are
// too many channels for the registers.
template <class T, int C, int kHalves, class Body>
__device__ __forceinline__ void for_each_patch(const FieldParams& f, const PartPlace<kHalves>& place, const Image& image,
                                               Body body) {
  int64_t within[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) within[step] = pixel_in_patch(f, image, place.pixel(step));
  const int begin = place.begin(f), end = place.end(f);
  if constexpr (C > kFewChannels) {
    for (int local = begin; local < end; ++local) body(local, load_entries<T, C>(f, place, image, within, local));
  } else {
    Entries<T, C> next = load_entries<T, C>(f, place, image, within, begin);
    for (int local = begin; local < end; ++local) {
      const Entries<T, C> now = next;
      next = load_entries<T, C>(f, place, image, within, local + 1 < end ? local + 1 : local);
      body(local, now);
    }
  }
}

// cos(2 pi part / turn) for 0 <= part < turn, within 6e-8: the sine of pi/2 minus the angle, as a Taylor polynomial of degree 11.
__device__ __forceinline__ float cosine_of_turns(int part, int turn) {
  const int least = part < turn - part ? part : turn - part;
  const float t = static_cast<float>(turn - 4 * least) * (1.5707963267948966f / static_cast<float>(turn)), q = t * t;
  return t * (1 - q * (1 / 6.0f) *
                      (1 - q * (1 / 20.0f) * (1 - q * (1 / 42.0f) * (1 - q * (1 / 72.0f) * (1 - q * (1 / 110.0f))))));
}

// One of reference.cosine_features. Position times frequency is a fraction of integers, so whole turns are removed from the
// cosine's argument before any rounding.
__device__ __forceinline__ float cosine_feature(int p, int freqs, int pixel, int feature) {
  const int64_t i = feature / freqs, j = feature % freqs, most = static_cast<int64_t>(p - 1) * (freqs - 1);
  const int64_t turn = 2 * (most > 1 ? most : 1);
  const auto wave = [&](int64_t position, int64_t frequency) {
    return cosine_of_turns(static_cast<int>(position * frequency * freqs % turn), static_cast<int>(turn));
  };
  const float scale = static_cast<float>(freqs) / static_cast<float>(freqs > 2 ? freqs - 1 : 1);
  return wave(pixel % p, i) * wave(pixel / p, j) / (1 + scale * scale * static_cast<float>(i * j));
}

// Fills f.table, and f.waves if it is not null. A block takes kTablePixels pixels.
template <class T, int kHalves>
__global__ void __launch_bounds__(kEndThreads) table(FLOWSEG_GRID_CONSTANT FieldParams f) {
  constexpr int kWidth = kTile * kHalves;
  __shared__ float waves[kTablePixels<kHalves>][kWidth];
  const int own = threadIdx.x / kWidth, column = threadIdx.x % kWidth;
  const int pixel = static_cast<int>(blockIdx.x) * kTablePixels<kHalves> + own, count = f.freqs * f.freqs;
  const bool in_patch = pixel < f.pixels(), exists = column < f.hidden;
  const int64_t features = f.x.channels + count;
  const T* embed = static_cast<const T*>(f.embed) + column * features + f.x.channels;
  float sum = exists ? widen(static_cast<const T*>(f.embed_bias)[column]) : 0.0f;
  for (int start = 0; start < count; start += kWidth) {
    const int feature = start + column;
    __syncthreads();  // threads may still read earlier waves
    if (feature < count) {
      const float wave = cosine_feature(f.p, f.freqs, pixel, feature);
      waves[own][column] = wave;
      if (f.waves && in_patch) f.waves[static_cast<int64_t>(pixel) * count + feature] = wave;
    }
    __syncthreads();
    const int here = count - start < kWidth ? count - start : kWidth;
    if (exists) {
#pragma unroll 8
      for (int i = 0; i < here; ++i) sum += waves[own][i] * widen(embed[start + i]);
    }
  }
  f.table[static_cast<int64_t>(pixel) * kWidth + column] = in_patch ? sum : 0.0f;
}

// Stores the reciprocal column norms of W2. A block takes one of the count L weights. Only for a W2 of several slices.
template <class T, int kHalves>
__global__ void __launch_bounds__(kEndThreads) lengths(FLOWSEG_GRID_CONSTANT FieldParams f) {
  const int64_t local = blockIdx.x / static_cast<unsigned>(f.depth);
  const int level = static_cast<int>(blockIdx.x % static_cast<unsigned>(f.depth)), chunk = threadIdx.x % kRowLanes<kHalves>;
  const T* w2 = static_cast<const T*>(f.weights) + ((f.first + local) * f.depth + level) * (int64_t{2} * f.inner * f.hidden) +
                int64_t{f.inner} * f.hidden;
  float squares[kChunk] = {};
  if (chunk * kChunk < f.hidden) {
    for (int row = threadIdx.x / kRowLanes<kHalves>; row < f.inner; row += kRowsAtOnce<kHalves>) {
      const auto values = *reinterpret_cast<const Chunk<T>*>(w2 + int64_t{row} * f.hidden + chunk * kChunk);
#pragma unroll
      for (int k = 0; k < kChunk; ++k) squares[k] += widen(values.at[k]) * widen(values.at[k]);
    }
  }
  const float sum = unit_sum<kHalves>(squares);
  const int unit = threadIdx.x;
  if (unit < kTile * kHalves) {
    const float inverse = 1 / sqrtf(sum > 1e-24f ? sum : 1e-24f);
    inverse_lengths_of<kHalves>(f, local, level)[f.padded_inner<kHalves>() + unit] = unit < f.hidden ? inverse : 0.0f;
  }
}

using FloatChunk = Chunk<float>;

// Fills `to` (C, 64 halves) with the (C, Hx) factors scale(c, h), zero beyond C and Hx. The caller synchronises.
template <int C, int kLanes, class Scale>
__device__ __forceinline__ void stage_factors(FloatChunk (&to)[C][kLanes], const FieldParams& f, Scale scale) {
  constexpr int kWidth = kLanes * kChunk;
  for (int i = threadIdx.x; i < C * kWidth; i += kEndThreads) {
    const int c = i / kWidth, h = i % kWidth;
    to[c][h / kChunk].at[h % kChunk] = c < f.x.channels && h < f.hidden ? scale(c, h) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ float last_gain(const FieldParams& f, int h) {
  return f.residual ? widen(static_cast<const T*>(f.out_gain)[h]) : 1.0f;
}

// Stores the group's sums for out_weight, out_gain and out_bias. `by_out` is the part's sum over pixels of grad^T n. The gradient
// of out_gain needs no sum over pixels: it is the column sum of (grad^T n) * out_weight.
template <class T, int C, int kHalves>
__device__ __forceinline__ void store_leave_sums(const FieldParams& f, const PartPlace<kHalves>& place,
                                                 const float (&by_out)[C][kChunk], const float (&by_bias)[C]) {
  using Sums = GroupSums<kHalves>;
  const T* weight = static_cast<const T*>(f.out_weight);
  float* sums = place.sums(f);
  const int h = threadIdx.x;
  float by_gain = 0;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const float found = unit_sum<kHalves>(by_out[c]);
    if (h < Sums::kHidden && c < f.x.channels) {
      sums[Sums::out_weight + c * Sums::kHidden + h] = h < f.hidden ? found * last_gain<T>(f, h) : 0.0f;
      if (h < f.hidden) by_gain += found * widen(weight[c * f.hidden + h]);
    }
    // All lanes of a row hold the same sums, so that of every lane 0 counts.
    float bias[kChunk] = {by_bias[c]};
    const float total = unit_sum<kHalves>(bias);
    if (h == 0) sums[Sums::out_bias + c] = total;
  }
  if (h < Sums::kHidden) sums[Sums::out_gain + h] = by_gain;
}

// The gradient of the state after the last block, in the place of that state, and the group's sums for the last layer.
template <class T, int C, int kHalves>
__global__ void __launch_bounds__(kEndThreads, C == kFewChannels ? 2 : 1) leave(FLOWSEG_GRID_CONSTANT FieldParams f) {
  __shared__ FloatChunk factors[C][kRowLanes<kHalves>];  // out_weight * out_gain
  const auto place = PartPlace<kHalves>::of(f);
  const T* weight = static_cast<const T*>(f.out_weight);
  stage_factors(factors, f, [&](int c, int h) { return widen(weight[c * f.hidden + h]) * last_gain<T>(f, h); });
  __syncthreads();
  float by_out[C][kChunk] = {}, by_bias[C] = {};
  for_each_patch<T, C>(f, place, f.grad, [&](int local, const Entries<T, C>& now) {
    const float* inverse_rms = f.inverse_rms + (int64_t{local} * (f.depth + 1) + f.depth) * (f.tiles() * kTile);
    float normal[kSteps][kChunk], g[kSteps][kChunk] = {}, scale[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      scale[step] = !f.residual ? 1.0f : place.pixel(step) < f.pixels() ? inverse_rms[place.pixel(step)] : 0.0f;
#pragma unroll
      for (int k = 0; k < kChunk; ++k) normal[step][k] = widen(now.state[step].at[k]);
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const FloatChunk factor = factors[c][place.chunk];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const float pixel = widen(now.pixels[step][c]);
        by_bias[c] += pixel;
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          by_out[c][k] += pixel * normal[step][k];
          g[step][k] += pixel * factor.at[k];
        }
      }
    }
    char* state = state_of<kHalves>(f, local, f.depth);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      float along = 0;
      if (f.residual) {
#pragma unroll
        for (int k = 0; k < kChunk; ++k) along += g[step][k] * normal[step][k];
        along = row_sum<kHalves>(along) / static_cast<float>(f.hidden);
      }
      Chunk<T> found;
#pragma unroll
      for (int k = 0; k < kChunk; ++k) narrow(scale[step] * (g[step][k] - normal[step][k] * along), found.at[k]);
      *reinterpret_cast<Chunk<T>*>(state + place.offset(step)) = found;
    }
  });
  store_leave_sums<T>(f, place, by_out, by_bias);
}

// Finishes the gradient of a W2 of several slices. grad_weights holds the gradient times the reciprocal column norms; what comes
// from the norms is missing. A block takes one of the count L weights.
template <class T, int kHalves>
__global__ void __launch_bounds__(kEndThreads) project(FLOWSEG_GRID_CONSTANT FieldParams f) {
  const int64_t local = blockIdx.x / static_cast<unsigned>(f.depth);
  const int level = static_cast<int>(blockIdx.x % static_cast<unsigned>(f.depth)), chunk = threadIdx.x % kRowLanes<kHalves>;
  if (chunk * kChunk >= f.hidden) return;
  const int64_t at = ((f.first + local) * f.depth + level) * (int64_t{2} * f.inner * f.hidden) + int64_t{f.inner} * f.hidden +
                     chunk * kChunk;
  const float* inverse = inverse_lengths_of<kHalves>(f, local, level) + f.padded_inner<kHalves>() + chunk * kChunk;
  const float* along2 = f.along2 + (local * f.depth + level) * (kTile * kHalves) + chunk * kChunk;
  float along[kChunk];
#pragma unroll
  for (int k = 0; k < kChunk; ++k) along[k] = inverse[k] * (along2[k] * inverse[k]);
  for (int row = threadIdx.x / kRowLanes<kHalves>; row < f.inner; row += kRowsAtOnce<kHalves>) {
    const auto w = *reinterpret_cast<const Chunk<T>*>(static_cast<const T*>(f.weights) + at + int64_t{row} * f.hidden);
    auto* grad = reinterpret_cast<Chunk<T>*>(static_cast<T*>(f.grad_weights) + at + int64_t{row} * f.hidden);
    Chunk<T> found = *grad;
#pragma unroll
    for (int k = 0; k < kChunk; ++k) narrow(widen(found.at[k]) - widen(w.at[k]) * inverse[k] * along[k], found.at[k]);
    *grad = found;
  }
}

// The gradient of x from the gradient of the state before the first block, and the group's sums for the embedding.
template <class T, int C, int kHalves>
__global__ void __launch_bounds__(kEndThreads, C == kFewChannels ? 2 : 1) enter(FLOWSEG_GRID_CONSTANT FieldParams f) {
  __shared__ FloatChunk factors[C][kRowLanes<kHalves>];  // the embedding's weights on the channels
  const auto place = PartPlace<kHalves>::of(f);
  using Sums = GroupSums<kHalves>;
  const T* embed = static_cast<const T*>(f.embed);
  const int64_t features = f.x.channels + f.freqs * f.freqs;
  stage_factors(factors, f, [&](int c, int h) { return widen(embed[h * features + c]); });
  __syncthreads();
  float by_position[kSteps][kChunk] = {}, by_channel[C][kChunk] = {};
  for_each_patch<T, C>(f, place, f.x, [&](int local, const Entries<T, C>& now) {
    float g_x[kSteps * C] = {}, g[kSteps][kChunk];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        g[step][k] = widen(now.state[step].at[k]);
        by_position[step][k] += g[step][k];
      }
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const FloatChunk factor = factors[c][place.chunk];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const float pixel = widen(now.pixels[step][c]);
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          by_channel[c][k] += pixel * g[step][k];
          g_x[step * C + c] += g[step][k] * factor.at[k];
        }
      }
    }
    scatter_row_sums<kHalves>(g_x);
    T* to = static_cast<T*>(f.grad_x) + first_pixel_of(f, f.dense, f.first + local);
    constexpr int kOwn = kSteps * C / kHalfLanes;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int index = place.chunk % kHalfLanes * kOwn + i, pixel = place.pixel(index / C), c = index % C;
      const bool owned = kHalves == 1 || place.chunk < kHalfLanes;
      if (owned && pixel < f.pixels() && c < f.x.channels) {
        narrow(g_x[i], to[pixel_in_patch(f, f.dense, pixel) + c * f.dense.stride[1]]);
      }
    }
  });
  float* sums = place.sums(f);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      sums[Sums::by_position + place.row(step) * Sums::kHidden + place.chunk * kChunk + k] = by_position[step][k];
    }
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const float found = unit_sum<kHalves>(by_channel[c]);
    if (threadIdx.x < Sums::kHidden) sums[Sums::by_channel + threadIdx.x * kMostChannels + c] = found;
  }
}

// Adds up rows of an array (rows, columns): rows first, first + step, ..., kFoldRows of them, into row `first`. A block takes
// kFoldColumns columns of kFoldRows rows.
__global__ void __launch_bounds__(kEndThreads) fold(float* data, int64_t rows, int64_t columns, int64_t step) {
  constexpr int kLanes = kEndThreads / kFoldColumns;
  __shared__ float parts[kLanes][kFoldColumns];
  const int64_t across = (columns + kFoldColumns - 1) / kFoldColumns;
  const int own = threadIdx.x % kFoldColumns, lane = threadIdx.x / kFoldColumns;
  const int64_t column = blockIdx.x % across * kFoldColumns + own, first = blockIdx.x / across * kFoldRows * step;
  float sum = 0;
  if (column < columns) {
#pragma unroll 16
    for (int i = lane; i < kFoldRows; i += kLanes) {
      const int64_t row = first + i * step;
      if (row < rows) sum += data[row * columns + column];
    }
  }
  parts[lane][own] = sum;
  __syncthreads();
  if (lane == 0 && column < columns) {
    for (int i = 1; i < kLanes; ++i) sum += parts[i][own];
    data[first * columns + column] = sum;
  }
}

// The sum over all patches of one entry of GroupSums, after `fold`.
template <int kHalves>
__device__ __forceinline__ float folded(const FieldParams& f, int part, int offset) {
  return f.groups ? f.group_sums[int64_t{part} * GroupSums<kHalves>::kSize + offset] : 0.0f;
}
template <int kHalves>
__device__ __forceinline__ float folded_over_parts(const FieldParams& f, int offset) {
  float sum = 0;
  for (int part = 0; part < f.tiles() * kHalves; ++part) sum += folded<kHalves>(f, part, offset);
  return sum;
}

// The gradients of the embedding's weights on the cosine features, and of its bias, for one hidden unit. Sums over pixels use fp64:
// the feature of frequency 0 is 1 everywhere, and its fp32 sum over pixels had up to 2.2 times PyTorch's error.
template <class T, int kHalves>
__device__ __forceinline__ void finish_embedding(const FieldParams& f, int unit, T* grad_features) {
  using Sums = GroupSums<kHalves>;
  constexpr int kLanes = kEndThreads / kTile;
  __shared__ double parts[kLanes][kTile];
  const int own = threadIdx.x % kTile, lane = threadIdx.x / kTile, count = f.freqs * f.freqs;
  // The bias is one more feature, which is 1 everywhere.
  for (int start = 0; start <= count; start += kTile) {
    const int feature = start + own;
    double sum = 0;
    if (feature <= count) {
#pragma unroll 16
      for (int pixel = lane; pixel < f.pixels(); pixel += kLanes) {
        const double g = folded<kHalves>(f, pixel / Sums::kRows, Sums::by_position + pixel % Sums::kRows * Sums::kHidden + unit);
        sum += g * static_cast<double>(feature < count ? f.waves[static_cast<int64_t>(pixel) * count + feature] : 1.0f);
      }
    }
    __syncthreads();  // threads may still read earlier sums
    parts[lane][own] = sum;
    __syncthreads();
    if (lane == 0 && feature <= count) {
      for (int i = 1; i < kLanes; ++i) sum += parts[i][own];
      narrow(sum, feature < count ? grad_features[feature] : static_cast<T*>(f.grad_bias)[unit]);
    }
  }
}

// Computes the gradients of the shared tensors from the folded sums. A block takes one of the Hx hidden units.
template <class T, int kHalves>
__global__ void __launch_bounds__(kEndThreads) finish(FLOWSEG_GRID_CONSTANT FieldParams f) {
  using Sums = GroupSums<kHalves>;
  const int unit = static_cast<int>(blockIdx.x), channels = static_cast<int>(f.x.channels), thread = threadIdx.x;
  T* embed = static_cast<T*>(f.grad_embed) + unit * (f.x.channels + f.freqs * f.freqs);
  finish_embedding<T, kHalves>(f, unit, embed + channels);
  if (thread < channels) {
    narrow(folded_over_parts<kHalves>(f, Sums::by_channel + unit * kMostChannels + thread), embed[thread]);
    narrow(folded_over_parts<kHalves>(f, Sums::out_weight + thread * Sums::kHidden + unit),
           static_cast<T*>(f.grad_out_weight)[thread * f.hidden + unit]);
    if (unit == 0) narrow(folded_over_parts<kHalves>(f, Sums::out_bias + thread), static_cast<T*>(f.grad_out_bias)[thread]);
  }
  // The plain form has no gains.
  if (!f.residual) return;
  if (thread == 0) narrow(folded_over_parts<kHalves>(f, Sums::out_gain + unit), static_cast<T*>(f.grad_out_gain)[unit]);
  for (int level = thread; level < f.depth; level += kEndThreads) {
    narrow(f.patches ? f.gain_sums[int64_t{level} * Sums::kHidden + unit] : 0.0f,
           static_cast<T*>(f.grad_gains)[int64_t{level} * f.hidden + unit]);
  }
}

}  // namespace flowseg::cuda
