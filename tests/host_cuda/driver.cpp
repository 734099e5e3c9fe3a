// Runs the kernels of every op of csrc/cuda on the host, for three channels and fp32 arithmetic, under a sanitizer. It is a program
// without Python: the sanitizer watches only the kernels.
//
// It runs them with odd sizes (partly filled blocks, rows with gaps, planes that do not start at 16 bytes, a codebook that takes
// two parts), in each half precision with sizes that are read in 16-byte vectors, and with the decode grid.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops.h"
#include "shared/decode_grid.h"
#include "shared/types.h"

namespace {

using namespace flowseg;
using namespace flowseg::host;

constexpr double kInfinite = std::numeric_limits<double>::infinity();

// Values in [-reach, reach] from a hash. Each array has a heap block of its exact size: AddressSanitizer sees every overrun.
template <class S>
std::vector<S> values(int64_t count, unsigned seed, float reach = 1) {
  std::vector<S> v(static_cast<size_t>(count));
  for (size_t i = 0; i < v.size(); ++i) {
    narrow(reach * (static_cast<float>((i * 2654435761u + seed * 40503u) % 20011u) / 10005.3f - 1.0f), v[i]);
  }
  return v;
}

template <class S>
Array array(std::vector<S>& v, std::initializer_list<int64_t> shape) {
  Array a{.data = v.data(), .itemsize = sizeof(S), .is_bfloat16 = std::is_same_v<S, BFloat>};
  for (const int64_t n : shape) a.shape[a.dims++] = n;
  int64_t stride = 1;
  for (int64_t i = a.dims; i-- > 0; stride *= a.shape[i]) a.stride[i] = stride;
  return a;
}

template <class S>
bool all_finite(const std::vector<S>& v) {
  for (const S x : v) {
    if (!std::isfinite(widen(x))) return false;
  }
  return true;
}

// Runs every op on images of dtype S and labels of dtype Y. The rows of the inputs have a gap of `gap` elements between them.
template <class S, class Y>
bool run_all(int64_t batch, int64_t height, int64_t width, int64_t gap, int64_t classes, Y ignore,
             std::vector<double> temperatures) {
  const int64_t pitch = width + gap, pixels = height * width, size = batch * 3 * pixels, stored = batch * 3 * height * pitch - gap;
  const std::initializer_list<int64_t> image{batch, 3, height, width}, plane{batch, height, width};
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
    a.stride[0] = 3 * height * pitch;
    a.stride[1] = height * pitch;
    a.stride[2] = pitch;
    return a;
  };
  const Array x_array = rows_apart(x), source_array = rows_apart(source), label_array = array(labels, plane);
  const Array time_array = array(times, {batch});
  const Array code_array = array(mu, {classes, 3}), found_array = array(found, plane);
  flow_interpolate(source_array, label_array, time_array, code_array, ignore, array(out, image));
  flow_interpolate_bwd(rows_apart(grad), source_array, label_array, time_array, code_array, ignore, array(back, image),
                       array(grad_time, {batch}));
  for (const double temperature : temperatures) {
    distance_correction(x_array, label_array, code_array, temperature, 1e-3, 0, kInfinite, ignore, array(corrected, image));
  }
  flow_loss(x_array, source_array, label_array, time_array, code_array, 0, 0, 1, 0, 1, 1e-3, 0, kInfinite, ignore, 0, 0.05,
            array(loss, {}), array(residual, image), array(count, {}));
  flow_loss_bwd(array(one, {}), array(residual, image), array(count, {}), 0, array(back, image));
  nearest_centroid(x_array, code_array, {}, {}, {}, 0, 1, found_array, array(distance, plane), array(margin, plane), ignore);
  decode_confusion(x_array, label_array, code_array, {}, {}, {}, 0, 1, ignore, array(counts, {classes, classes}));
  std::vector<float> five(mu.begin(), mu.begin() + 15);
  decode_confusion(x_array, found_array, array(five, {5, 3}), {}, {}, {}, 0, 1, ignore, array(few, {5, 5}));

  int64_t counted = 0, valid = 0;
  for (const int64_t n : counts) counted += n;
  for (const Y label : labels) valid += label != ignore;
  // The forward has already divided the residual by the count and then returns 1. In fp16 the backward divides.
  const int64_t divisor = std::is_same_v<S, Half> ? valid : 1;
  const bool counts_agree = counted == valid && count[0] == divisor;
  return all_finite(out) && all_finite(back) && all_finite(corrected) && all_finite(loss) && all_finite(distance) && counts_agree;
}

// A decode grid of eight cells. Five cells contain one code each, one names two codes in its word, one has a list of one record,
// and the last one has a list of two records.
struct Octants {
  static constexpr int kClasses = 22, kMore = 12;
  std::vector<float> mu, records;
  std::vector<int32_t> cells, words, records_left{1, 1, 2, 1};

