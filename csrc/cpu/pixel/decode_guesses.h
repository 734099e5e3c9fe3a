// Nearest centroids of a block of pixels by guesses: fp32, 4 to 16 channels. flowseg_kernels/decode_guesses.py has the proof.
//
//   1. guess_neighbours tries the class of the pixel before and of the pixels above, one class for a whole vector of pixels. In a
//      label map that decides nearly every pixel, with one code to load per vector.
//   2. The pixels left over move together into Pending. find_cells looks up the lists of their cells, and guess_members tries the
//      members of a list in turn, another class per pixel.
//   3. compare_rivals decides a pixel between its best guess and the nearest rivals of this guess.
//   4. The pixels left over are compared with all codes. If they are many, the guesses fail for these predictions: the rest of the
//      chunk is searched without guesses.
//
// A guess only changes how long a pixel takes. So labels never depend on neighbours, blocks or threads.
#pragma once

#include <initializer_list>

#include "cpu/pixel/blocks.h"
#include "cpu/pixel/search.h"

namespace flowseg::cpu {
namespace {

// A pixel without a proof after this many guesses is compared with the rivals of the best one.
constexpr int kMostGuesses = 12;
// Few classes are searched if most pixels of a block have no proof after this many guesses.
constexpr int kFewGuesses = 2;
// Blocks without guesses from neighbours, after a block in which they decided few pixels.
constexpr int kRestBlocks = 7;

// The labels of a chunk so far, which are guesses for the following pixels, and how well guesses worked.
struct Recent {
  explicit Recent(int64_t width) : width(width) {}
  // The class above a lane of the vector of pixels that starts at `at` in the current block; -1 if the chunk does not have it.
  int above(int at, int lane) const {
    const int64_t position = count + at + lane - width;
    return position >= 0 && position < count + at ? label[position] : -1;
  }
  void set(int at, FI v) { std::memcpy(&label[count + at], &v, sizeof v); }
  // Ends a block.
  void add(const int32_t* from, int length) {
    std::memcpy(&label[count], from, length * sizeof(int32_t));
    count += length;
  }

  int64_t width;
  int count = 0, last = 0, neighbours_fail = 0;
  bool guesses_fail = false;
  int32_t label[kChunkPixels + Lanes<float>::width];
};

// Pixels in memory by channel, as in Block, without a copy. Vectors may be unaligned.
template <int C>
struct Pixels {
  const float* at[C];
};

FLOWSEG_INLINE F load_vector(const float* from) {
  F v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// The guesses with all that a kernel reads along with them.
struct GuessTables {
  GuessTables(const Decode& a)
      : t(a.tables.guesses), mu(static_cast<const float*>(a.codes.data)), classes(a.codes.classes), channels(a.x.channels) {}

  const float* certain(int64_t guess) const { return t.certain + guess * (t.rival_count + 1); }
  const int32_t* rivals(int64_t guess) const { return t.rivals + guess * t.rival_count; }

  const Guesses& t;
  const float* mu;
  int64_t classes, channels;
};

// The pixels of a block that no guess has decided yet, moved together.
template <int C>
struct Pending {
  Block<float, C> x;
  alignas(64) int32_t pixel[kBlock];              // position in the block
  alignas(64) int32_t guess[kBlock];              // the class to try next. All entries are classes, past the last pixel too
  alignas(64) int32_t next[kBlock], end[kBlock];  // the members after it
  alignas(64) int32_t label[kBlock];              // the nearest class so far,
  alignas(64) float squared[kBlock];              // and its squared distance
  int count = 0;
};

// Appends the lanes of `which` of a vector to v[count...]. It may write a whole vector there.
template <class V, class T>
FLOWSEG_INLINE void append(T* to, V v, unsigned which) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(which), (__m512i)v));
#else
  for (; which; which &= which - 1) *to++ = v[__builtin_ctz(which)];
#endif
}

FLOWSEG_INLINE FI lane_numbers(int first) {
  FI v;
  for (int i = 0; i < Lanes<float>::width; ++i) v[i] = first + i;
  return v;
}

