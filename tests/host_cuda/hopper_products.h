// Hopper's matrix products on the host: the names of csrc/cuda/hopper/wgmma.cuh.
//
// A product is carried out when its thread waits for it. Between its issue and that wait:
// - Its accumulators hold poison. They must not be written.
// - Its operands in shared memory must not change. They are read at the issue and compared at the wait.
// Operands in registers are copied at the issue: the compiler keeps those registers until the wait.
//
// The four warps of a group act on their own, as late or early as the hardware may let them. All of them must issue the same
// products.
#pragma once

#include <deque>

#include "cuda/hopper/tile.h"
#include "hopper_memory.h"
#include "shared/types.h"

namespace flowseg::host {

constexpr float kPoisonedSum = std::bit_cast<float>(0x7fc0deadu);  // a NaN

// Accumulators of a thread from the first product that uses them until no product under way does.
struct Accumulator {
  float* at = nullptr;
  int count = 0, pending = 0;
  float values[32];
};

// An operand in a tile: 16 of the summed axis, and `extent` rows or columns from `first` on.
struct TileOperand {
  uint64_t descriptor = 0;
  bool rows_are_k = false;
  int extent = 0, first = 0;

  int chunks() const { return 2 * extent; }
  // The address of the chunk of 8 elements number i. The hardware swizzles the address: its bits 4 to 6 by its bits 7 to 9.
  uint32_t chunk(int i) const {
    const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    const int per_row = rows_are_k ? extent / 8 : 2, row = i / per_row + (rows_are_k ? 0 : first);
    const int column = i % per_row * 8 + (rows_are_k ? first : 0);
    const uint32_t at = start + row / 8 * stride + row % 8 * cuda::kTileRowBytes + column * 2;
    return at ^ (at >> 7 & 7) << 4;
  }
  // The place of element e of chunk i in the operand: (index along the summed axis, index along the other).
  std::pair<int, int> element(int i, int e) const {
    const int per_row = rows_are_k ? extent / 8 : 2;
    return rows_are_k ? std::pair{i / per_row, i % per_row * 8 + e} : std::pair{i % per_row * 8 + e, i / per_row};
  }
};

// Row and column of what a thread holds of a warp's 16 rows: element i of A, two to a word, and accumulator i.
inline std::pair<int, int> place_in_fragment(int lane, int i) {
  return {lane / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2};
}

struct Product {
  bool bfloat = false;
  int columns = 0;
  TileOperand a, b;  // a.extent is 0 if A is in registers
  uint16_t seen_a[32 * 8], seen_b[128 * 8];
  struct Lane {
    Accumulator* sums = nullptr;
    uint32_t a[4] = {};
    bool adds = false;
  } lanes[32];
};

struct WarpProducts {
  std::deque<Product> under_way;
  size_t retired = 0;  // products before under_way
  uint64_t key = 0;
};

struct ThreadProducts {
  size_t issued = 0;
  std::deque<size_t> groups;  // the number of products issued when each group ended
  std::deque<Accumulator> sums;
  bool has_fenced = false, fenced = false;  // ever; since the last wait
};

// The parts of a product that all warps of a group must agree on.
struct Signature {
  uint64_t a, b;
  bool bfloat, a_in_tile, rows_a, rows_b;
  int columns;
  bool operator==(const Signature&) const = default;
};

struct Products {
  std::vector<WarpProducts> warps;
  std::vector<ThreadProducts> threads;
  std::vector<std::vector<Signature>> groups;
};

inline void check_descriptor(uint64_t descriptor, bool rows_are_k) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4, in_row = start % 1024;
  const uint64_t rest = descriptor & ~uint64_t{0x3fff};
  if (rest != (cuda::descriptor(cuda::descriptor_low(0)) & ~uint64_t{0x3fff})) {
    fail("a descriptor with other strides, swizzle or offset than those of a tile");
  }
  if (rows_are_k ? in_row != 0 : in_row % cuda::kColumnStep != 0 || in_row >= cuda::kTileRowBytes) {
    fail(text("a descriptor of an operand whose ", rows_are_k ? "rows" : "columns", " are K starts at byte ", place(start),
              " of shared memory: not where a step in a tile starts"));
  }
}

