// Runs every op's kernels of csrc/cuda, of three channels with fp32 inside, on the CPU, for the sanitizers: a program of its own, so that nothing but the kernels is watched.
// Once with odd sizes, so that blocks are partly filled, rows have gaps, planes start off 16 bytes and a codebook takes two parts;
// once in each half precision with sizes that are read in vectors of 16 bytes; once by the decode grid.
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_on_cpu.h"
#include "ops.h"
#include "shared/decode_grid.h"
#include "shared/half.h"

namespace {

using namespace flowseg;
using namespace flowseg::cuda;
using flowseg::emu::Fault;

constexpr double kInfinite = std::numeric_limits<double>::infinity();

// Values in [-reach, reach] from a hash; exact sizes on the heap, so that a step over an end is seen.
template <class S>
std::vector<S> values(int64_t count, unsigned seed, float reach = 1) {
  std::vector<S> v(static_cast<size_t>(count));
  for (size_t i = 0; i < v.size(); ++i) {
    narrow(reach * (static_cast<float>((i * 2654435761u + seed * 40503u) % 20011u) / 10005.3f - 1.0f), v[i]);
  }
  return v;
}

template <class S>
Array array(std::vector<S>& v, std::vector<int64_t> shape) {
  constexpr char kind = std::is_same_v<S, BFloat> ? 'u' : std::is_integral_v<S> ? 'i' : 'f';
  std::vector<int64_t> stride(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) stride[i - 1] = stride[i] * shape[i];
  return {v.data(), kind, sizeof(S), shape, stride};
}

template <class S>
bool all_finite(const std::vector<S>& v) {
  for (const S x : v) {
    if (!std::isfinite(widen(x))) return false;
  }
  return true;
}

// Every op on images of S and labels of Y, whose rows are `gap` apart from each other in what is read.
template <class S, class Y>
bool run_all(int64_t batch, int64_t height, int64_t width, int64_t gap, int64_t classes, Y ignore, std::vector<double> temperatures) {
  const int64_t pitch = width + gap, pixels = height * width, size = batch * 3 * pixels, stored = batch * 3 * height * pitch - gap;
  const std::vector<int64_t> image{batch, 3, height, width}, plane{batch, height, width};
  auto x = values<S>(stored, 1), source = values<S>(stored, 2), grad = values<S>(stored, 3);
  auto mu = values<float>(classes * 3, 4), times = values<float>(batch, 5);
  for (float& t : times) t = std::fabs(t);
  std::vector<S> out(size), back(size), residual(size), corrected(size);
  std::vector<float> loss(1), one{1.0f}, grad_time(batch), distance(batch * pixels), margin(batch * pixels);
  std::vector<Y> labels(batch * pixels), found(batch * pixels);
  std::vector<int64_t> count(1), counts(classes * classes), few(25);
  for (size_t i = 0; i < labels.size(); ++i) labels[i] = i % 7 == 0 ? ignore : static_cast<Y>(i * 37 % classes);

  const auto rows_apart = [&](std::vector<S>& v) {
    Array a = array(v, image);
    a.stride = {3 * height * pitch, height * pitch, pitch, 1};
    return a;
  };
  const Array X = rows_apart(x), SOURCE = rows_apart(source), LABELS = array(labels, plane), TIMES = array(times, {batch});
  const Array MU = array(mu, {classes, 3}), FOUND = array(found, plane);
  emulate_flow_interpolate(SOURCE, LABELS, TIMES, MU, ignore, array(out, image));
  emulate_flow_interpolate_bwd(rows_apart(grad), SOURCE, LABELS, TIMES, MU, ignore, array(back, image), array(grad_time, {batch}));
  for (const double temperature : temperatures) {
    emulate_distance_correction(X, LABELS, MU, temperature, 1e-3, 0, kInfinite, ignore, array(corrected, image));
  }
  emulate_flow_loss(X, SOURCE, LABELS, TIMES, MU, false, false, 1, false, 1, 1e-3, 0, kInfinite, ignore, 0, 0.05, array(loss, {}),
                    array(residual, image), array(count, {}));
  emulate_flow_loss_bwd(array(one, {}), array(residual, image), array(count, {}), 0, array(back, image));
  emulate_nearest_centroid(X, MU, {}, {}, {}, 0, 1, FOUND, array(distance, plane), array(margin, plane), ignore);
  emulate_decode_confusion(X, LABELS, MU, {}, {}, {}, 0, 1, ignore, array(counts, {classes, classes}));
  std::vector<float> five(mu.begin(), mu.begin() + 15);
  emulate_decode_confusion(X, FOUND, array(five, {5, 3}), {}, {}, {}, 0, 1, ignore, array(few, {5, 5}));

  int64_t counted = 0, valid = 0;
  for (const int64_t n : counts) counted += n;
  for (const Y label : labels) valid += label != ignore;
  // The residual leaves divided by the count, which then is one. In fp16 it could underflow, and the backward divides.
  const int64_t left = std::is_same_v<S, Half> ? valid : 1;
  const bool counts_agree = counted == valid && count[0] == left;
  return all_finite(out) && all_finite(back) && all_finite(corrected) && all_finite(loss) && all_finite(distance) && counts_agree;
}

// A grid of eight cells. Five hold one code each, and answer at once; one names two codes in its word, one has a short list, and the
// last one a list of two records.
struct Octants {
  static constexpr int kClasses = 22, kMore = 12;
  std::vector<float> mu, records;
  std::vector<int32_t> cells, words, groups{1, 1, 2, 1};