  Octants() : records(4 * 32, std::numeric_limits<float>::infinity()) {
    std::vector<int> corner;
    const auto add = [&](int octant, float at) {
      corner.push_back(octant);
      for (int c = 0; c < 3; ++c) mu.push_back(octant >> c & 1 ? at : -at);
    };
    for (int octant = 0; octant < 8; ++octant) add(octant, 0.5f), cells.push_back(octant);
    // More codes per octant. They lie deeper in it, by a third or more: they are nearest to no point of another octant.
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
  const std::initializer_list<int64_t> plane{1, height, width};
  auto x = values<S>(3 * pixels, 6, 1.1f);  // some points lie outside the grid
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
  const Array x_array = array(x, {1, 3, height, width}), found_array = array(found, plane);
  const Array code_array = array(grid.mu, {Octants::kClasses, 3}), cell_array = array(grid.cells, {2, 2, 2, 2});
  const Array record_array = array(grid.records, {4, 4, 8}), records_left_array = array(grid.records_left, {4});
  nearest_centroid(x_array, code_array, cell_array, record_array, records_left_array, {}, {}, -1, 1, found_array, {}, {}, 255);
  decode_confusion(x_array, found_array, code_array, cell_array, record_array, records_left_array, {}, {}, -1, 1, false, 255,
                   array(counts, {Octants::kClasses, Octants::kClasses}));
  int64_t diagonal = 0, known = 0;
  for (int k = 0; k < Octants::kClasses; ++k) diagonal += counts[k * Octants::kClasses + k];
  for (const uint8_t label : want) known += label != 255;
  return found == want && diagonal == known && known < pixels;
}

// The sizes of a neural field on `patches` patches side by side.
struct FieldSizes {
  int64_t patches, channels, hidden, depth, ratio, p, freqs;
  bool both, residual;
};

// Runs the neural field and its backward, the forward kernel with a planted fault. Returns whether all results are finite.
template <class S>
bool run_field_of(const FieldSizes& n, Fault fault = Fault::none) {
  const int64_t features = n.channels + n.freqs * n.freqs, weight_count = 2 * n.ratio * n.hidden * n.hidden;
  const std::vector<std::vector<int64_t>> shapes{
      {1, n.channels, n.p, n.p * n.patches}, {1, n.patches, n.depth, weight_count}, {n.hidden, features}, {n.hidden},
      {n.depth, n.hidden}, {n.hidden}, {n.channels, n.hidden}, {n.channels}};
  std::vector<std::vector<S>> inputs, gradients;
  std::vector<Array> in, back;
  const auto add = [](std::vector<std::vector<S>>& to, std::vector<Array>& arrays, const std::vector<int64_t>& shape,
                      unsigned seed) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    Array a = array(to.emplace_back(values<S>(count, seed)), {});
    int64_t stride = count;
    for (const int64_t size : shape) {
      a.shape[a.dims] = size;
      a.stride[a.dims++] = stride /= size;
    }
    arrays.push_back(a);
  };
  for (const auto& shape : shapes) add(inputs, in, shape, static_cast<unsigned>(inputs.size()));
  for (const auto& shape : shapes) add(gradients, back, shape, 0);
  add(inputs, in, shapes[0], 20);
  add(gradients, back, shapes[0], 0);
  planted = fault;
  planted_launch = 1;  // after the table
  launches = 0;
  neural_field(in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], n.p, n.ratio, 1e-6, n.both, n.residual, back[8]);
  planted = Fault::none;
  planted_launch = -1;
  neural_field_bwd(in[8], in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], n.p, n.ratio, 1e-6, n.both, n.residual, back[0],
                   back[1], back[2], back[3], back[4], back[5], back[6], back[7]);
  for (const std::vector<S>& v : gradients) {
    if (!all_finite(v)) return false;
  }
  return true;
}

constexpr FieldSizes kDeepField{.patches = 3, .channels = 3, .hidden = 64, .depth = 4, .ratio = 2, .p = 8, .freqs = 3,
                                .both = true, .residual = true};  // more steps than a block of the forward has stages
constexpr FieldSizes kSlicedField{.patches = 3, .channels = 5, .hidden = 40, .depth = 1, .ratio = 5, .p = 9, .freqs = 2,
                                  .both = true, .residual = false};  // two tiles of pixels, two slices of inner units
constexpr FieldSizes kWideField{.patches = 1, .channels = 3, .hidden = 72, .depth = 2, .ratio = 1, .p = 9, .freqs = 2,
                                .both = true, .residual = true};  // two halves of hidden units, two tiles, two slices

bool run_field(Fault fault) {
  bool fine = run_field_of<BFloat>(kDeepField, fault);
  if (fault == Fault::none) fine = fine && run_field_of<Half>(kSlicedField) && run_field_of<BFloat>(kWideField);
  if (const char* what = last_failure()) return std::puts(what), false;
  return fine;
}

}  // namespace

// driver [name of a fault]: with a planted fault, runs only the ops that contain it.
int main(int arguments, char** words) {
  const std::string name = arguments > 1 ? words[1] : "";
  const Fault fault = fault_named(name);
  if (fault == Fault::none && !name.empty()) return std::puts("no such fault"), 2;
  const bool none = fault == Fault::none, in_field = fault >= Fault::swizzle;
  const bool in_grid = fault == Fault::histogram || fault == Fault::list;
  bool fine = true;
  if (none || in_field) fine &= run_field(fault);
  planted = fault;
  if (!in_grid && !in_field) fine &= run_all<float, int64_t>(2, 5, 61, 2, 1100, -1, {1.0, 2.0});
  if (none) fine &= run_all<BFloat, uint8_t>(1, 4, 136, 0, 40, 255, {1.0});
  if (none) fine &= run_all<Half, int16_t>(1, 4, 136, 0, 40, -1, {2.0});
  if (none || in_grid) fine &= run_grid<float>(5, 61) && run_grid<BFloat>(4, 136);
  std::puts(fine ? "every kernel ran" : "a kernel gave a wrong result");
  return fine ? 0 : 1;
}