// Reads an operand as it is now.
inline void gather(const TileOperand& operand, uint16_t* to, bool check) {
  const Asynchronous& all = asynchronous();
  for (int i = 0; i < operand.chunks(); ++i) {
    const char* from = all.at(operand.chunk(i), 16);
    if (check) all.check_visible(from, 16, "a product");
    std::memcpy(to + i * 8, from, 16);
  }
}

inline float element_value(uint16_t bits, bool bfloat) {
  return bfloat ? std::bit_cast<float>(static_cast<uint32_t>(bits) << 16) : float_of_half(bits);
}

// c (16, columns) = the warp's 16 rows of A times B.
inline void multiply(const Product& p, float (&c)[16][64]) {
  float a[16][16], b[16][64];
  for (int i = 0; i < p.b.chunks(); ++i) {
    for (int e = 0; e < 8; ++e) {
      const auto [k, n] = p.b.element(i, e);
      b[k][n] = element_value(p.seen_b[i * 8 + e], p.bfloat);
    }
  }
  for (int i = 0; i < p.a.chunks(); ++i) {
    for (int e = 0; e < 8; ++e) {
      const auto [k, m] = p.a.element(i, e);
      a[m][k] = element_value(p.seen_a[i * 8 + e], p.bfloat);
    }
  }
  for (int i = 0; !p.a.extent && i < 32 * 8; ++i) {
    const auto [row, k] = place_in_fragment(i / 8, i % 8);
    a[row][k] = element_value(static_cast<uint16_t>(p.lanes[i / 8].a[i / 2 % 4] >> 16 * (i % 2)), p.bfloat);
  }
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < p.columns; ++n) c[m][n] = 0;
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < p.columns; ++n) c[m][n] += a[m][k] * b[k][n];
    }
  }
}

inline void carry_out(Product& p) {
  uint16_t now_a[32 * 8], now_b[128 * 8];
  gather(p.a, now_a, false);
  gather(p.b, now_b, false);
  for (const bool of_b : {false, true}) {
    const TileOperand& operand = of_b ? p.b : p.a;
    if (std::memcmp(of_b ? now_b : now_a, of_b ? p.seen_b : p.seen_a, operand.chunks() * 16) != 0) {
      fail(text("the operand at byte ", place(static_cast<uint32_t>(operand.descriptor & 0x3fff) << 4),
                " of shared memory changed between a product and its wait"));
    }
  }
  float c[16][64];
  multiply(p, c);
  for (int lane = 0; lane < 32; ++lane) {
    Accumulator& sums = *p.lanes[lane].sums;
    for (int i = 0; i < sums.count; ++i) {
      const auto [row, column] = place_in_fragment(lane, i);
      const float product = c[row][column];
      sums.values[i] = p.lanes[lane].adds ? sums.values[i] + product : product;
    }
    if (--sums.pending) continue;
    for (int i = 0; i < sums.count; ++i) {
      if (std::bit_cast<uint32_t>(sums.at[i]) != std::bit_cast<uint32_t>(kPoisonedSum)) {
        fail("an accumulator was written between a product and its wait");
      }
      sums.at[i] = sums.values[i];
    }
  }
}

// Finds the accumulators at `d`, or makes them.
inline Accumulator& accumulator(ThreadProducts& own, float* d, int count, bool adds) {
  Accumulator* found = nullptr;
  for (Accumulator& sums : own.sums) {
    if (sums.at == d) found = &sums;
  }
  if (found && found->pending) return *found;
  if (!own.has_fenced) fail(text("thread ", threadIdx.x, " issues a product without wgmma_fence()"));
  if (found && adds && !own.fenced && found->count == count && std::memcmp(d, found->values, count * sizeof *d) != 0) {
    fail(text("thread ", threadIdx.x, " adds to accumulators that it has written since its last wgmma_fence()"));
  }
  if (!found) found = &own.sums.emplace_back();
  found->at = d;
  found->count = count;
  for (int i = 0; i < count; ++i) {
    if (adds) found->values[i] = d[i];
    d[i] = kPoisonedSum;
  }
  return *found;
}

