// Runs every kernel of csrc/cuda once on the CPU, for the sanitizers: a program of its own, so that nothing but the kernels is watched.
// Shapes are small and odd, so that blocks are partly filled, planes start off 16 bytes, and a codebook takes two parts.
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "emu/cuda_on_cpu.h"
#include "emu/ops.h"

namespace {

using flowseg::cuda::Array;

constexpr int64_t kBatch = 2, kHeight = 5, kWidth = 61, kClasses = 1100, kPixels = kHeight * kWidth;

// Values in [-1, 1] from a hash; exact sizes on the heap, so that a step over an end is seen.
template <class T>
std::vector<T> values(int64_t count, unsigned seed) {
  std::vector<T> v(static_cast<size_t>(count));
  for (size_t i = 0; i < v.size(); ++i) {
    v[i] = static_cast<T>(static_cast<float>((i * 2654435761u + seed * 40503u) % 20011u) / 10005.0f - 1.0f);
  }
  return v;
}

template <class T>
Array array(std::vector<T>& v, char kind, std::vector<int64_t> shape) {
  std::vector<int64_t> stride(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) stride[i - 1] = stride[i] * shape[i];
  return {v.data(), kind, sizeof(T), shape, stride};
}

template <class T>
bool all_finite(const std::vector<T>& v) {
  for (const T x : v) {
    if (!std::isfinite(x)) return false;
  }
  return true;
}

}  // namespace

// driver [race | overrun]: with one of the planted faults.
int main(int arguments, char** words) {
  using namespace flowseg::cuda;
  using flowseg::emu::Fault;
  const std::string fault = arguments > 1 ? words[1] : "";
  flowseg::emu::planted = fault == "race" ? Fault::race : fault == "overrun" ? Fault::overrun : Fault::none;
  const int64_t size = kBatch * 3 * kPixels;
  auto x = values<float>(size, 1), source = values<float>(size, 2), grad = values<float>(size, 3), mu = values<float>(kClasses * 3, 4);
  std::vector<float> out(size), residual(size), loss(1), times{0.25f, 0.75f}, grad_time(kBatch), distance(kBatch * kPixels),
      margin(kBatch * kPixels), one{1.0f};
  std::vector<int64_t> labels(kBatch * kPixels), found(kBatch * kPixels), count(1), counts(kClasses * kClasses), few(25);
  for (size_t i = 0; i < labels.size(); ++i) labels[i] = i % 7 == 0 ? -1 : static_cast<int64_t>(i * 37 % kClasses);
  const std::vector<int64_t> image{kBatch, 3, kHeight, kWidth}, plane{kBatch, kHeight, kWidth};
  const Array X = array(x, 'f', image), Y = array(labels, 'i', plane), T = array(times, 'f', {kBatch});
  const Array M = array(mu, 'f', {kClasses, 3}), F = array(found, 'i', plane);
  const double infinite = std::numeric_limits<double>::infinity();

  emulate_flow_interpolate(array(source, 'f', image), Y, T, M, -1, array(out, 'f', image));
  emulate_flow_interpolate_bwd(array(grad, 'f', image), array(source, 'f', image), Y, T, M, -1, array(out, 'f', image),
                               array(grad_time, 'f', {kBatch}));
  for (const double temperature : {1.0, 2.0}) {
    emulate_distance_correction(X, Y, M, temperature, 1e-3, 0, infinite, -1, array(out, 'f', image));
  }
  emulate_flow_loss(X, array(source, 'f', image), Y, T, M, false, false, 1, false, 1, 1e-3, 0, infinite, -1, 0, 0.05,
                    array(loss, 'f', {}), array(residual, 'f', image), array(count, 'i', {}));
  emulate_flow_loss_bwd(array(one, 'f', {}), array(residual, 'f', image), array(count, 'i', {}), 0, array(out, 'f', image));
  emulate_nearest_centroid(X, M, {}, {}, {}, 0, 1, F, array(distance, 'f', plane), array(margin, 'f', plane), -1);
  emulate_decode_confusion(X, Y, M, {}, {}, {}, 0, 1, -1, array(counts, 'i', {kClasses, kClasses}));
  std::vector<float> five(mu.begin(), mu.begin() + 15);
  emulate_decode_confusion(X, F, array(five, 'f', {5, 3}), {}, {}, {}, 0, 1, -1, array(few, 'i', {5, 5}));

  int64_t counted = 0;
  for (const int64_t n : counts) counted += n;
  const bool fine = all_finite(out) && all_finite(loss) && all_finite(distance) && counted == count[0];
  std::puts(fine ? "every kernel ran" : "a kernel gave a wrong result");
  return fine ? 0 : 1;
}
