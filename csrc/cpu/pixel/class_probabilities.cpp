// class_probabilities for one chunk of pixels. all.cpp compiles it once per instruction set.
//
// A block's normaliser comes first. A second pass over the classes then writes one row of the block per class. Keeping the
// distances of the first pass would need K numbers per pixel, which do not fit in the cache for many classes.
#include "cpu/pixel/probabilities.h"

namespace flowseg::cpu {

namespace {

// Writes value(class, index of the vector in the block) for every class and pixel of a block.
template <class T, class Value>
FLOWSEG_INLINE void write_classes(const Probabilities& a, const PixelRange& p, Value value) {
  const int64_t pixels = a.x.height * a.x.width;
  T* out = static_cast<T*>(a.out) + p.image * a.codes.classes * pixels + p.start;
  alignas(64) T row[kBlock];
  for (int64_t k = 0; k < a.codes.classes; ++k, out += pixels) {
    for (int i = 0; i < p.length; i += Lanes<T>::width) lanes(&row[i]) = value(k, i);
    std::memcpy(out, row, p.length * sizeof(T));
  }
}

// neg_log at temperature 1: p_k is proportional to 1 / (d_k + eps).
template <class T, int C>
void write_reciprocals(const Probabilities& a, const PixelRange& p, const Block<T, C>& x) {
  using V = typename Lanes<T>::V;
  const auto* mu = static_cast<const T(*)[C]>(a.codes.data);
  const T eps = static_cast<T>(a.correction.eps);
  alignas(64) T share[kBlock];
  for (int i = 0; i < p.length; i += Lanes<T>::width) {
    V point[C], total{};
    point_at(x, i, point);
    add_weights<C>(point, mu, a.codes.classes, eps, total);
    lanes(&share[i]) = reciprocal(total);
  }
  write_classes<T>(a, p, [&](int64_t k, int i) {
    V point[C];
    point_at(x, i, point);
    return reciprocal(squared_distance<C>(point, mu[k]) + eps) * lanes(&share[i]);
  });
}

template <Transform transform, class T, int C>
void write_exponentials(const Probabilities& a, const PixelRange& p, const Block<T, C>& x) {
  using V = typename Lanes<T>::V;
  const auto* mu = static_cast<const T(*)[C]>(a.codes.data);
  const T eps = static_cast<T>(a.correction.eps), inverse_temperature = static_cast<T>(1 / a.correction.temperature);
  const auto form = static_cast<Form>(a.form);
  // The term to subtract from a logit, and the factor after the exponential. Both carry NaN of pixels that are not finite.
  alignas(64) T shift[kBlock], share[kBlock];
  for (int i = 0; i < p.length; i += Lanes<T>::width) {
    V point[C];
    point_at(x, i, point);
    V& subtracted = lanes(&shift[i]);
    subtracted = squared_norm<C>(point) * T(0);
    if (form == Form::logits) continue;
    V smallest = V{} + infinity<T>(), total{};
    find_smallest_distance<C>(point, mu, a.codes.classes, smallest);
    const V largest = logit_of<transform>(smallest, eps, inverse_temperature);
    add_exponentials<transform, C>(point, mu, a.codes.classes, eps, inverse_temperature, largest, total);
    if (form == Form::log_probabilities) {
      subtracted += largest + logarithm(total);
    } else {
      lanes(&share[i]) = reciprocal(total) + subtracted;
      subtracted = largest;
    }
  }
  const auto logit = [&](int64_t k, int i) {
    V point[C];
    point_at(x, i, point);
    return logit_of<transform>(squared_distance<C>(point, mu[k]), eps, inverse_temperature) - lanes(&shift[i]);
  };
  if (form == Form::probabilities) {
    write_classes<T>(a, p, [&](int64_t k, int i) { return exponential(logit(k, i)) * lanes(&share[i]); });
  } else {
    write_classes<T>(a, p, logit);
  }
}

}  // namespace

template <>
void PixelKernels<kIsa>::probabilities(const Probabilities& a, int64_t chunk) {
  for_type_and_channels(a.x, a.codes.padded, [&]<class T, int C>() {
    PixelRanges ranges(chunk, a.x.height * a.x.width, kSmallChunkPixels);
    for (PixelRange p; ranges.next(p);) {
      Block<T, C> x;
      load(a.x, p, x);
      if (a.form == static_cast<int>(Form::probabilities) && takes_reciprocals(a.correction)) {
        write_reciprocals(a, p, x);
      } else {
        for_transform(a.correction.transform, [&]<Transform transform>() { write_exponentials<transform>(a, p, x); });
      }
    }
  });
}

}  // namespace flowseg::cpu