__attribute__((noinline)) inline void issue(const Signature& signature, float* d, const uint32_t* a, bool adds) {
  const unsigned thread = threadIdx.x, warp = thread / 32, lane = thread % 32, group = thread / 128;
  const TileOperand operand_a{signature.a, signature.rows_a, signature.a_in_tile ? 16 : 0, static_cast<int>(warp % 4) * 16};
  const TileOperand operand_b{signature.b, signature.rows_b, signature.columns, 0};
  if (lane == 0) {  // it stands for the product
    for (const TileOperand* operand : {&operand_a, &operand_b}) {
      for (int i = 0; i < operand->chunks(); ++i) reads(asynchronous().at(operand->chunk(i), 16), 16);
    }
  }
  const Guard guard;
  if (block->threads < (group + 1) * 128) fail("a product needs groups of 128 threads");
  Products& all = *asynchronous().products;
  WarpProducts& in_warp = all.warps[warp];
  ThreadProducts& own = all.threads[thread];
  if (own.issued == all.groups[group].size()) all.groups[group].push_back(signature);
  if (all.groups[group][own.issued] != signature) fail(text("threads of warp group ", group, " issue different products"));
  if (own.issued == in_warp.retired + in_warp.under_way.size()) {
    check_descriptor(signature.b, signature.rows_b);
    if (signature.a_in_tile) check_descriptor(signature.a, signature.rows_a);
    Product& made = in_warp.under_way.emplace_back();
    made.bfloat = signature.bfloat;
    made.columns = signature.columns;
    made.a = operand_a;
    made.b = operand_b;
    gather(made.a, made.seen_a, true);
    gather(made.b, made.seen_b, true);
  }
  Product& product = in_warp.under_way[own.issued++ - in_warp.retired];
  Product::Lane& part = product.lanes[lane];
  part.adds = adds;
  if (a) std::copy(a, a + 4, part.a);
  part.sums = &accumulator(own, d, signature.columns / 2, adds);
  ++part.sums->pending;
}

// Carries out the warp's products of all but the last `pending` groups.
inline void retire(unsigned warp, size_t pending) {
  Products& all = *asynchronous().products;
  WarpProducts& in_warp = all.warps[warp];
  const ThreadProducts& first = all.threads[warp * 32];
  for (unsigned lane = 0; lane < 32; ++lane) {
    ThreadProducts& own = all.threads[warp * 32 + lane];
    if (own.issued != first.issued || own.groups != first.groups) {
      fail(text("threads of warp ", warp, " issue different products"));
    }
  }
  const size_t target = first.groups[first.groups.size() - pending - 1];
  for (; in_warp.retired < target; ++in_warp.retired) {
    carry_out(in_warp.under_way.front());
    in_warp.under_way.pop_front();
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    auto& groups = all.threads[warp * 32 + lane].groups;
    groups.erase(groups.begin(), groups.end() - static_cast<std::ptrdiff_t>(pending));
  }
}

inline void wait_for_products(size_t pending) {
  const unsigned warp = threadIdx.x / 32;
  ThreadProducts& own = asynchronous().products->threads[threadIdx.x];
  own.fenced = false;
  if (own.groups.size() <= pending) return;
  WarpProducts& in_warp = asynchronous().products->warps[warp];
#ifdef FLOWSEG_OS_THREADS
  if (threadIdx.x % 32 == 0) {  // it stands for the products, which have read their operands only now
    std::vector<const char*> chunks;
    {
      const Guard guard;
      for (size_t i = in_warp.retired; i < own.groups[own.groups.size() - pending - 1]; ++i) {
        const Product& product = in_warp.under_way[i - in_warp.retired];
        for (const TileOperand* operand : {&product.a, &product.b}) {
          for (int c = 0; c < operand->chunks(); ++c) chunks.push_back(asynchronous().at(operand->chunk(c), 16));
        }
      }
    }
    for (const char* chunk : chunks) reads(chunk, 16);
    release(in_warp.key);
  }
#endif
  block->warps[warp]->arrive_and_wait(false, [&] { retire(warp, pending); });
  acquire(in_warp.key);
}

// Calls use(addresses of the 8 rows of each of four matrices) in every thread of the warp.
template <class Use>
void with_matrices(uint32_t at, Use use) {
  if (at % 16) fail(text("a row of a matrix at byte ", place(at), " of shared memory, not a multiple of 16"));
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  exchange(*block->warps[warp], block->in_warp, block->exchanges_in_warp[threadIdx.x], false, warp * kLanes, at, [&](auto value) {
    use([&](int matrix, int row) { return asynchronous().at(value(8 * matrix + row), 16); });
    return 0;
  });
}

