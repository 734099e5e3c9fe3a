// Runs the kernel of pipeline.cuh, in both 16-bit types, and compares its results, which are exact.
#include "pipeline.cuh"

#include <cstdio>
#include <string>
#include <vector>

namespace {

using namespace flowseg;
using namespace flowseg::cuda;

constexpr int kRows = 56, kColumns = 40, kItems = 13, kBlocks = 3;  // of W and of the results; the rest of a tile is zero

int value_of(int seed) { return static_cast<int>(static_cast<unsigned>(seed) * 2654435761u >> 8) % 5 - 2; }
int x_of(int item, int row, int column) { return value_of(item * 4096 + row * 64 + column); }
int w_of(int item, int row, int column) {
  return row < kRows && column < kColumns ? value_of(99991 + item * 4096 + row * 64 + column) * (1 + column % 3) : 0;
}

template <class Element>
Element element(int v) {
  Element e;
  narrow(static_cast<float>(v), e);
  return e;
}

int expected(int item, int which, int row, int column) {
  int sum = 0;
  for (int k = 0; k < kTile; ++k) {
    sum += which ? x_of(item, k, row) * w_of(item, k, column)
                 : x_of(item, row, k) * (w_of(item, k, column) + w_of(item, column, k));
  }
  return sum;
}

template <class T>
bool run_pipeline() {
  using Element = typename T::Element;
  std::vector<Element> x(kItems * kTile * kTile), w(kItems * kRows * kColumns), out(2 * kItems * kRows * kColumns);
  for (int i = 0; i < kItems; ++i) {
    for (int r = 0; r < kTile; ++r) {
      for (int c = 0; c < kTile; ++c) x[i * kTile * kTile + tile_offset(r, c) / 2] = element<Element>(x_of(i, r, c));
    }
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) w[(i * kRows + r) * kColumns + c] = element<Element>(w_of(i, r, c) / (1 + c % 3));
    }
  }
  const auto map = [](std::vector<Element>& of, int64_t count) {
    return checked_tensor_map({.data = of.data(), .columns = kColumns, .rows = kRows, .count = count, .row_bytes = 2 * kColumns,
                               .matrix_bytes = 2 * kColumns * kRows});
  };
  const PipelineParams params{reinterpret_cast<const char*>(x.data()), map(w, kItems), map(out, 2 * kItems), kItems};
  host::run(pipeline<T>, kPipelineThreads, kBlocks, sizeof(PipelineShared) + 1024, params);
  if (!host::failure.empty()) return false;
  for (size_t i = 0; i < out.size(); ++i) {
    const int column = static_cast<int>(i) % kColumns, row = static_cast<int>(i) / kColumns % kRows;
    const int which = static_cast<int>(i) / (kRows * kColumns);
    const float got = widen(out[i]), want = widen(element<Element>(expected(which / 2, which % 2, row, column)));
    if (got == want) continue;
    std::printf("item %d, result %d, row %d, column %d: wanted %g, got %g\n", which / 2, which % 2, row, column, want, got);
    return false;
  }
  return true;
}

}  // namespace

// pipeline [name of a fault]
int main(int arguments, char** words) {
  const std::string name = arguments > 1 ? words[1] : "";
  host::planted = host::fault_named(name);
  if (host::planted == host::Fault::none && !name.empty()) return std::puts("no such fault"), 2;
  // As many blocks as there are orders of events, see Asynchronous.
  for (int block = 0; block < 8; block += kBlocks) {
    if (run_pipeline<BFloatPair>() && run_pipeline<HalfPair>()) continue;
    std::puts(host::failure.c_str());
    return 1;
  }
  std::puts("every product was right");
  return 0;
}
