// flow_interpolate and its backward for one chunk of pixels. all.cpp compiles it once per instruction set.
#include "cpu/pixel/blocks.h"

namespace flowseg::cpu {

template <>
void PixelKernels<kIsa>::interpolate(const Interpolate& a, int64_t chunk) {
  for_type_and_channels(a.source, a.codes.padded, [&]<class T, int C>() {
    using V = typename Lanes<T>::V;
    PixelRanges ranges(chunk, a.source.height * a.source.width);
    for (PixelRange p; ranges.next(p);) {
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

template <>
void PixelKernels<kIsa>::interpolate_backward(const InterpolateBackward& a, int64_t chunk) {
  for_type_and_channels(a.source, a.codes.padded, [&]<class T, int C>() {
    PixelRanges ranges(chunk, a.source.height * a.source.width);
    double total = 0;
    for (PixelRange p; ranges.next(p);) {
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

}  // namespace flowseg::cpu
