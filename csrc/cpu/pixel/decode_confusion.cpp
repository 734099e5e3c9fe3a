// decode_confusion for one chunk of pixels. all.cpp compiles it once per instruction set.
#include "cpu/pixel/decode.h"

namespace flowseg::cpu {

template <>
void PixelKernels<kIsa>::confusion(const Confusion& a, int64_t chunk, int64_t* counts, bool shared) {
  const int64_t classes = a.decode.codes.classes;
  for_type_and_channels(a.decode.x, a.decode.codes.padded, [&]<class T, int C>() {
    PixelRanges ranges(chunk, a.decode.x.height * a.decode.x.width);
    Recent recent(a.decode.x.width);
    for (PixelRange p; ranges.next(p);) {
      Nearest<T> nearest;
      Classes<typename Lanes<T>::Int> y;
      load_labels(a.target, classes, a.decode.x, p, y);
      decode_block<T, C>(a.decode, p, recent, nearest);
      const auto cell = [&](int i) { return counts + y.at[i] * classes + nearest.label[i]; };
      if (!shared) {
        for (int i = 0; i < p.length; ++i) {
          if (y.at[i] >= 0 && nearest.label[i] >= 0) ++*cell(i);
        }
        continue;
      }
      // One atomic addition per run of equal pairs: neighbouring pixels mostly have the same class.
      int64_t* last = counts;
      int64_t run = 0;
      for (int i = 0; i < p.length; ++i) {
        if (y.at[i] < 0 || nearest.label[i] < 0) continue;
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

}  // namespace flowseg::cpu