inline void move_matrices(uint32_t* r, uint32_t at, bool transposed, bool stores) {
  with_matrices(at, [&](auto row_of) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    for (int m = 0; m < 4; ++m) {
      for (int half = 0; half < 2; ++half) {
        const int row = transposed ? 2 * (lane % 4) + half : lane / 4, column = transposed ? lane / 4 : 2 * (lane % 4) + half;
        char* element = row_of(m, row) + 2 * column;
        uint16_t bits = static_cast<uint16_t>(r[m] >> 16 * half);
        if (!stores) {
          std::memcpy(&bits, element, 2);
          r[m] = half ? (r[m] & 0xffffu) | static_cast<uint32_t>(bits) << 16 : bits;
          continue;
        }
        std::memcpy(element, &bits, 2);
#ifndef FLOWSEG_OS_THREADS
        Asynchronous& all = asynchronous();
        if (!all.holds(element)) continue;
        const uint32_t word = static_cast<uint32_t>((element - all.memory) / 4);
        all.writers[word] = static_cast<uint16_t>(threadIdx.x + 1);
        all.threads[threadIdx.x].unfenced.push_back(word);
#endif
      }
    }
  });
}

inline void set_registers(int count) {
  const Guard guard;
  asynchronous().registers[threadIdx.x / 32] = count;
}

inline Asynchronous::Asynchronous(unsigned count, size_t shared)
    : bytes(shared), threads(count), registers((count + 31) / 32), products(std::make_unique<Products>()) {
  void* room = nullptr;
  if (posix_memalign(&room, 1024, kSharedBase % 1024 + bytes)) std::abort();
  memory = static_cast<char*>(room) + kSharedBase % 1024;
  products->warps.resize((count + 31) / 32);
  products->threads.resize(count);
  products->groups.resize((count + 127) / 128);
  reset();
}
inline Asynchronous::~Asynchronous() { std::free(memory - kSharedBase % 1024); }

inline Block::Block(unsigned count, size_t shared)
    : threads(count), all(count, "__syncthreads"), exchanges_in_block(count), exchanges_in_warp(count) {
  for (unsigned w = 0; w < count / kLanes; ++w) {
    warps.push_back(std::make_unique<ThreadBarrier>(kLanes, text("warp ", w)));
  }
  for (int i = 0; i < 2; ++i) {
    in_block[i].resize(count);
    in_warp[i].resize(count);
  }
  asynchronous = std::make_unique<Asynchronous>(count, shared);
}
inline Block::~Block() = default;

inline void end_thread() {
  end_copies_of_thread();
  const ThreadProducts& own = asynchronous().products->threads[threadIdx.x];
  const Guard guard;
  for (const Accumulator& sums : own.sums) {
    if (sums.pending) fail(text("thread ", threadIdx.x, " ended before its products"));
  }
}

inline void end_block() {
  Asynchronous& all = asynchronous();
  if (!all.loads.empty()) fail(text("the block ended before a load to byte ", place(all.loads[0].address), " had landed"));
  int registers = 0;
  for (const int count : all.registers) registers += 32 * count;
  if (registers > 65536) fail(text("the warps take ", registers, " registers: more than 65536"));
  for (WarpProducts& warp : all.products->warps) warp = {};
  for (ThreadProducts& thread : all.products->threads) thread = {};
  for (auto& group : all.products->groups) group.clear();
  for (ThreadCopies& thread : all.threads) thread = {};
  all.stored.clear();
  for (auto& barrier : all.named) barrier.reset();
  all.reset();
}

}  // namespace flowseg::host

