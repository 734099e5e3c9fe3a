// decode_confusion for one chunk of pixels. all.cpp compiles it once per instruction set.
#include "cpu/pixel/decode.h"

namespace flowseg::cpu {

namespace {

FLOWSEG_INLINE void add(int64_t* to, int64_t count, bool shared) {
  if (shared) {
    __atomic_fetch_add(to, count, __ATOMIC_RELAXED);
  } else {
    *to += count;
  }
}

// Calls use(truth, prediction, number of pixels) for each run of pixels with the same two classes. Neighbouring pixels mostly have
// the same class. Pixels without a class do not count.
template <class Int, class Use>
FLOWSEG_INLINE void for_each_run(const Int* truth, const Int* prediction, int length, Use use) {
  Int last_truth = -1, last_prediction = -1;
  int64_t run = 0;
  for (int i = 0; i < length; ++i) {
    if (truth[i] < 0 || prediction[i] < 0) continue;
    if (truth[i] != last_truth || prediction[i] != last_prediction) {
      if (run) use(last_truth, last_prediction, run);
      last_truth = truth[i];
      last_prediction = prediction[i];
      run = 0;
    }
    ++run;
  }
  if (run) use(last_truth, last_prediction, run);
}

}  // namespace

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
      if (a.by_class) {
        for_each_run(y.at, nearest.label, p.length, [&](int64_t truth, int64_t prediction, int64_t run) {
          if (truth == prediction) add(counts + truth, run, shared);
          add(counts + classes + truth, run, shared);
          add(counts + 2 * classes + prediction, run, shared);
        });
      } else if (shared) {
        for_each_run(y.at, nearest.label, p.length, [&](int64_t truth, int64_t prediction, int64_t run) {
          add(counts + truth * classes + prediction, run, true);
        });
      } else {
        for (int i = 0; i < p.length; ++i) {
          if (y.at[i] >= 0 && nearest.label[i] >= 0) ++counts[y.at[i] * classes + nearest.label[i]];
        }
      }
    }
  });
}

}  // namespace flowseg::cpu
