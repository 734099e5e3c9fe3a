// From torch tensors to the parameters of the kernels, with the checks that only C++ needs, and the loop over chunks of pixels.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/params.h"
#include "torch/tensors.h"

namespace flowseg::cpu {

Isa instruction_set();  // the best of baseline, avx2 and avx512 that this CPU has

// Calls run(PixelKernels<isa>{}) for this instruction set.
template <class Run>
void with_kernels(Run run) {
#if defined(FLOWSEG_X86)
  switch (instruction_set()) {
    case Isa::avx512: return run(PixelKernels<Isa::avx512>{});
    case Isa::avx2: return run(PixelKernels<Isa::avx2>{});
    default: break;
  }
#endif
  run(PixelKernels<Isa::baseline>{});
}

inline Image image_of(const Tensor& t, const char* name) {
  FLOWSEG_CHECK(t.is_cpu(), name, ": wanted a CPU tensor");
  return view_of(t, name);
}

inline int64_t chunks_per_image(const Image& image, int64_t chunk_pixels = kChunkPixels) {
  return (image.height * image.width + chunk_pixels - 1) / chunk_pixels;
}
inline int64_t chunks_of(const Image& image, int64_t chunk_pixels = kChunkPixels) {
  return image.batch * chunks_per_image(image, chunk_pixels);
}

// Calls step(kernels, chunk) for every chunk of a batch. A thread takes the next chunk that no thread has: if it starts late or
// shares its core, the others wait for one chunk at most.
template <class Step>
void for_each_chunk(const Image& image, Step step, int64_t chunk_pixels = kChunkPixels) {
  const int64_t chunks = chunks_of(image, chunk_pixels);
  with_kernels([&](auto kernels) {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t, int64_t) {
      for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) step(kernels, chunk);
    });
  });
}

// Labels that the kernels check. Call `check` after the kernels: it raises an error for the first bad label.
class CheckedLabels {
 public:
  CheckedLabels(const Tensor& t, const Image& image, int64_t classes, int64_t ignore, const char* name)
      : tensor_(t), classes_(classes), name_(name) {
    labels = {label_map_of(t, image, ignore, name), &first_bad_};
  }
  CheckedLabels(const CheckedLabels&) = delete;

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

// The largest magnitude; ignores NaN. Sixteen independent maxima: one chain of dependent compares would take longer
// than decoding with many classes does.
template <class T>
T max_abs(const T* v, int64_t n) {
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

// Centroids in rows that are padded with zeros to the next number of channels that the kernels are compiled for.
class PaddedCodes {
 public:
  PaddedCodes(const Tensor& t, const Image& image) {
    check_codes(t, image);
    const int64_t classes = t.size(0), channels = t.size(1);
    const bool is_double = image.type == Real::f64;
    const int padded = channels <= 2 ? 2 : channels <= 4 ? static_cast<int>(channels) : channels <= 8 ? 8 : 16;
    codes = {.data = t.data_ptr(), .classes = classes, .padded = padded, .max_abs = 0};
    const auto measure = [&](const auto* values) {
      const int64_t numbers = classes * channels;
      FLOWSEG_CHECK(all_finite(values, numbers), "centroids: wanted finite values; got NaN or infinity");
      codes.max_abs = max_abs(values, numbers);
    };
    if (is_double) {
      measure(static_cast<const double*>(t.data_ptr()));
    } else {
      measure(static_cast<const float*>(t.data_ptr()));
    }
    if (padded != channels) {
      const size_t size = is_double ? 8 : 4;
      storage_.resize(classes * padded * size);
      for (int64_t k = 0; k < classes; ++k) {
        std::memcpy(storage_.data() + k * padded * size, static_cast<const char*>(t.data_ptr()) + k * channels * size,
                    channels * size);
      }
      codes.data = storage_.data();
    }
  }
  PaddedCodes(const PaddedCodes&) = delete;

  Codes codes;

 private:
  std::vector<char> storage_;
};

// How far rounding to a dtype may move a time out of [0, 1].
inline double rounding_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return 2 * std::numeric_limits<double>::epsilon();
    case ScalarType::BFloat16: return 2.0 / 128;
    case ScalarType::Half: return 2.0 / 1024;
    default: return 2 * std::numeric_limits<float>::epsilon();
  }
}

// The time of each image, as double. torch converts the dtype: B numbers do not justify a kernel.
inline std::vector<double> times_of(const Tensor& t, int64_t batch) {
  FLOWSEG_CHECK(t.dim() == 1 && t.size(0) == batch, "t: wanted shape (B,)");
  std::vector<double> times(batch);
  const Tensor doubles = torch::stable::to(t, ScalarType::Double);
  const double* from = static_cast<const double*>(doubles.data_ptr());
  const double rounding = rounding_of(t.scalar_type());
  for (int64_t b = 0; b < batch; ++b) {
    times[b] = from[b * doubles.stride(0)];
    FLOWSEG_CHECK(times[b] >= -rounding && times[b] <= 1 + rounding, "t: wanted times in [0, 1]; got ", times[b], " for image ", b);
  }
  return times;
}

}  // namespace flowseg::cpu
