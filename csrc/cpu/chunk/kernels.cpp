// The per-chunk functions of every op, compiled once for each instruction set.
#include <type_traits>

#include "blocks.h"
#include "correct.h"
#include "decode.h"

namespace flowseg::cpu {
namespace {

void interpolate(const Interpolate& a, int64_t chunk) {
  for_type_and_channels(a.source, a.codes.padded, [&]<class T, int C>() {
    using V = typename Lanes<T>::V;
    Places places(chunk, a.source.height * a.source.width);
    for (Place p; places.next(p);) {
      Block<T, C> x, code;
      Classes<typename Lanes<T>::Int> y;
      load(a.source, p, x);
      load_labels(a.labels, a.codes.classes, a.source, p, y);
      load_codes(a.codes, y, code);
      const T t = static_cast<T>(a.times[p.image]);
      for (int c = 0; c < C; ++c) {
        for (int i = 0; i < kBlock; i += Lanes<T>::width) {
          V& v = lanes(&x.at[c][i]);
          v = choose(integer_lanes<T>(&y.at[i]) >= 0, (1 - t) * v + t * lanes(&code.at[c][i]), v);
        }
      }
      store(x, a.out, a.source, p);
    }
  });
}

void interpolate_backward(const InterpolateBackward& a, int64_t chunk) {
  for_type_and_channels(a.source, a.codes.padded, [&]<class T, int C>() {
    Places places(chunk, a.source.height * a.source.width);
    double total = 0;
    for (Place p; places.next(p);) {
      Block<T, C> grad, x, code;
      Classes<typename Lanes<T>::Int> y;
      load(a.grad, p, grad);
      load_labels(a.labels, a.codes.classes, a.source, p, y);
      const T t = static_cast<T>(a.times[p.image]);
      if (a.grad_time) {
        load(a.source, p, x);
        load_codes(a.codes, y, code);
        for (int c = 0; c < C; ++c) {
          for (int i = 0; i < p.length; ++i) {
            if (y.at[i] >= 0) total += static_cast<double>(grad.at[c][i]) * (code.at[c][i] - x.at[c][i]);
          }
        }
      }
      for (int c = 0; c < C; ++c) {
        for (int i = 0; i < kBlock; ++i) grad.at[c][i] = y.at[i] >= 0 ? (1 - t) * grad.at[c][i] : grad.at[c][i];
      }
      store(grad, a.grad_source, a.source, p);
    }
    if (a.grad_time) a.grad_time[chunk] = total;
  });
}

void correct(const Correct& a, int64_t chunk) {
  for_type_and_channels(a.x, a.codes.padded, [&]<class T, int C>() {
    Places places(chunk, a.x.height * a.x.width);
    for (Place p; places.next(p);) {
      Block<T, C> x, code, grad;
      Classes<typename Lanes<T>::Int> y;
      load(a.x, p, x);
      load_labels(a.labels, a.codes.classes, a.x, p, y);
      load_codes(a.codes, y, code);
      Ahead ahead(p);
      ahead.read(a.x);
      ahead.read(a.labels);
      ahead.write(a.out, a.x);
      correct_block(a.correction, a.codes, x, y, code, ahead, grad);
      store(grad, a.out, a.x, p);
    }
  });
}

constexpr int kSums = 16;

// Sums of their own for each lane: one after the other would wait for every addition.
template <class T>
FLOWSEG_INLINE void add_up(const T (&v)[kBlock], double (&total)[kSums]) {
  for (int i = 0; i < kBlock; i += kSums) {
    for (int j = 0; j < kSums; ++j) total[j] += v[i + j];
  }
}

void loss(const Loss& a, int64_t chunk) {
  for_type_and_channels(a.prediction, a.codes.padded, [&]<class T, int C>() {
    using V = typename Lanes<T>::V;
    const int64_t pixels = a.prediction.height * a.prediction.width;
    const T mean = static_cast<T>(1.0 / a.prediction.channels);
    Places places(chunk, pixels);
    double total[kSums] = {};
    int64_t count = 0;
    for (Place p; places.next(p);) {
      Block<T, C> out, x0, x1, grad;
      Classes<typename Lanes<T>::Int> y;
      load(a.prediction, p, out);
      load(a.source, p, x0);
      load_labels(a.labels, a.codes.classes, a.prediction, p, y);
      load_codes(a.codes, y, x1);
      const T t = static_cast<T>(a.times[p.image]);
      if (a.weight != 0) {
        Ahead ahead(p);
        ahead.read(a.prediction);
        ahead.read(a.source);
        ahead.read(a.labels);
        if (a.residual.data) ahead.write(a.residual, a.prediction);
        if (a.predicts_endpoint) {
          correct_block(a.correction, a.codes, out, y, x1, ahead, grad);
        } else {
          Block<T, C> xhat;
          for (int c = 0; c < C; ++c) {
            for (int i = 0; i < kBlock; ++i) {
              xhat.at[c][i] = (1 - t) * (x0.at[c][i] + out.at[c][i]) + t * x1.at[c][i];
            }
          }
          correct_block(a.correction, a.codes, xhat, y, x1, ahead, grad);
        }
      }
      T scale = 1;
      if (a.predicts_endpoint != a.endpoint_space) {
        const T floor = static_cast<T>(a.t_min);
        scale = a.endpoint_space ? 1 - t : 1 / (1 - t > floor ? 1 - t : floor);
      }
      const T weight = static_cast<T>(a.weight) * (a.annealed ? 1 - t : T(1));
      const T back = scale * 2 * mean * static_cast<T>(a.share);
      alignas(64) T square[kBlock];
      int valid = 0;
      for (int i = 0; i < kBlock; i += Lanes<T>::width) {
        const auto inside = integer_lanes<T>(&y.at[i]) >= 0;
        V sum{};
        for (int c = 0; c < C; ++c) {
          V target = lanes(&x1.at[c][i]);
          if (!a.predicts_endpoint) target -= lanes(&x0.at[c][i]);
          V error = scale * (lanes(&out.at[c][i]) - target);
          if (a.weight != 0) error += weight * lanes(&grad.at[c][i]);
          error = choose(inside, error, V{});
          sum += error * error;
          lanes(&out.at[c][i]) = error * back;
        }
        lanes(&square[i]) = sum * mean;
      }
      add_up(square, total);
      for (int i = 0; i < kBlock; ++i) valid += y.at[i] >= 0;
      count += valid;
      if (a.per_pixel) std::memcpy(static_cast<T*>(a.per_pixel) + p.image * pixels + p.start, square, p.length * sizeof(T));
      if (a.residual.data) store(out, a.residual, a.prediction, p);
    }
    a.sums[chunk] = 0;
    for (double part : total) a.sums[chunk] += part;
    a.counts[chunk] = count;
  });
}

void count(const Count& a, int64_t chunk) {
  Places places(chunk, a.shape.height * a.shape.width);
  int64_t total = 0;
  for (Place p; places.next(p);) total += count_labels(a.labels, a.classes, a.shape, p);
  a.counts[chunk] = total;
}

void scale(const Scale& a, int64_t chunk) {
  const int64_t channels = a.residual.channels;
  for_type_and_channels(a.residual, channels <= 4 ? 4 : 16, [&]<class T, int C>() {
    Places places(chunk, a.residual.height * a.residual.width);
    for (Place p; places.next(p);) {
      Block<T, C> r;
      alignas(64) T factor[kBlock] = {};
      load(a.residual, p, r);
      const T* grad = static_cast<const T*>(a.grad) + p.image * a.stride[0];
      for_each_element(p, a.residual.height, a.residual.width, a.stride[1], a.stride[2],
                       [&](int i, int64_t offset) { factor[i] = static_cast<T>(grad[offset] * a.factor); });
      for (int c = 0; c < channels; ++c) {
        for (int i = 0; i < kBlock; ++i) r.at[c][i] *= factor[i];
      }
      store(r, a.out, a.residual, p);
    }
  });
}

template <class S, class Int>
void store_labels(const Int* FLOWSEG_RESTRICT from, void* to, int64_t offset, int length, int64_t ignore) {
  S* FLOWSEG_RESTRICT out = static_cast<S*>(to) + offset;
  const S unknown = static_cast<S>(ignore);
  for (int i = 0; i < length; ++i) out[i] = from[i] < 0 ? unknown : static_cast<S>(from[i]);
}

void decode(const Decode& a, int64_t chunk) {
  for_type_and_channels(a.x, a.codes.padded, [&]<class T, int C>() {
    const int64_t pixels = a.x.height * a.x.width;
    Places places(chunk, pixels);
    for (Place p; places.next(p);) {
      Block<T, C> x;
      Found<T> found;
      load(a.x, p, x);
      decode_block(a, p, x, found);
      const int64_t offset = p.image * pixels + p.start;
      switch (a.label_type) {
        case Integer::u8: store_labels<uint8_t>(found.label, a.labels, offset, p.length, a.ignore); break;
        case Integer::i16: store_labels<int16_t>(found.label, a.labels, offset, p.length, a.ignore); break;
        case Integer::i32: store_labels<int32_t>(found.label, a.labels, offset, p.length, a.ignore); break;
        case Integer::i64: store_labels<int64_t>(found.label, a.labels, offset, p.length, a.ignore); break;
      }
      if (a.distance) {
        T* out = static_cast<T*>(a.distance) + offset;
        for (int i = 0; i < p.length; ++i) out[i] = std::sqrt(found.nearest[i]);
      }
      if (a.margin) {
        T* out = static_cast<T*>(a.margin) + offset;
        for (int i = 0; i < p.length; ++i) out[i] = std::sqrt(found.second[i]) - std::sqrt(found.nearest[i]);
      }
    }
  });
}

void confusion(const Confusion& a, int64_t chunk, int64_t* counts, bool shared) {
  const int64_t classes = a.decode.codes.classes;
  for_type_and_channels(a.decode.x, a.decode.codes.padded, [&]<class T, int C>() {
    Places places(chunk, a.decode.x.height * a.decode.x.width);
    for (Place p; places.next(p);) {
      Block<T, C> x;
      Found<T> found;
      Classes<typename Lanes<T>::Int> y;
      load(a.decode.x, p, x);
      load_labels(a.target, classes, a.decode.x, p, y);
      decode_block(a.decode, p, x, found);
      const auto cell = [&](int i) { return counts + y.at[i] * classes + found.label[i]; };
      if (!shared) {
        for (int i = 0; i < p.length; ++i) {
          if (y.at[i] >= 0 && found.label[i] >= 0) ++*cell(i);
        }
        continue;
      }
      // Neighbours mostly have one class, and so they add to memory that other threads add to once.
      int64_t* last = counts;
      int64_t run = 0;
      for (int i = 0; i < p.length; ++i) {
        if (y.at[i] < 0 || found.label[i] < 0) continue;
        if (cell(i) != last) {
          if (run) __atomic_fetch_add(last, run, __ATOMIC_RELAXED);
          last = cell(i);
          run = 0;
        }
        ++run;
      }
      if (run) __atomic_fetch_add(last, run, __ATOMIC_RELAXED);
    }
  });
}

}  // namespace

namespace FLOWSEG_ISA {
extern const Kernels kernels;
const Kernels kernels{interpolate, interpolate_backward, correct, loss, count, scale, decode, confusion};
}  // namespace FLOWSEG_ISA

}  // namespace flowseg::cpu