// The most probable class in the cell of one pixel.
template <int C>
int first_member(const GuessTables& g, const F (&point)[C], int lane) {
  int32_t cell = 0;
  const float* axis = g.t.projection;
  for (int a = 0; a < g.t.axes; ++a, axis += g.channels + 1) {
    float position = axis[g.channels];
    for (int64_t c = 0; c < g.channels; ++c) position += axis[c] * point[c][lane];
    const float last = static_cast<float>((1 << g.t.log2_cells) - 1);
    position = position > 0 ? position : 0;
    cell += static_cast<int32_t>(position < last ? position : last) << (a * g.t.log2_cells);
  }
  const int32_t begin = g.t.starts[cell];
  return begin < g.t.starts[cell + 1] ? g.t.members[begin] : 0;
}

// Tries other classes for the lanes `left` of a vector: those of the pixels above the last and the first lane, then that of a cell.
// Returns the lanes that are still left.
template <int C>
unsigned guess_others(const GuessTables& g, const Recent& recent, const F (&point)[C], int at, int tried, unsigned left, FI& label,
                      F& squared) {
  constexpr int kMany = 4;
  const auto guess = [&](int other) {
    const F d = squared_to(point, g.mu + static_cast<int64_t>(other) * C);
    const FI near = d < *g.certain(other);
    label = choose(near, FI{} + other, label);
    squared = choose(near, d, squared);
    left &= ~bits_of(near);
    tried = other;
  };
  for (const bool last : {true, false}) {
    const int above = recent.above(at, last ? 31 - __builtin_clz(left) : __builtin_ctz(left));
    if (above >= 0 && above != tried) guess(above);
    if (!left) return 0;
  }
  if (__builtin_popcount(left) >= kMany) guess(first_member(g, point, 31 - __builtin_clz(left)));
  return left;
}

// Decodes the pixels whose class is that of a pixel before or above; moves the others to `pending`.
template <int C>
FLOWSEG_INLINE void guess_neighbours(const GuessTables& g, const Pixels<C>& x, int length, Recent& recent, Nearest<float>& nearest,
                                     Pending<C>& pending) {
  constexpr int W = Lanes<float>::width;
  constexpr unsigned all = W == 32 ? ~0u : (1u << W) - 1;
  const bool try_neighbours = recent.neighbours_fail == 0;
  for (int i = 0; i < length; i += W) {
    F point[C];
    for (int c = 0; c < C; ++c) point[c] = load_vector(&x.at[c][i]);
    unsigned left = length - i >= W ? all : (1u << (length - i)) - 1;
    if (!try_neighbours) {
      recent.set(i, FI{} - 1);
    } else {
      const F d = squared_to(point, g.mu + static_cast<int64_t>(recent.last) * C);
      const FI near = d < *g.certain(recent.last);
      FI label = FI{} + recent.last;
      F squared = d;
      left &= ~bits_of(near);
      if (left) left = guess_others<C>(g, recent, point, i, recent.last, left, label, squared);
      recent.set(i, label);
      *reinterpret_cast<FI*>(&nearest.label[i]) = label;
      lanes(&nearest.squared[i]) = squared;
      if (!(left >> (W - 1))) recent.last = label[W - 1];
      if (!left) continue;
    }
    const int n = pending.count;
    for (int c = 0; c < C; ++c) append(&pending.x.at[c][n], point[c], left);
    append(&pending.pixel[n], lane_numbers(i), left);
    pending.count += __builtin_popcount(left);
  }
  if (try_neighbours) {
    recent.neighbours_fail = 8 * pending.count > 7 * length ? kRestBlocks : 0;
  } else {
    --recent.neighbours_fail;
  }
}

