// Loads blocks of pixels from memory of any dtype and strides into small aligned arrays, and stores them back.
#pragma once

#include <type_traits>

#include "cpu/pixel/simd.h"
#include "shared/types.h"

namespace flowseg::cpu {
namespace {

constexpr int kBlock = 256;

template <class T, int C>
struct alignas(64) Block {
  T at[C][kBlock];
};

struct PixelRange {
  int64_t image, start;  // start: flat position inside the image
  int length;
};

// The blocks of a chunk in order: for (PixelRange p; ranges.next(p);)
class PixelRanges {
 public:
  PixelRanges(int64_t chunk, int64_t pixels, int64_t chunk_pixels = kChunkPixels) {
    const int64_t chunks_per_image = (pixels + chunk_pixels - 1) / chunk_pixels;
    image_ = chunk / chunks_per_image;
    at_ = (chunk - image_ * chunks_per_image) * chunk_pixels;
    end_ = at_ + chunk_pixels < pixels ? at_ + chunk_pixels : pixels;
  }
  bool next(PixelRange& p) {
    if (at_ >= end_) return false;
    p = {image_, at_, static_cast<int>(end_ - at_ < kBlock ? end_ - at_ : kBlock)};
    at_ += p.length;
    return true;
  }

 private:
  int64_t image_, at_, end_;
};

// Calls use(index in the block, offset in memory in elements) for each pixel, row by row.
template <class Use>
FLOWSEG_INLINE void for_each_pixel(const PixelRange& p, int64_t width, int64_t stride_row, int64_t stride_column, Use use) {
  int64_t row = p.start / width, column = p.start - row * width;
  int at = 0;
  while (at < p.length) {
    int64_t offset = row * stride_row + column * stride_column;
    const int n = static_cast<int>(p.length - at < width - column ? p.length - at : width - column);
    for (int i = 0; i < n; ++i) use(at + i, offset + i * stride_column);
    at += n;
    ++row;
    column = 0;
  }
}

// As for_each_pixel, but faster if the rows have no gaps between them: the block is then one contiguous range.
template <class Use>
FLOWSEG_INLINE void for_each_element(const PixelRange& p, int64_t height, int64_t width, int64_t stride_row, int64_t stride_column,
                                     Use use) {
  if (height == 1 || stride_row == width * stride_column) {
    const int64_t offset = p.start * stride_column;
    if (stride_column == 1) {
      for (int i = 0; i < p.length; ++i) use(i, offset + i);
    } else {
      for (int i = 0; i < p.length; ++i) use(i, offset + i * stride_column);
    }
  } else {
    for_each_pixel(p, width, stride_row, stride_column, use);
  }
}

template <class S, class T, int C>
void load_as(const Image& image, const PixelRange& p, Block<T, C>& block) {
  for (int c = 0; c < C; ++c) {
    T* FLOWSEG_RESTRICT to = block.at[c];
    int filled = 0;
    if (c < image.channels) {
      const S* FLOWSEG_RESTRICT from =
          static_cast<const S*>(image.data) + p.image * image.stride[0] + c * image.stride[1];
      for_each_element(p, image.height, image.width, image.stride[2], image.stride[3],
                       [&](int i, int64_t offset) { to[i] = static_cast<T>(widen(from[offset])); });
      filled = p.length;
    }
    for (int i = filled; i < kBlock; ++i) to[i] = 0;
  }
}

template <class T, int C>
void load(const Image& image, const PixelRange& p, Block<T, C>& block) {
  switch (image.type) {
    case Real::f32: return load_as<float>(image, p, block);
    case Real::f64: return load_as<double>(image, p, block);
    case Real::f16: return load_as<Half>(image, p, block);
    case Real::bf16: return load_as<BFloat>(image, p, block);
  }
}

template <class S, class T, int C>
void store_as(const Block<T, C>& block, const Output& out, const Image& shape, const PixelRange& p) {
  const int64_t pixels = shape.height * shape.width;
  for (int64_t c = 0; c < shape.channels; ++c) {
    S* FLOWSEG_RESTRICT to = static_cast<S*>(out.data) + (p.image * shape.channels + c) * pixels + p.start;
    const T* FLOWSEG_RESTRICT from = block.at[c];
    for (int i = 0; i < p.length; ++i) narrow(from[i], to[i]);
  }
}

// Stores a block to a contiguous result that has the shape of `shape`.
template <class T, int C>
void store(const Block<T, C>& block, const Output& out, const Image& shape, const PixelRange& p) {
  switch (out.type) {
    case Real::f32: return store_as<float>(block, out, shape, p);
    case Real::f64: return store_as<double>(block, out, shape, p);
    case Real::f16: return store_as<Half>(block, out, shape, p);
    case Real::bf16: return store_as<BFloat>(block, out, shape, p);
  }
}

// Classes of a block. -1: ignored, not a class, or past the end.
template <class Int>
struct alignas(64) Classes {
  Int at[kBlock];
};

// Calls use(index in the block, label, whether the label is a class, whether it is ignored) for each pixel.
template <class S, class Use>
FLOWSEG_INLINE void for_each_label_as(const Labels& labels, int64_t classes, const Image& shape, const PixelRange& p, Use use) {
  const S* FLOWSEG_RESTRICT from = static_cast<const S*>(labels.data) + p.image * labels.stride[0];
  // Compare labels of 8 and 16 bits as int32: a vector then holds as many labels as classes.
  using Int = std::conditional_t<(sizeof(S) < 4), int32_t, int64_t>;
  const Int ignore = static_cast<Int>(labels.ignore), count = static_cast<Int>(classes);
  const bool has_ignored = ignore == labels.ignore;
  for_each_element(p, shape.height, shape.width, labels.stride[1], labels.stride[2], [&](int i, int64_t offset) {
    const Int y = from[offset];
    use(i, y, (y >= 0) & (y < count), has_ignored & (y == ignore));
  });
}

template <class Use>
FLOWSEG_INLINE void for_each_label(const Labels& labels, int64_t classes, const Image& shape, const PixelRange& p, Use use) {
  switch (labels.type) {
    case Integer::u8: return for_each_label_as<uint8_t>(labels, classes, shape, p, use);
    case Integer::i16: return for_each_label_as<int16_t>(labels, classes, shape, p, use);
    case Integer::i32: return for_each_label_as<int32_t>(labels, classes, shape, p, use);
    case Integer::i64: return for_each_label_as<int64_t>(labels, classes, shape, p, use);
  }
}

// Loads the classes of a block, and records the position of the first bad label in labels.first_bad.
template <class Int>
void load_labels(const Labels& labels, int64_t classes, const Image& shape, const PixelRange& p, Classes<Int>& out) {
  int bad = 0;
  for_each_label(labels, classes, shape, p, [&](int i, auto y, bool inside, bool ignored) {
    bad |= !(inside | ignored);
    out.at[i] = (inside & !ignored) ? static_cast<Int>(y) : Int(-1);
  });
  for (int i = p.length; i < kBlock; ++i) out.at[i] = -1;
  if (bad) {
    int first = kBlock;
    for_each_label(labels, classes, shape, p, [&](int i, auto, bool inside, bool ignored) {
      if (!(inside | ignored) && i < first) first = i;
    });
    const int64_t position = p.image * shape.height * shape.width + p.start + first;
    int64_t seen = __atomic_load_n(labels.first_bad, __ATOMIC_RELAXED);
    while (position < seen &&
           !__atomic_compare_exchange_n(labels.first_bad, &seen, position, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
}

// Number of pixels of a block that have a class.
inline int count_valid(const Labels& labels, int64_t classes, const Image& shape, const PixelRange& p) {
  int valid = 0;
  for_each_label(labels, classes, shape, p, [&](int, auto, bool inside, bool ignored) { valid += inside & !ignored; });
  return valid;
}

// Loads the centroid of each pixel's class; 0 for pixels without a class. Copying whole rows and transposing them afterwards is
// faster than gathering channel by channel.
template <class T, int C, class Int>
void load_codes(const Codes& codes, const Classes<Int>& classes, Block<T, C>& block) {
  const T* FLOWSEG_RESTRICT mu = static_cast<const T*>(codes.data);
  struct Row {
    T at[C];
  } rows[kBlock];
  alignas(64) Int row[kBlock];
  for (int i = 0; i < kBlock; ++i) row[i] = classes.at[i] < 0 ? 0 : classes.at[i];
  for (int i = 0; i < kBlock; ++i) std::memcpy(&rows[i], mu + static_cast<int64_t>(row[i]) * C, sizeof(Row));
  for (int i = 0; i < kBlock; ++i) {
    for (int c = 0; c < C; ++c) block.at[c][i] = classes.at[i] < 0 ? T(0) : rows[i].at[c];
  }
}

template <class T>
FLOWSEG_INLINE typename Lanes<T>::V& lanes(T* p) {
  return *reinterpret_cast<typename Lanes<T>::V*>(p);
}
template <class T>
FLOWSEG_INLINE const typename Lanes<T>::V& lanes(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::V*>(p);
}
template <class T>
FLOWSEG_INLINE const typename Lanes<T>::I& integer_lanes(const typename Lanes<T>::Int* p) {
  return *reinterpret_cast<const typename Lanes<T>::I*>(p);
}

// Prefetches the next block's inputs and this block's outputs, a part per vector, while the arithmetic over the classes leaves the
// memory idle. It assumes rows without gaps between them; where there are gaps, some prefetches are useless.
class Prefetcher {
 public:
  explicit Prefetcher(const PixelRange& p) : p_(p) {}
  void read(const Image& v) {
    const int size = static_cast<int>(size_of(v.type));
    for (int64_t c = 0; c < v.channels; ++c) {
      add(v.data, p_.image * v.stride[0] + c * v.stride[1] + (p_.start + kBlock) * v.stride[3], v.stride[3], size);
    }
  }
  void read(const Labels& v) {
    add(v.data, p_.image * v.stride[0] + (p_.start + kBlock) * v.stride[2], v.stride[2], static_cast<int>(size_of(v.type)));
  }
  void write(const Output& v, const Image& shape) {
    const int64_t pixels = shape.height * shape.width;
    for (int64_t c = 0; c < shape.channels; ++c) {
      add(v.data, (p_.image * shape.channels + c) * pixels + p_.start, 1, static_cast<int>(size_of(v.type)));
    }
  }
  FLOWSEG_INLINE void operator()(int pixel) const {
    for (int i = 0; i < count_; ++i) __builtin_prefetch(at_[i] + pixel * step_[i]);
  }

 private:
  void add(const void* data, int64_t offset, int64_t stride, int size) {
    at_[count_] = static_cast<const char*>(data) + offset * size;
    step_[count_++] = stride * size;
  }
  const PixelRange& p_;
  int count_ = 0;
  const char* at_[3 * 16 + 1];
  int64_t step_[3 * 16 + 1];
};

// Calls body.template operator()<T, C>() with the compute type and the padded number of channels.
template <class T, class Body>
FLOWSEG_INLINE void for_channels(int padded, Body body) {
  switch (padded) {
    case 2: return body.template operator()<T, 2>();
    case 3: return body.template operator()<T, 3>();
    case 4: return body.template operator()<T, 4>();
    case 8: return body.template operator()<T, 8>();
    case 16: return body.template operator()<T, 16>();
  }
}
template <class Body>
FLOWSEG_INLINE void for_type_and_channels(const Image& image, int padded, Body body) {
  if (image.type == Real::f64) {
    for_channels<double>(padded, body);
  } else {
    for_channels<float>(padded, body);
  }
}

}  // namespace
}  // namespace flowseg::cpu