namespace flowseg::cuda {

inline void wgmma_fence() {
  host::ThreadProducts& own = host::asynchronous().products->threads[threadIdx.x];
  own.has_fenced = own.fenced = true;
}
inline void wgmma_commit() {
  host::ThreadProducts& own = host::asynchronous().products->threads[threadIdx.x];
  own.groups.push_back(own.issued);
}
template <int kPending>
void wgmma_wait() {
  host::wait_for_products(kPending);
}
template <int N>
void settle(float (&)[N]) {}
template <int N>
void settle(uint32_t (&)[N]) {}

template <class T, bool kRowsAreK, int N>
void wgmma(float (&d)[N], const uint32_t* a, uint64_t b, int accumulate = 1) {
  static_assert(N == 32 || N == 16 || N == 8);
  host::issue({0, b, T::kIsBFloat, false, false, kRowsAreK, 2 * N}, d, a, accumulate != 0);
}
template <class T, bool kRowsAreK>
void wgmma_first(float (&d)[32], const uint32_t* a, uint64_t b) {
  host::issue({0, b, T::kIsBFloat, false, false, kRowsAreK, 64}, d, a, false);
}
template <class T, bool kRowsAreKOfA, bool kRowsAreKOfB, int N>
void wgmma_tiles(float (&d)[N], uint64_t a, uint64_t b, int accumulate = 1) {
  static_assert(N == 32 || N == 16);
  host::issue({a, b, T::kIsBFloat, true, kRowsAreKOfA, kRowsAreKOfB, 2 * N}, d, nullptr, accumulate != 0);
}

template <class T>
void mma_16x8x8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  struct Operands {
    uint32_t a0, a1, b;
  };
  const int warp = static_cast<int>(threadIdx.x) / host::kLanes, lane = static_cast<int>(threadIdx.x) % host::kLanes;
  host::exchange(*host::block->warps[warp], host::block->in_warp, host::block->exchanges_in_warp[threadIdx.x], false,
                 warp * host::kLanes, Operands{a0, a1, b}, [&](auto value) {
    const auto element = [](uint32_t word, int i) {
      return host::element_value(static_cast<uint16_t>(word >> 16 * i), T::kIsBFloat);
    };
    for (int i = 0; i < 4; ++i) {
      float sum = 0;
      for (int k = 0; k < 8; ++k) {
        const Operands row = value(lane / 4 * 4 + k / 2), column = value((2 * (lane % 4) + i % 2) * 4 + k / 2);
        sum += element(i < 2 ? row.a0 : row.a1, k % 2) * element(column.b, k % 2);
      }
      d[i] += sum;
    }
    return 0;
  });
}

inline void load_matrices(uint32_t* r, uint32_t at) { host::move_matrices(r, at, false, false); }
inline void load_matrices_transposed(uint32_t* r, uint32_t at) { host::move_matrices(r, at, true, false); }
inline void store_matrices(uint32_t at, const uint32_t* r) { host::move_matrices(const_cast<uint32_t*>(r), at, false, true); }
inline void store_matrices_transposed(uint32_t at, const uint32_t* r) {
  host::move_matrices(const_cast<uint32_t*>(r), at, true, true);
}

// The largest error that the hardware's may have.
inline float approximate_tanh(float y) { return std::tanh(y) * (1 + 0x1p-11f); }
inline float one_plus_tanh(float y) { return 2 / (1 + std::exp(-2 * y)); }

template <int N>
void give_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  host::set_registers(N);
}
template <int N>
void take_registers() {
  give_registers<N>();
}

// The exact value of a sum of two numbers, rounded to odd: rounding it again gives the rounded exact sum.
inline float odd_sum(double a, double b) {
  double sum = a + b;
  const double part = sum - a, error = (a - (sum - part)) + (b - part);
  const uint64_t bits = std::bit_cast<uint64_t>(sum);
  if (error != 0 && std::isfinite(sum) && bits % 2 == 0) {
    sum = std::bit_cast<double>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
  }
  const float near = static_cast<float>(sum);
  const uint32_t word = std::bit_cast<uint32_t>(near);
  if (static_cast<double>(near) == sum || !std::isfinite(near) || word % 2) return near;
  const bool toward_zero = std::fabs(static_cast<double>(near)) > std::fabs(sum);
  return std::bit_cast<float>(toward_zero ? word - 1 : word + 1);
}

template <class Element>
struct Pair {
  static constexpr bool kIsBFloat = std::is_same_v<Element, BFloat>;
  static uint32_t bits(float v) {
    Element e;
    narrow(v, e);
    return std::bit_cast<uint16_t>(e);
  }
  static uint32_t pack(float low, float high) { return bits(low) | bits(high) << 16; }
  static float low(uint32_t v) { return widen(std::bit_cast<Element>(static_cast<uint16_t>(v))); }
  static float high(uint32_t v) { return widen(std::bit_cast<Element>(static_cast<uint16_t>(v >> 16))); }
};
struct BFloatPair : Pair<BFloat> {
  using Element = BFloat;
  static uint32_t multiply(uint32_t a, uint32_t b) { return multiply_add(a, b, 0x80008000u); }
  static uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    return pack(odd_sum(double{low(a)} * low(b), low(c)), odd_sum(double{high(a)} * high(b), high(c)));
  }
};
struct HalfPair : Pair<Half> {
  using Element = Half;
};

}  // namespace flowseg::cuda