// Looks up the cell of each pending pixel, and its first guess.
template <int C>
FLOWSEG_INLINE void find_cells(const GuessTables& g, Pending<C>& pending) {
  constexpr int W = Lanes<float>::width, kMostAxes = 8;
  float axes[kMostAxes][C] = {}, offset[kMostAxes];
  const int64_t row = g.channels + 1;
  for (int a = 0; a < g.t.axes; ++a) {
    for (int64_t c = 0; c < g.channels; ++c) axes[a][c] = g.t.projection[a * row + c];
    offset[a] = g.t.projection[a * row + g.channels];
  }
  const float last = static_cast<float>((1 << g.t.log2_cells) - 1);
  for (int j = 0; j < pending.count; j += W) {
    F point[C];
    for (int c = 0; c < C; ++c) point[c] = lanes(&pending.x.at[c][j]);
    FI cell{};
    for (int a = 0; a < g.t.axes; ++a) {
      F even = F{} + offset[a], odd{};
      for (int c = 0; c < C; c += 2) {
        even = multiply_add(point[c], F{} + axes[a][c], even);
        odd = multiply_add(point[c + 1], F{} + axes[a][c + 1], odd);
      }
      F position = even + odd;
      position = choose(position > 0.0f, position, F{});  // NaN too
      position = choose(position < last, position, F{} + last);
      cell += __builtin_convertvector(position, FI) << (a * g.t.log2_cells);
    }
    *reinterpret_cast<FI*>(&pending.next[j]) = cell;
  }
  for (int j = 0; j < pending.count; ++j) {
    const int32_t* cell = g.t.starts + pending.next[j];
    const int32_t begin = cell[0], end = cell[1];
    pending.guess[j] = begin < end ? g.t.members[begin] : 0;
    pending.next[j] = begin + 1;
    pending.end[j] = end;
  }
  for (int j = 0; j < pending.count; ++j) {
    pending.label[j] = 0;
    pending.squared[j] = infinity<float>();
  }
  for (int j = pending.count; j < kBlock; ++j) pending.guess[j] = 0;
}

// Copies a pending pixel to the end of another list.
template <int C>
FLOWSEG_INLINE void move_to(Pending<C>& to, const Pending<C>& from, int j) {
  const int n = to.count++;
  for (int c = 0; c < C; ++c) to.x.at[c][n] = from.x.at[c][j];
  to.pixel[n] = from.pixel[j];
  to.label[n] = from.label[j];
  to.squared[n] = from.squared[j];
}

// Tries one guess per pending pixel. A decided pixel leaves the list. A pixel without further members moves to `rest`.
template <int C>
FLOWSEG_INLINE void guess_members(const GuessTables& g, bool is_last, Pending<C>& pending, Pending<C>& rest,
                                  Nearest<float>& nearest) {
  constexpr int W = Lanes<float>::width;
  int kept = 0;
  for (int j = 0; j < pending.count; j += W) {
    F point[C], code[C], radius;
    for (int c = 0; c < C; ++c) point[c] = lanes(&pending.x.at[c][j]);
    codes_of(g.mu, &pending.guess[j], code);
    for (int i = 0; i < W; ++i) radius[i] = *g.certain(pending.guess[j + i]);
    const F d = squared_to(point, code);
    const FI guess = integer_lanes<float>(&pending.guess[j]), closer = d < lanes(&pending.squared[j]);
    const unsigned pixels = pending.count - j >= W ? (1u << W) - 1 : (1u << (pending.count - j)) - 1;
    const unsigned near = bits_of(d < radius) & pixels;
    const FI label = choose(closer, guess, integer_lanes<float>(&pending.label[j]));
    const F squared = choose(closer, d, lanes(&pending.squared[j]));
    *reinterpret_cast<FI*>(&pending.label[j]) = label;
    lanes(&pending.squared[j]) = squared;
    for (unsigned left = near; left; left &= left - 1) {
      const int lane = __builtin_ctz(left), at = pending.pixel[j + lane];
      nearest.label[at] = pending.guess[j + lane];
      nearest.squared[at] = d[lane];
    }
    unsigned left = pixels & ~near;
    if (!left) continue;
    const FI next = integer_lanes<float>(&pending.next[j]), end = integer_lanes<float>(&pending.end[j]);
    const unsigned none = is_last ? left : left & bits_of(next >= end);
    for (unsigned lanes = none; lanes; lanes &= lanes - 1) move_to(rest, pending, j + __builtin_ctz(lanes));
    left &= ~none;
    for (int c = 0; c < C; ++c) append(&pending.x.at[c][kept], point[c], left);
    append(&pending.pixel[kept], integer_lanes<float>(&pending.pixel[j]), left);
    append(&pending.label[kept], label, left);
    append(&pending.squared[kept], squared, left);
    append(&pending.next[kept], next, left);
    append(&pending.end[kept], end, left);
    kept += __builtin_popcount(left);
  }
  pending.count = kept;
  for (int j = 0; j < kept; ++j) pending.guess[j] = g.t.members[pending.next[j]++];
  for (int j = kept; j < kBlock && j < kept + W; ++j) pending.guess[j] = 0;
}

