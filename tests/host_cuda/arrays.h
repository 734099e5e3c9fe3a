// From arrays to the plain arguments of the kernels.
#pragma once

#include <memory>

#include "cuda/decode.cuh"
#include "ops.h"

namespace flowseg::cuda {

struct OnCpu {
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int64_t shared, const Arguments&... arguments) const {
    emu::run(kernel, blocks, static_cast<size_t>(shared), arguments...);
  }
  template <class... All>
  void of_threads(int64_t, All&&... all) const {
    (*this)(all...);
  }

  // Room for one block at once, so that it takes as many pixels as a block ever does.
  Device device() const { return {1, kThreads, 48 * 1024, 64 * 1024}; }

  // Few, so that blocks have several tiles; but where the last blocks alone run, each has one.
  template <class Kernel>
  int64_t in_turns(Kernel, int64_t tiles) const {
    return tiles < 3 || emu::last_blocks < tiles ? tiles : 3;
  }
};

inline Real real_of(const Array& a) {
  if (a.kind == 'u') return Real::bf16;
  return a.itemsize == 8 ? Real::f64 : a.itemsize == 4 ? Real::f32 : Real::f16;
}
inline Integer integer_of(const Array& a) {
  return a.itemsize == 1 ? Integer::u8 : a.itemsize == 2 ? Integer::i16 : a.itemsize == 4 ? Integer::i32 : Integer::i64;
}

inline Source source(const Array& a) {
  const auto& n = a.shape;
  const auto& s = a.stride;
  return source_of({a.data, real_of(a), n[0], n[1], n[2], n[3], {s[0], s[1], s[2], s[3]}});
}
// (B, C, H, W), (B, H, W) or smaller; null where it is empty.
inline Target target(const Array& a) {
  const size_t n = a.shape.size();
  return target_of({a.size() ? a.data : nullptr, real_of(a)}, n == 4 ? a.shape[1] : 1, n >= 3 ? a.shape[n - 2] * a.shape[n - 1] : 1);
}
inline Labels labels(const Array& a, int64_t ignore) {
  return labels_of({a.data, integer_of(a), {a.stride[0], a.stride[1], a.stride[2]}, ignore}, a.shape[0], a.shape[1], a.shape[2]);
}
inline Times times(const Array& a) { return {a.data, real_of(a), a.stride[0]}; }
inline Codes codes(const Array& a) { return {a.data, static_cast<int>(a.shape[0]), static_cast<int>(a.shape[1])}; }
inline Grid grid(const Array& cells, const Array& records, const Array& groups, double low, double scale) {
  if (!cells.data) return {};
  const auto* table = static_cast<const int32_t*>(cells.data);
  return {table, static_cast<const float*>(records.data), static_cast<const int32_t*>(groups.data), static_cast<float>(low),
          static_cast<float>(scale), static_cast<int>(cells.shape[3]), table + cells.size() / 2};
}

}  // namespace flowseg::cuda
