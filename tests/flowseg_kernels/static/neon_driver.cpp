// Compares the correction and decoding of the baseline instruction set with the plain formulas in fp64. Prints the largest error and
// the number of wrong pixels.
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "cpu/params.h"

using namespace flowseg;
using namespace flowseg::cpu;

namespace {

constexpr int kSide = 37, kPixels = kSide * kSide, kClasses = 150, kChannels = 3;

float next() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / (1 << 23) - 1;
}

}  // namespace

int main() {
  std::vector<float> mu(kClasses * kChannels), x(kChannels * kPixels), out(x.size());
  std::vector<uint8_t> label(kPixels), found(kPixels);
  for (float& v : mu) v = next();
  for (int i = 0; i < kPixels; ++i) {
    label[i] = static_cast<uint8_t>(i % 11 ? i % kClasses : 255);
    for (int c = 0; c < kChannels; ++c) x[c * kPixels + i] = mu[i % kClasses * kChannels + c] + 0.3f * next();
  }
  const double eps = 2e-3;
  int64_t bad = std::numeric_limits<int64_t>::max();
  const Image image{x.data(), Real::f32, 1, kChannels, kSide, kSide, {kChannels * kPixels, kPixels, kSide, 1}};
  const Labels labels{{label.data(), Integer::u8, {kPixels, kSide, 1}, 255}, &bad};
  const Codes codes{.data = mu.data(), .classes = kClasses, .padded = kChannels, .max_abs = 1.0};
  const Correction options{.temperature = 1, .eps = eps, .max_norm = std::numeric_limits<double>::infinity(), .transform = 0};
  using Kernels = PixelKernels<Isa::baseline>;
  Kernels::correct({.x = image, .labels = labels, .codes = codes, .correction = options, .out = {out.data(), Real::f32}}, 0);
  Kernels::decode({.x = image, .codes = codes, .tables = {}, .ignore = 255, .labels = found.data(), .label_type = Integer::u8}, 0);

  double error = 0, largest = 0;
  int wrong = 0;
  for (int i = 0; i < kPixels; ++i) {
    double weight = 0, pull[kChannels] = {}, own[kChannels] = {}, own_weight = 0, best = 1e9;
    int nearest = 0;
    for (int k = 0; k < kClasses; ++k) {
      double diff[kChannels], d = 0;
      for (int c = 0; c < kChannels; ++c) {
        diff[c] = static_cast<double>(x[c * kPixels + i]) - mu[k * kChannels + c];
        d += diff[c] * diff[c];
      }
      if (d < best) best = d, nearest = k;
      const double r = 1 / (d + eps);
      weight += r;
      if (k == label[i]) own_weight = r;
      for (int c = 0; c < kChannels; ++c) (k == label[i] ? own : pull)[c] += r * r * diff[c];
    }
    wrong += found[i] != nearest;
    for (int c = 0; c < kChannels; ++c) {
      const double share = own_weight ? own[c] / own_weight * (weight - own_weight) / weight : 0;
      const double want = label[i] == 255 ? 0 : 2 * (share - pull[c] / weight);
      error = std::fmax(error, std::fabs(out[c * kPixels + i] - want));
      largest = std::fmax(largest, std::fabs(want));
    }
  }
  std::printf("relative error %g, wrong pixels %d of %d\n", error / largest, wrong, kPixels);
}