  Octants() : records(4 * 32, std::numeric_limits<float>::infinity()) {
    std::vector<int> corner;
    const auto add = [&](int octant, float at) {
      corner.push_back(octant);
      for (int c = 0; c < 3; ++c) mu.push_back(octant >> c & 1 ? at : -at);
    };
    for (int octant = 0; octant < 8; ++octant) add(octant, 0.5f), cells.push_back(octant);
    // By a third or more deeper in their octants, further codes are nearest to no point of another one.
    for (int i = 0; i < kMore; ++i) add(7, 0.84f + 0.01f * static_cast<float>(i));
    add(3, 0.9f);
    add(2, 0.9f);
    constexpr int kSecond = 1 << flowseg::kWordBits, kThird = kSecond << flowseg::kWordBits;
    for (int octant = 0; octant < 8; ++octant) words.push_back(octant * (1 + kSecond + kThird));
    for (const auto& [octant, first] : {std::pair{2, 0}, {3, 1}, {7, 2}}) {
      cells[octant] = words[octant] = -1 - first;
      int slot = 0;
      for (int k = 0; k < kClasses; ++k) {
        if (corner[k] != octant) continue;
        float* at = records.data() + (first + slot / 8) * 32 + slot % 8;
        for (int c = 0; c < 3; ++c) at[c * 8] = mu[k * 3 + c];
        at[24] = static_cast<float>(k);
        ++slot;
      }
    }
    words[2] = 2 + (kClasses - 1) * (kSecond + kThird);
    cells.insert(cells.end(), words.begin(), words.end());
  }
};

template <class S>
bool run_grid(int64_t height, int64_t width) {
  Octants grid;
  const int64_t pixels = height * width;
  const std::vector<int64_t> plane{1, height, width};
  auto x = values<S>(3 * pixels, 6, 1.1f);  // some lie outside the grid
  narrow(std::numeric_limits<float>::quiet_NaN(), x[3]);
  std::vector<uint8_t> found(pixels), want(pixels);
  std::vector<int64_t> counts(Octants::kClasses * Octants::kClasses);
  for (int64_t i = 0; i < pixels; ++i) {
    float nearest = std::numeric_limits<float>::infinity();
    want[i] = 255;
    for (int k = 0; k < Octants::kClasses; ++k) {
      float d = 0;
      for (int c = 0; c < 3; ++c) {
        const float diff = widen(x[c * pixels + i]) - grid.mu[k * 3 + c];
        d += diff * diff;
      }
      if (d < nearest) nearest = d, want[i] = static_cast<uint8_t>(k);
    }
  }
  const Array X = array(x, {1, 3, height, width}), MU = array(grid.mu, {Octants::kClasses, 3}), FOUND = array(found, plane);
  const Array CELLS = array(grid.cells, {2, 2, 2, 2}), RECORDS = array(grid.records, {4, 4, 8}), GROUPS = array(grid.groups, {4});
  emulate_nearest_centroid(X, MU, CELLS, RECORDS, GROUPS, -1, 1, FOUND, {}, {}, 255);
  emulate_decode_confusion(X, FOUND, MU, CELLS, RECORDS, GROUPS, -1, 1, 255, array(counts, {Octants::kClasses, Octants::kClasses}));
  int64_t diagonal = 0, known = 0;
  for (int k = 0; k < Octants::kClasses; ++k) diagonal += counts[k * Octants::kClasses + k];
  for (const uint8_t label : want) known += label != 255;
  return found == want && diagonal == known && known < pixels;
}

}  // namespace

// driver [race | overrun | histogram | list]: with one of the planted faults, and what it is planted in.
int main(int arguments, char** words) {
  const std::string fault = arguments > 1 ? words[1] : "";
  const bool in_grid = fault == "histogram" || fault == "list";
  flowseg::emu::planted = fault == "race"        ? Fault::race
                          : fault == "overrun"   ? Fault::overrun
                          : fault == "histogram" ? Fault::histogram
                          : fault == "list"      ? Fault::list
                                                 : Fault::none;
  bool fine = true;
  if (!in_grid) fine &= run_all<float, int64_t>(2, 5, 61, 2, 1100, -1, {1.0, 2.0});
  if (fault.empty()) fine &= run_all<BFloat, uint8_t>(1, 4, 136, 0, 40, 255, {1.0}) && run_all<Half, int16_t>(1, 4, 136, 0, 40, -1, {2.0});
  if (fault.empty() || in_grid) fine &= run_grid<float>(5, 61) && run_grid<BFloat>(4, 136);
  std::puts(fine ? "every kernel ran" : "a kernel gave a wrong result");
  return fine ? 0 : 1;
}
