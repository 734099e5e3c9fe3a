// Small kernels that test the host build of Hopper's copies, barriers and products: what is wrong must be reported, what is right
// must give the right numbers. Prints one line per check: its name and what happened.
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "cuda/block.cuh"
#include "cuda/hopper/async.cuh"
#include "cuda/hopper/wgmma.cuh"

namespace {

using namespace flowseg;
using namespace flowseg::cuda;

struct Shared {
  alignas(1024) char tiles[4][kTileBytes];
  Barrier barrier;
};

struct Data {
  TensorMap map;
  char* bytes;
  float* results;
};

// The shared memory, with the barrier ready for `arrivals`.
Shared& prepare(int arrivals = 1, bool fence = true) {
  FLOWSEG_DYNAMIC_SHARED(char, raw);
  Shared& s = *reinterpret_cast<Shared*>(raw + (-shared_address(raw) & 1023));
  if (threadIdx.x == 0) {
    s.barrier.init(arrivals);
    if (fence) fence_barrier_init();
  }
  __syncthreads();
  return s;
}

void load(Shared& s, const Data& d) {
  s.barrier.arrive_and_expect(kTileBytes);
  load_bytes(shared_address(s.tiles[0]), d.bytes, s.barrier, kTileBytes);
}

float first_value(const Shared& s) { return BFloatPair::low(*reinterpret_cast<const uint32_t*>(s.tiles[0])); }

// ---- what is wrong

void lost_arrival(const Data) {
  Shared& s = prepare(2);
  if (threadIdx.x == 0) s.barrier.arrive();
  s.barrier.wait(0);
}
void extra_arrival(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x == 0) load(s, d), s.barrier.arrive();
}
void missing_bytes(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x == 0) {
    s.barrier.arrive_and_expect(2 * kTileBytes);
    load_bytes(shared_address(s.tiles[0]), d.bytes, s.barrier, kTileBytes);
  }
  s.barrier.wait(0);
}
void missing_thread(const Data) {
  prepare();
  if (threadIdx.x != 5) named_barrier<3, 128>();
}
void load_without_wait(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x == 0) load(s, d);
}
void load_without_init_fence(const Data d) {
  Shared& s = prepare(1, false);
  if (threadIdx.x == 0) load(s, d);
  s.barrier.wait(0);
}
void two_loads_to_one_place(const Data d) {
  Shared& s = prepare(2);
  if (threadIdx.x == 0) load(s, d), load(s, d);
  s.barrier.wait(0);
}
void write_under_a_load(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x == 0) load(s, d), s.tiles[0][100] = 1;
  s.barrier.wait(0);
}
void store_without_fence(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x != 0) return;
  s.tiles[0][0] = 1;
  store_bytes(d.bytes, shared_address(s.tiles[0]), 16);
  commit_copies();
  wait_for_copies<0>();
}
void store_without_wait(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x != 0) return;
  store_bytes(d.bytes, shared_address(s.tiles[0]), 16);
  commit_copies();
}
void staging_reused(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 2; ++i) {
    s.tiles[0][0] = static_cast<char>(i);
    fence_async();
    store_bytes(d.bytes, shared_address(s.tiles[0]), 16);
    commit_copies();
  }
  wait_for_copies<0>();
}
// Stores 16 bytes and loads them again, with or without what must come between.
template <bool kWait, bool kFence>
void stored_and_loaded(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x != 0) return;
  s.tiles[0][0] = 1;
  fence_async();
  store_bytes(d.bytes, shared_address(s.tiles[0]), 16);
  commit_copies();
  kWait ? wait_for_copies<0>() : wait_for_reads<0>();
  if (kFence) fence_async_global();
  s.barrier.arrive_and_expect(16);
  load_bytes(shared_address(s.tiles[1]), d.bytes, s.barrier, 16);
  s.barrier.wait(0);
  d.results[0] = s.tiles[1][0];
}
void misplaced_tile(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x == 0) load_tile(shared_address(s.tiles[0]) + 512, d.map, s.barrier, 0, 0, 0);
}
void past_the_end(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x == 0) load_bytes(shared_address(s.tiles[3]) + 2048 + kTileBytes, d.bytes, s.barrier, 16);
}