// Decides a pixel between its nearest class so far and the rivals of this class. Returns false if others may be nearer.
template <int C>
FLOWSEG_INLINE bool compare_rivals(const GuessTables& g, Pending<C>& rest, int j) {
  constexpr int W = Lanes<float>::width;
  const int guess = rest.label[j];
  const float* certain = g.certain(guess);
  const int32_t* rivals = g.rivals(guess);
  const float distance = rest.squared[j];
  if (!(distance < certain[g.t.rival_count])) return false;
  int count = 0;
  while (!(distance < certain[count])) ++count;
  F point[C], code[C];
  for (int c = 0; c < C; ++c) point[c] = F{} + rest.x.at[c][j];
  for (int r = 0; r < count; r += W) {
    alignas(64) int32_t label[W];
    for (int i = 0; i < W; ++i) label[i] = r + i < count ? rivals[r + i] : guess;
    codes_of(g.mu, label, code);
    const F d = squared_to(point, code);
    for (unsigned closer = bits_of(d <= rest.squared[j]); closer; closer &= closer - 1) {
      const int i = __builtin_ctz(closer);
      if (d[i] < rest.squared[j] || (d[i] == rest.squared[j] && label[i] < rest.label[j])) {
        rest.squared[j] = d[i];
        rest.label[j] = label[i];
      }
    }
  }
  return true;
}

// Compares the pixels of a list with all codes. `store` gets each position in the list and in the results of the search.
template <bool kSecond, int C, class Store>
FLOWSEG_INLINE void search_pending(const GuessTables& g, const Pending<C>& pending, Store store) {
  Nearest<float> found;
  // Up to here, a vector of codes per pixel is faster than a vector of pixels.
  constexpr int kFew = 4;
  if (pending.count <= kFew) {
    for (int j = 0; j < pending.count; ++j) search_one<kSecond>(g.mu, g.classes, pending.x, j, found);
  } else {
    search_block<kSecond>(g.mu, g.classes, pending.x, pending.count, found);
  }
  for (int j = 0; j < pending.count; ++j) {
    const int at = pending.pixel[j];
    store(at, found.label[j], found.squared[j], found.second_squared[j]);
  }
}

