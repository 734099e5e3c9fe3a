// nearest_centroid for one chunk of pixels. all.cpp compiles it once per instruction set.
#include "cpu/pixel/decode.h"

namespace flowseg::cpu {

template <>
void PixelKernels<kIsa>::decode(const Decode& a, int64_t chunk) {
  for_type_and_channels(a.x, a.codes.padded, [&]<class T, int C>() {
    const int64_t pixels = a.x.height * a.x.width;
    PixelRanges ranges(chunk, pixels);
    Recent recent(a.x.width);
    for (PixelRange p; ranges.next(p);) {
      Nearest<T> nearest;
      decode_block<T, C>(a, p, recent, nearest);
      const int64_t offset = p.image * pixels + p.start;
      switch (a.label_type) {
        case Integer::u8: store_labels<uint8_t>(nearest.label, a.labels, offset, p.length, a.ignore); break;
        case Integer::i16: store_labels<int16_t>(nearest.label, a.labels, offset, p.length, a.ignore); break;
        case Integer::i32: store_labels<int32_t>(nearest.label, a.labels, offset, p.length, a.ignore); break;
        case Integer::i64: store_labels<int64_t>(nearest.label, a.labels, offset, p.length, a.ignore); break;
      }
      if (a.distance) {
        T* out = static_cast<T*>(a.distance) + offset;
        for (int i = 0; i < p.length; ++i) out[i] = std::sqrt(nearest.squared[i]);
      }
      if (a.margin) {
        T* out = static_cast<T*>(a.margin) + offset;
        for (int i = 0; i < p.length; ++i) out[i] = std::sqrt(nearest.second_squared[i]) - std::sqrt(nearest.squared[i]);
      }
    }
  });
}

}  // namespace flowseg::cpu