// One product of tiles, with B at `offset`.
template <bool kRowsAreK>
void product(Shared& s, float (&d)[32], uint64_t offset, bool fence = true) {
  uint32_t a[4] = {};
  if (fence) wgmma_fence();
  wgmma_first<BFloatPair, kRowsAreK>(d, a, descriptor(descriptor_low(shared_address(s.tiles[0]))) + offset);
  wgmma_commit();
}
void product_without_fence(const Data) {
  float d[32];
  product<true>(prepare(), d, 0, false);
  wgmma_wait<0>();
}
void off_the_grid(const Data) {
  float d[32];
  product<true>(prepare(), d, kColumnStep >> 4);
}
void other_stride(const Data) {
  float d[32];
  product<true>(prepare(), d, uint64_t{1} << 32);
}
void sums_written(const Data) {
  float d[32];
  product<true>(prepare(), d, 0);
  d[7] = 1;
  wgmma_wait<0>();
}
void sums_written_before_adding(const Data) {
  float d[32];
  Shared& s = prepare();
  product<true>(s, d, 0);
  wgmma_wait<0>();
  uint32_t a[4] = {};
  d[7] = 1;
  wgmma<BFloatPair, true>(d, a, descriptor(descriptor_low(shared_address(s.tiles[0]))));
}
void product_without_wait(const Data) {
  float d[32];
  product<true>(prepare(), d, 0);
}
void lanes_disagree(const Data) {
  float d[32];
  Shared& s = prepare();
  threadIdx.x == 9 ? product<true>(s, d, kRowStep >> 4) : product<true>(s, d, 0);
  wgmma_wait<0>();
}
void many_registers(const Data) { take_registers<240>(); }

// ---- what is right

