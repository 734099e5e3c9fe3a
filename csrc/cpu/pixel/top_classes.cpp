// top_classes for one chunk of pixels. all.cpp compiles it once per instruction set.
//
// One pass over the classes keeps the N nearest ones of each pixel, sorted, in registers. With neg_log at temperature 1 that pass
// also adds up the weights 1 / (d + eps). Every other transform and temperature needs the smallest distance first, and a second
// pass.
#include "cpu/pixel/decode.h"
#include "cpu/pixel/probabilities.h"

namespace flowseg::cpu {

namespace {

// The N nearest classes of a vector of pixels. NaN marks an entry that is still empty: every distance then comes before it,
// infinity too.
template <class T, int N>
struct Kept {
  typename Lanes<T>::V squared[N];
  typename Lanes<T>::I label[N];
};

template <class T, int N>
FLOWSEG_INLINE void insert(typename Lanes<T>::V d, typename Lanes<T>::I k, Kept<T, N>& kept) {
  using I = typename Lanes<T>::I;
  // An equal distance keeps its place: it belongs to a lower class.
#pragma GCC unroll 16
  for (int j = N - 1; j > 0; --j) {
    const I before = ~(I)(d >= kept.squared[j - 1]), here = ~(I)(d >= kept.squared[j]);
    kept.squared[j] = choose(before, kept.squared[j - 1], choose(here, d, kept.squared[j]));
    kept.label[j] = choose(before, kept.label[j - 1], choose(here, k, kept.label[j]));
  }
  const I first = ~(I)(d >= kept.squared[0]);
  kept.squared[0] = choose(first, d, kept.squared[0]);
  kept.label[0] = choose(first, k, kept.label[0]);
}

// Finds the nearest classes; kSum: also adds up the weights 1 / (d + eps).
template <bool kSum, int N, class T, int C>
FLOWSEG_INLINE void find_nearest(const Codes& codes, const typename Lanes<T>::V (&point)[C], T eps, Kept<T, N>& kept,
                                 typename Lanes<T>::V& total) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  const auto* mu = static_cast<const T(*)[C]>(codes.data);
  for (int j = 0; j < N; ++j) {
    kept.squared[j] = V{} + static_cast<T>(__builtin_nanf(""));
    kept.label[j] = I{};
  }
  I current{};
  for (int64_t first = 0; first < codes.classes; first += kRun) {
    V run{};
    for (int64_t k = first, last = std::min(first + kRun, codes.classes); k < last; ++k) {
      const V d = squared_distance<C>(point, mu[k]);
      if constexpr (kSum) run += reciprocal(d + eps);
      if (!none(~(I)(d >= kept.squared[N - 1]))) insert<T, N>(d, current, kept);
      current += 1;
    }
    total += run;
  }
}

template <class T>
struct alignas(64) TopBlock {
  typename Lanes<T>::Int label[kMostKept][kBlock];
  T probability[kMostKept][kBlock];
};

template <int N, class T, int C>
void top_block(const TopClasses& a, const PixelRange& p, const Block<T, C>& x, TopBlock<T>& top) {
  using V = typename Lanes<T>::V;
  using I = typename Lanes<T>::I;
  const auto* mu = static_cast<const T(*)[C]>(a.codes.data);
  const T eps = static_cast<T>(a.correction.eps), inverse_temperature = static_cast<T>(1 / a.correction.temperature);
  const bool fast = takes_reciprocals(a.correction);
  const int count = static_cast<int>(a.kept);
  for (int i = 0; i < p.length; i += Lanes<T>::width) {
    V point[C], total{};
    point_at(x, i, point);
    Kept<T, N> kept;
    if (fast) {
      find_nearest<true>(a.codes, point, eps, kept, total);
      const V share = reciprocal(total);
      for (int j = 0; j < count; ++j) lanes(&top.probability[j][i]) = reciprocal(kept.squared[j] + eps) * share;
    } else {
      find_nearest<false>(a.codes, point, eps, kept, total);
      for_transform(a.correction.transform, [&]<Transform transform>() {
        const V largest = logit_of<transform>(kept.squared[0], eps, inverse_temperature);
        add_exponentials<transform, C>(point, mu, a.codes.classes, eps, inverse_temperature, largest, total);
        // NaN for a pixel that is not finite or whose square overflows.
        const V share = reciprocal(total) + squared_norm<C>(point) * T(0);
        for (int j = 0; j < count; ++j) {
          const V logit = logit_of<transform>(kept.squared[j], eps, inverse_temperature);
          lanes(&top.probability[j][i]) = exponential(logit - largest) * share;
        }
      });
    }
    I unknown{};
    for (int c = 0; c < C; ++c) unknown |= point[c] != point[c];
    for (int j = 0; j < count; ++j) {
      *reinterpret_cast<I*>(&top.label[j][i]) = choose(unknown, I{} - 1, kept.label[j]);
    }
  }
}

}  // namespace

template <>
void PixelKernels<kIsa>::top_classes(const TopClasses& a, int64_t chunk) {
  for_type_and_channels(a.x, a.codes.padded, [&]<class T, int C>() {
    const int64_t pixels = a.x.height * a.x.width;
    PixelRanges ranges(chunk, pixels, kSmallChunkPixels);
    for (PixelRange p; ranges.next(p);) {
      Block<T, C> x;
      TopBlock<T> top;
      load(a.x, p, x);
      if (a.kept <= 4) {
        top_block<4>(a, p, x, top);
      } else if (a.kept <= 8) {
        top_block<8>(a, p, x, top);
      } else {
        top_block<kMostKept>(a, p, x, top);
      }
      for (int64_t j = 0; j < a.kept; ++j) {
        const int64_t offset = (p.image * a.kept + j) * pixels + p.start;
        switch (a.label_type) {
          case Integer::u8: store_labels<uint8_t>(top.label[j], a.labels, offset, p.length, a.ignore); break;
          case Integer::i16: store_labels<int16_t>(top.label[j], a.labels, offset, p.length, a.ignore); break;
          case Integer::i32: store_labels<int32_t>(top.label[j], a.labels, offset, p.length, a.ignore); break;
          case Integer::i64: store_labels<int64_t>(top.label[j], a.labels, offset, p.length, a.ignore); break;
        }
        std::memcpy(static_cast<T*>(a.probabilities) + offset, top.probability[j], p.length * sizeof(T));
      }
    }
  });
}

}  // namespace flowseg::cpu