// Second smallest distances: those to the rivals of each pixel's class, the nearest rival first. A code at distance D from the
// class is at least D - d from a pixel at distance d from the class. So the search ends where D - d exceeds the second smallest
// distance. `certain` has D with enough slack for the rounding of d and of the second distance.
template <int C>
FLOWSEG_INLINE void find_seconds(const GuessTables& g, const Pixels<C>& x, int length, Nearest<float>& nearest) {
  constexpr int W = Lanes<float>::width, kStep = 2;
  Pending<C> rest;
  for (int i = 0; i < length; i += W) {
    F point[C], code[C];
    for (int c = 0; c < C; ++c) point[c] = load_vector(&x.at[c][i]);
    const FI label = integer_lanes<float>(&nearest.label[i]);
    alignas(64) int32_t own[W], rival[W];
    for (int l = 0; l < W; ++l) own[l] = i + l < length && nearest.label[i + l] >= 0 ? nearest.label[i + l] : -1;
    unsigned left = 0;
    for (int l = 0; l < W; ++l) left |= (own[l] >= 0) << l;
    for (int l = 0; l < W; ++l) own[l] = own[l] < 0 ? 0 : own[l];
    const bool same = none(label != label[0]) && label[0] >= 0;
    const F distance = square_root(lanes(&nearest.squared[i]));
    F second = F{} + infinity<float>();
    for (int r = 0; left && r < g.t.rival_count;) {
      for (const int stop = r + kStep < g.t.rival_count ? r + kStep : g.t.rival_count; r < stop; ++r) {
        F d;
        if (same) {
          d = squared_to(point, g.mu + static_cast<int64_t>(g.rivals(own[0])[r]) * C);
        } else {
          for (int l = 0; l < W; ++l) rival[l] = g.rivals(own[l])[r];
          codes_of(g.mu, rival, code);
          d = squared_to(point, code);
        }
        second = choose(d < second, d, second);
      }
      F radius;  // (D / 2)^2 of the codes after the first r rivals
      if (same) {
        radius = F{} + g.certain(own[0])[r];
      } else {
        for (int l = 0; l < W; ++l) radius[l] = g.certain(own[l])[r];
      }
      left &= ~bits_of(2.0f * square_root(radius) > distance + square_root(second));
    }
    lanes(&nearest.second_squared[i]) = second;
    for (; left; left &= left - 1) {
      const int at = i + __builtin_ctz(left), n = rest.count++;
      for (int c = 0; c < C; ++c) rest.x.at[c][n] = x.at[c][at];
      rest.pixel[n] = at;
    }
  }
  search_pending<true, C>(g, rest, [&](int at, int, float, float second) { nearest.second_squared[at] = second; });
}

// The pixels of a block: in place if they are whole vectors of fp32 in order, else copied to `copy`.
template <int C>
FLOWSEG_INLINE Pixels<C> pixels_of(const Image& image, const PixelRange& p, Block<float, C>& copy) {
  Pixels<C> x;
  const bool in_order = image.stride[3] == 1 && (image.height == 1 || image.stride[2] == image.width);
  const bool in_place = in_order && image.type == Real::f32 && image.channels == C && p.length % Lanes<float>::width == 0;
  if (!in_place) load(image, p, copy);
  const float* first = static_cast<const float*>(image.data) + p.image * image.stride[0] + p.start;
  for (int c = 0; c < C; ++c) x.at[c] = in_place ? first + c * image.stride[1] : copy.at[c];
  return x;
}

// Decodes a block.
template <int C>
void guess_block(const Decode& a, const PixelRange& p, Recent& recent, Nearest<float>& nearest) {
  const GuessTables g(a);
  Block<float, C> copy;
  const Pixels<C> x = pixels_of(a.x, p, copy);
  Pending<C> pending, rest;
  guess_neighbours(g, x, p.length, recent, nearest, pending);
  if (pending.count) {
    find_cells(g, pending);
    // A search of few classes is faster than many guesses, or a comparison with the rivals of each pixel.
    const bool few_classes = g.classes <= 256;
    for (int tried = 1; pending.count; ++tried) {
      const bool fail = few_classes && tried == kFewGuesses && 2 * pending.count > p.length;
      guess_members(g, fail || tried == kMostGuesses, pending, rest, nearest);
    }
    int left = 0;
    const bool search_all = few_classes && rest.count >= 16;
    for (int j = 0; j < rest.count; ++j) {
      if (!search_all && compare_rivals(g, rest, j)) {
        nearest.label[rest.pixel[j]] = rest.label[j];
        nearest.squared[rest.pixel[j]] = rest.squared[j];
      } else {
        const int n = left++;
        for (int c = 0; c < C; ++c) rest.x.at[c][n] = rest.x.at[c][j];
        rest.pixel[n] = rest.pixel[j];
      }
    }
    rest.count = left;
    search_pending<false, C>(g, rest, [&](int at, int label, float squared, float) {
      nearest.label[at] = label;
      nearest.squared[at] = squared;
    });
    if ((few_classes ? 3 : 2) * left > p.length) recent.guesses_fail = true;
  }
  if (a.margin) find_seconds(g, x, p.length, nearest);
}

}  // namespace
}  // namespace flowseg::cpu