// The first element before and after the load has landed.
void late_load(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x == 0) {
    load(s, d);
    d.results[0] = first_value(s);
    s.barrier.wait(0);
    d.results[1] = first_value(s);
  }
}
// A tile that lies outside of the matrix on every side, from and to global memory.
void edges(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x != 0) return;
  s.barrier.arrive_and_expect(kTileBytes);
  load_tile(shared_address(s.tiles[0]), d.map, s.barrier, -8, -3, 1);
  s.barrier.wait(0);
  for (int i = 0; i < kTile * kTile; ++i) {
    d.results[i] = widen(*reinterpret_cast<BFloat*>(s.tiles[0] + tile_offset(i / kTile, i % kTile)));
  }
  store_tile(d.map, shared_address(s.tiles[0]), -8, -3, 0);
  commit_copies();
  wait_for_copies<0>();
}
// Products with 16 or 32 columns of A = matrix 0 and B = the first columns of matrix 1, or its last rows of 64 transposed. With
// kTiles, A comes from a tile.
template <int kColumns, bool kRowsAreK, bool kTiles>
void few_columns(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x == 0) {
    s.barrier.arrive_and_expect(2 * kTileBytes);
    for (int i = 0; i < 2; ++i) load_tile(shared_address(s.tiles[i]), d.map, s.barrier, 0, 0, i);
  }
  s.barrier.wait(0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sums[kColumns / 2];
  uint32_t a[16];
  for (int k = 0; k < 4; ++k) {
    load_matrices(a + 4 * k, shared_address(s.tiles[0]) + tile_offset(warp * 16 + lane % 16, 16 * k + lane / 16 * 8));
  }
  wgmma_fence();
  const uint32_t tile = descriptor_low(shared_address(s.tiles[0]));
  const uint32_t b = descriptor_low(shared_address(s.tiles[1]) + (kRowsAreK ? 0 : (kTile - kColumns) * kTileRowBytes));
  for (int k = 0; k < 4; ++k) {
    const uint64_t from = descriptor(b, k * (kRowsAreK ? kRowStep : kColumnStep));
    if constexpr (kTiles) {
      wgmma_tiles<BFloatPair, false, kRowsAreK>(sums, descriptor(tile, k * kColumnStep), from, k != 0);
    } else {
      wgmma<BFloatPair, kRowsAreK>(sums, a + 4 * k, from, k != 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = warp * 16 + lane / 4 + 8 * (i / 2 % 2), column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    d.results[row * kColumns + column] = sums[i];
  }
}
// Sums of squares of the rows of matrix 0, from fragments that are read and written transposed.
void squares(const Data d) {
  Shared& s = prepare();
  if (threadIdx.x == 0) {
    s.barrier.arrive_and_expect(kTileBytes);
    load_tile(shared_address(s.tiles[0]), d.map, s.barrier, 0, 0, 0);
  }
  s.barrier.wait(0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float low[4] = {}, high[4] = {};
  for (int k = 0; k < 4; ++k) {
    uint32_t r[4];
    const uint32_t from = tile_offset(warp * 16 + lane % 16, 16 * k + lane / 16 * 8);
    load_matrices(r, shared_address(s.tiles[0]) + from);
    mma_16x8x8<BFloatPair>(low, r[0], r[1], r[0]);
    mma_16x8x8<BFloatPair>(high, r[0], r[1], r[1]);
    mma_16x8x8<BFloatPair>(low, r[2], r[3], r[2]);
    mma_16x8x8<BFloatPair>(high, r[2], r[3], r[3]);
    // The transpose of the tile: the four matrices change places, and each is transposed.
    const uint32_t to = tile_offset(16 * k + lane / 16 * 8 + lane % 8, warp * 16 + lane / 8 % 2 * 8);
    store_matrices_transposed(shared_address(s.tiles[1]) + to, r);
  }
  __syncthreads();
  const int diagonal = lane / 8;  // this lane holds columns 2 (lane % 4) and the next of row lane / 4
  if (diagonal == lane % 4) {
    d.results[warp * 16 + lane / 4] = lane / 4 % 2 ? low[1] : low[0];
    d.results[warp * 16 + lane / 4 + 8] = lane / 4 % 2 ? high[3] : high[2];
  }
  for (int i = threadIdx.x; i < kTile * kTile; i += 128) {
    const BFloat there = *reinterpret_cast<BFloat*>(s.tiles[1] + tile_offset(i % kTile, i / kTile));
    d.results[kTile + i] = widen(there);
  }
}

struct World {
  static constexpr int kRows = 50, kColumns = 40, kCount = 2;
  std::vector<BFloat> matrices = std::vector<BFloat>(kCount * kRows * kColumns);
  std::vector<char> bytes = std::vector<char>(kTileBytes);
  std::vector<float> results = std::vector<float>(2 * kTile * kTile, -1);

  World() {
    for (size_t i = 0; i < matrices.size(); ++i) narrow(static_cast<float>(i * 2654435761u % 4096u >> 7) - 15, matrices[i]);
    narrow(3.0f, *reinterpret_cast<BFloat*>(bytes.data()));
  }
  float at(int matrix, int row, int column) const {
    const bool inside = row >= 0 && row < kRows && column >= 0 && column < kColumns;
    return inside ? widen(matrices[(matrix * kRows + row) * kColumns + column]) : 0;
  }
  // Runs a kernel. Returns the failure.
  std::string run(void (*kernel)(Data), unsigned threads = 128) {
    const TensorMap map = checked_tensor_map({.data = matrices.data(), .columns = kColumns, .rows = kRows, .count = kCount,
                                              .row_bytes = 2 * kColumns, .matrix_bytes = 2 * kColumns * kRows});
    host::run(kernel, threads, 1, sizeof(Shared) + 1024, Data{map, bytes.data(), results.data()});
    return std::exchange(host::failure, "");
  }
};

void report(const char* name, std::string what) {
  std::replace(what.begin(), what.end(), '\n', ' ');
  std::printf("%s: %s\n", name, what.c_str());
}

void report_wrong() {
  const std::pair<const char*, void (*)(Data)> kernels[] = {
      {"lost arrival", lost_arrival}, {"extra arrival", extra_arrival}, {"missing bytes", missing_bytes},
      {"missing thread", missing_thread}, {"load without wait", load_without_wait},
      {"load without init fence", load_without_init_fence},
      {"two loads to one place", two_loads_to_one_place}, {"write under a load", write_under_a_load},
      {"store without fence", store_without_fence}, {"store without wait", store_without_wait},
      {"load of a store under way", stored_and_loaded<false, true>},
      {"load of a store without fence", stored_and_loaded<true, false>},
      {"staging reused", staging_reused}, {"misplaced tile", misplaced_tile}, {"past the end", past_the_end},
      {"product without fence", product_without_fence}, {"off the grid", off_the_grid}, {"other stride", other_stride},
      {"sums written", sums_written}, {"sums written before adding", sums_written_before_adding},
      {"product without wait", product_without_wait}, {"lanes disagree", lanes_disagree},
  };
  for (const auto& [name, kernel] : kernels) report(name, World().run(kernel));
  report("many registers", World().run(many_registers, 384));
}

bool edges_are_right() {
  World world;
  const World before = world;
  if (!world.run(edges, 32).empty()) return false;
  bool right = true;
  for (int i = 0; i < kTile * kTile; ++i) right &= world.results[i] == before.at(1, i / kTile - 3, i % kTile - 8);
  for (int m = 0; m < World::kCount; ++m) {
    for (int r = 0; r < World::kRows; ++r) {
      // The tile covers the whole matrix 0.
      for (int c = 0; c < World::kColumns; ++c) right &= world.at(m, r, c) == before.at(1, r, c);
    }
  }
  return right;
}

template <int kColumns, bool kRowsAreK, bool kTiles = false>
bool few_columns_are_right() {
  World world;
  if (!world.run(few_columns<kColumns, kRowsAreK, kTiles>).empty()) return false;
  bool right = true;
  for (int i = 0; i < kTile * kColumns; ++i) {
    const int row = i / kColumns, column = i % kColumns;
    float sum = 0;
    for (int k = 0; k < kTile; ++k) {
      sum += world.at(0, row, k) * (kRowsAreK ? world.at(1, k, column) : world.at(1, kTile - kColumns + column, k));
    }
    right &= world.results[i] == sum;
  }
  return right;
}

bool squares_are_right() {
  World world;
  if (!world.run(squares).empty()) return false;
  bool right = true;
  for (int r = 0; r < kTile; ++r) {
    float sum = 0;
    for (int c = 0; c < kTile; ++c) {
      sum += world.at(0, r, c) * world.at(0, r, c);
      right &= world.results[kTile + r * kTile + c] == world.at(0, r, c);
    }
    right &= world.results[r] == sum;
  }
  return right;
}

bool pairs_are_right() {
  bool right = true;
  const auto bits = [](float v) { return BFloatPair::pack(v, -v); };
  // 1 + 2^-7 times 1 + 2^-7 is 1 + 2^-6 + 2^-14. A tie at 2^-8 is broken by a number far below it, on either side.
  const float one = 1 + 0x1p-7f;
  right &= BFloatPair::multiply(bits(one), bits(one)) == (bits(1 + 0x1p-6f) & 0xffffu) * 0x10001u;
  right &= BFloatPair::low(BFloatPair::multiply_add(bits(1), bits(0x1p-8f), bits(1))) == 1;
  right &= BFloatPair::low(BFloatPair::multiply_add(bits(one), bits(0x1p-8f), bits(1))) == 1 + 0x1p-7f;
  right &= BFloatPair::low(BFloatPair::multiply_add(bits(1 + 0x1p-7f), bits(1 - 0x1p-8f), bits(0x1p-120f))) == 1 + 0x1p-8f * 0;
  right &= BFloatPair::low(BFloatPair::multiply(bits(0x1p-70f), bits(0x1p-63f))) == 0x1p-133f;
  right &= HalfPair::low(HalfPair::pack(65519, 0)) == 65504 && std::isinf(HalfPair::high(HalfPair::pack(0, 65520)));
  right &= std::signbit(BFloatPair::low(BFloatPair::multiply(bits(-1), bits(0))));
  return right;
}

}  // namespace

int main() {
  report_wrong();
  World world;
  const std::string failed = world.run(late_load);
  report("late load", !failed.empty() ? failed : std::isnan(world.results[0]) && world.results[1] == 3 ? "right" : "wrong");
  const std::string again = world.run(stored_and_loaded<true, true>);
  report("load of a store", !again.empty() ? again : world.results[0] == 1 ? "right" : "wrong");
  report("edges", edges_are_right() ? "right" : "wrong");
  report("16 columns", few_columns_are_right<16, true>() && few_columns_are_right<16, false>() ? "right" : "wrong");
  report("32 columns", few_columns_are_right<32, true>() && few_columns_are_right<32, false>() ? "right" : "wrong");
  const bool right = few_columns_are_right<32, true, true>() && few_columns_are_right<32, false, true>();
  report("32 columns, both in tiles", right ? "right" : "wrong");
  report("squares", squares_are_right() ? "right" : "wrong");
  report("pairs", pairs_are_right() ? "right" : "wrong");
}
