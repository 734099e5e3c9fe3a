// From torch tensors to the plain arguments of the chunk functions, with the checks that only C++ needs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "../torch/tensors.h"
#include "arguments.h"

namespace flowseg::cpu {

const Kernels& kernels();  // of the best instruction set of this CPU
int instruction_set();     // 0 baseline, 1 AVX2, 2 AVX-512

inline Image image_of(const Tensor& t, const char* name) {
  FLOWSEG_CHECK(t.is_cpu(), name, ": wanted a CPU tensor");
  return view_of(t, name);
}

inline int64_t chunks_of(const Image& image) {
  return image.batch * ((image.height * image.width + kChunk - 1) / kChunk);
}

// Labels with the place of the first bad one; `check` raises after the kernel has run.
class LabelArgument {
 public:
  LabelArgument(const Tensor& t, const Image& image, int64_t classes, int64_t ignore, const char* name)
      : tensor_(t), classes_(classes), name_(name) {
    labels = {label_map_of(t, image, ignore, name), &first_bad_};
  }
  LabelArgument(const LabelArgument&) = delete;

  void check() const {
    if (first_bad_ == std::numeric_limits<int64_t>::max()) return;
    const int64_t h = tensor_.size(1), w = tensor_.size(2);
    const int64_t b = first_bad_ / (h * w), row = first_bad_ / w % h, column = first_bad_ % w;
    const int64_t offset = b * labels.stride[0] + row * labels.stride[1] + column * labels.stride[2];
    int64_t value = 0;
    switch (labels.type) {
      case Integer::u8: value = static_cast<const uint8_t*>(labels.data)[offset]; break;
      case Integer::i16: value = static_cast<const int16_t*>(labels.data)[offset]; break;
      case Integer::i32: value = static_cast<const int32_t*>(labels.data)[offset]; break;
      case Integer::i64: value = static_cast<const int64_t*>(labels.data)[offset]; break;
    }
    FLOWSEG_CHECK(false, name_, ": wanted values in [0, ", classes_, ") or ignore_index ", labels.ignore, "; got ", value,
                  " at (image, row, column) (", b, ", ", row, ", ", column, ")");
  }

  Labels labels;

 private:
  const Tensor& tensor_;
  int64_t classes_;
  const char* name_;
  int64_t first_bad_ = std::numeric_limits<int64_t>::max();
};

// NaN does not count. In lanes of their own: one maximum after the other would take longer than decoding many classes does.
template <class T>
T largest_magnitude(const T* v, int64_t n) {
  constexpr int kLanes = 16;
  T largest[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) largest[j] = std::abs(v[i + j]) > largest[j] ? std::abs(v[i + j]) : largest[j];
  }
  for (; i < n; ++i) largest[0] = std::abs(v[i]) > largest[0] ? std::abs(v[i]) : largest[0];
  return *std::max_element(largest, largest + kLanes);
}

template <class T>
bool all_finite(const T* v, int64_t n) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) finite &= std::abs(v[i]) <= std::numeric_limits<T>::max();
  return finite;
}

// Centroids with rows padded to a number of channels that has a kernel.
class CodeArgument {
 public:
  CodeArgument(const Tensor& t, const Image& image) {
    check_codes(t, image);
    const int64_t classes = t.size(0), channels = t.size(1);
    const bool wide = image.type == Real::f64;
    const int padded = channels <= 2 ? 2 : channels <= 4 ? static_cast<int>(channels) : channels <= 8 ? 8 : 16;
    codes = {t.data_ptr(), classes, padded, 0};
    const int64_t numbers = classes * channels;
    FLOWSEG_CHECK(wide ? all_finite(static_cast<const double*>(t.data_ptr()), numbers)
                       : all_finite(static_cast<const float*>(t.data_ptr()), numbers),
                  "centroids: wanted finite values; got NaN or infinity");
    codes.reach = wide ? largest_magnitude(static_cast<const double*>(t.data_ptr()), numbers)
                       : largest_magnitude(static_cast<const float*>(t.data_ptr()), numbers);
    if (padded != channels) {
      const size_t size = wide ? 8 : 4;
      storage_.resize(classes * padded * size);
      for (int64_t k = 0; k < classes; ++k) {
        std::memcpy(storage_.data() + k * padded * size, static_cast<const char*>(t.data_ptr()) + k * channels * size,
                    channels * size);
      }
      codes.data = storage_.data();
    }
  }
  CodeArgument(const CodeArgument&) = delete;

  Codes codes;

 private:
  std::vector<char> storage_;
};

// How far a time may lie outside [0, 1] by the rounding of its dtype.
inline double rounding_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return 2 * std::numeric_limits<double>::epsilon();
    case ScalarType::BFloat16: return 2.0 / 128;
    case ScalarType::Half: return 2.0 / 1024;
    default: return 2 * std::numeric_limits<float>::epsilon();
  }
}

// One time an image, as double.
inline std::vector<double> times_of(const Tensor& t, int64_t batch) {
  FLOWSEG_CHECK(t.dim() == 1 && t.size(0) == batch, "t: wanted shape (B,)");
  std::vector<double> times(batch);
  // Any dtype and stride: B numbers are not worth a kernel of their own.
  const Tensor wide = torch::stable::to(t, ScalarType::Double);
  const double* from = static_cast<const double*>(wide.data_ptr());
  const double rounding = rounding_of(t.scalar_type());
  for (int64_t b = 0; b < batch; ++b) {
    times[b] = from[b * wide.stride(0)];
    FLOWSEG_CHECK(times[b] >= -rounding && times[b] <= 1 + rounding, "t: wanted times in [0, 1]; got ", times[b], " for image ", b);
  }
  return times;
}

// Each thread takes the next chunk that nobody has: one that starts late, or shares its core, holds up the others by a chunk only.
template <class Step>
void for_each_chunk(const Image& image, Step step) {
  const int64_t chunks = chunks_of(image);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t, int64_t) {
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) step(chunk);
  });
}

}  // namespace flowseg::cpu
