// flow_loss and its backward for one chunk of pixels. all.cpp compiles it once per instruction set.
#include "cpu/pixel/correction.h"

namespace flowseg::cpu {

namespace {

// Sixteen independent sums. In a single sum every addition would wait for the previous one.
constexpr int kSums = 16;

template <class T>
FLOWSEG_INLINE void add_up(const T (&v)[kBlock], double (&total)[kSums]) {
  for (int i = 0; i < kBlock; i += kSums) {
    for (int j = 0; j < kSums; ++j) total[j] += v[i + j];
  }
}

}  // namespace

template <>
void PixelKernels<kIsa>::loss(const Loss& a, int64_t chunk) {
  for_type_and_channels(a.prediction, a.codes.padded, [&]<class T, int C>() {
    using V = typename Lanes<T>::V;
    const int64_t pixels = a.prediction.height * a.prediction.width;
    const T inverse_channels = static_cast<T>(1.0 / a.prediction.channels);
    PixelRanges ranges(chunk, pixels);
    double total[kSums] = {};
    int64_t count = 0;
    for (PixelRange p; ranges.next(p);) {
      Block<T, C> out, x0, x1, grad;
      Classes<typename Lanes<T>::Int> y;
      load(a.prediction, p, out);
      load(a.source, p, x0);
      load_labels(a.labels, a.codes.classes, a.prediction, p, y);
      load_codes(a.codes, y, x1);
      const T t = static_cast<T>(a.times[p.image]);
      if (a.weight != 0) {
        Prefetcher prefetch(p);
        prefetch.read(a.prediction);
        prefetch.read(a.source);
        prefetch.read(a.labels);
        if (a.residual.data) prefetch.write(a.residual, a.prediction);
        if (a.predicts_endpoint) {
          correct_block(a.correction, a.codes, out, y, x1, prefetch, grad);
        } else {
          Block<T, C> xhat;
          for (int c = 0; c < C; ++c) {
            for (int i = 0; i < kBlock; ++i) {
              xhat.at[c][i] = (1 - t) * (x0.at[c][i] + out.at[c][i]) + t * x1.at[c][i];
            }
          }
          correct_block(a.correction, a.codes, xhat, y, x1, prefetch, grad);
        }
      }
      T scale = 1;
      if (a.predicts_endpoint != a.endpoint_space) {
        const T floor = static_cast<T>(a.t_min);
        scale = a.endpoint_space ? 1 - t : 1 / (1 - t > floor ? 1 - t : floor);
      }
      const T weight = static_cast<T>(a.weight) * (a.annealed ? 1 - t : T(1));
      const T to_residual = scale * 2 * inverse_channels * static_cast<T>(a.residual_scale);
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
          lanes(&out.at[c][i]) = error * to_residual;
        }
        lanes(&square[i]) = sum * inverse_channels;
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

template <>
void PixelKernels<kIsa>::count(const Count& a, int64_t chunk) {
  PixelRanges ranges(chunk, a.shape.height * a.shape.width);
  int64_t total = 0;
  for (PixelRange p; ranges.next(p);) total += count_valid(a.labels, a.classes, a.shape, p);
  a.counts[chunk] = total;
}

template <>
void PixelKernels<kIsa>::scale(const Scale& a, int64_t chunk) {
  const int64_t channels = a.residual.channels;
  for_type_and_channels(a.residual, channels <= 4 ? 4 : 16, [&]<class T, int C>() {
    PixelRanges ranges(chunk, a.residual.height * a.residual.width);
    for (PixelRange p; ranges.next(p);) {
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

}  // namespace flowseg::cpu
