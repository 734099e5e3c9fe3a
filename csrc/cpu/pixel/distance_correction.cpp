// distance_correction for one chunk of pixels. all.cpp compiles it once per instruction set.
#include "cpu/pixel/correction.h"

namespace flowseg::cpu {

template <>
void PixelKernels<kIsa>::correct(const Correct& a, int64_t chunk) {
  for_type_and_channels(a.x, a.codes.padded, [&]<class T, int C>() {
    PixelRanges ranges(chunk, a.x.height * a.x.width);
    for (PixelRange p; ranges.next(p);) {
      Block<T, C> x, code, grad;
      Classes<typename Lanes<T>::Int> y;
      load(a.x, p, x);
      load_labels(a.labels, a.codes.classes, a.x, p, y);
      load_codes(a.codes, y, code);
      Prefetcher prefetch(p);
      prefetch.read(a.x);
      prefetch.read(a.labels);
      prefetch.write(a.out, a.x);
      correct_block(a.correction, a.codes, x, y, code, prefetch, grad);
      store(grad, a.out, a.x, p);
    }
  });
}

}  // namespace flowseg::cpu
