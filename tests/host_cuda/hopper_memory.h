// Hopper's asynchronous copies on the host: the names of csrc/cuda/hopper/async.cuh.
//
// Everything happens as late as the hardware may do it, and what must not be read yet is poison (NaN):
// - A load fills its place with poison when it is issued. It lands when no thread can go on without it.
// - A store reads shared memory when its thread waits for the read, and compares with what was there when it was issued. It writes
//   global memory when its thread waits for that, or ends.
// - Copies and products must not read what a thread has written and not fenced. In the build with fibers, stores of matrices are
//   tracked by thread. Other writes are seen by their value: any thread's fence_async() makes them visible.
#pragma once

#include <deque>
#include <unordered_map>

#include "cuda/hopper/tile.h"

#define FLOWSEG_GRID_CONSTANT const

namespace flowseg::host {

constexpr uint32_t kSharedBase = 1024 + 128;  // not a multiple of 1024: CUDA does not promise it
constexpr uint32_t kStaticBase = 1u << 30;    // of static shared memory
constexpr unsigned char kPoison = 0xff;       // NaN in every floating-point type

inline std::string text_of(const char* part) { return part; }
inline std::string text_of(int64_t part) { return std::to_string(part); }
// The parts of a message, strings and integers, in one.
template <class... Parts>
std::string text(const Parts&... parts) {
  return (text_of(parts) + ...);
}
// Bytes after the first multiple of 1024 of the dynamic shared memory: how messages name an address.
inline int64_t place(uint32_t address) { return static_cast<int64_t>(address) - (kSharedBase + 1023) / 1024 * 1024; }

// The state of one Barrier.
struct BarrierState {
  uint32_t address = 0;
  int expected = 0, missing = 0;  // arrivals
  int64_t bytes = 0;              // expected and not yet there
  bool fenced = false;
  Phase phase;
  uint64_t keys[2] = {};

  void complete_if_due() {
    if (missing || bytes > 0) return;
    if (bytes < 0) fail(text("more bytes than expected came to the barrier at byte ", place(address)));
    missing = expected;
    phase.advance();
  }
  static std::string describe(const void* about) {
    const auto& own = *static_cast<const BarrierState*>(about);
    return text("barrier at byte ", place(own.address), " of shared memory, phase ", own.phase.count(), ": ", own.missing, " of ",
                own.expected, " arrivals and ", own.bytes, " bytes are missing");
  }
};

// One copy between global and shared memory: a tile of a matrix, or contiguous bytes.
struct Copy {
  bool is_tile = false;
  cuda::Matrices map = {};
  int column = 0, row = 0, matrix = 0;
  char* global = nullptr;
  uint32_t address = 0;
  int bytes = cuda::kTileBytes;
  BarrierState* barrier = nullptr;  // of a load
  std::vector<char> seen = {};           // of a store: the bytes when it was issued, then those it read
  bool has_read = false;

  // Calls use(global pointer, offset in the tile, bytes) for every chunk of 16 bytes that lies in the matrix, at least in part.
  template <class Use>
  void for_each_chunk(Use use) const {
    if (!is_tile) {
      for (int i = 0; i < bytes; i += 16) use(global + i, i, 16);
      return;
    }
    if (matrix < 0 || matrix >= map.count) return;
    char* data = static_cast<char*>(const_cast<void*>(map.data)) + matrix * map.matrix_bytes;
    for (int r = 0; r < cuda::kTile; ++r) {
      if (row + r < 0 || row + r >= map.rows) continue;
      for (int c = 0; c < cuda::kTile; c += 8) {
        const int64_t at = column + c, left = std::min<int64_t>(8, map.columns - at);
        if (at < 0 || left <= 0) continue;
        use(data + (row + r) * map.row_bytes + at * 2, static_cast<int>(cuda::tile_offset(r, c)), static_cast<int>(left) * 2);
      }
    }
  }
};

// The stores that a thread has issued and not yet waited for.
struct ThreadCopies {
  std::vector<Copy> open;                 // stores of the current group
  std::deque<std::vector<Copy>> groups;   // committed, oldest first
  std::vector<uint32_t> unfenced;         // words that the thread has stored as matrices since its last fence
  std::vector<const char*> complete;      // chunks of global memory that it has stored since its last fence_async_global()
};

struct Products;  // hopper_products.h

struct Asynchronous {
  char* memory = nullptr;  // dynamic shared memory
  size_t bytes;
  std::vector<char> visible;      // what copies and products see of it
  std::vector<uint16_t> writers;  // of each word: 1 + the thread that stored matrices there and has not fenced
  std::vector<std::unique_ptr<BarrierState>> barriers;
  std::deque<Copy> loads;  // not yet landed
  // Chunks of global memory that a load must not read yet: the thread that has stored them has not waited, or not fenced.
  std::unordered_map<const char*, unsigned> stored;
  std::vector<ThreadCopies> threads;
  std::unique_ptr<ThreadBarrier> named[16];
  std::vector<int> registers;  // of the threads of each warp, if it has changed them
  std::unique_ptr<Products> products;
  uint32_t serial;  // of the block, over all launches

  // The hardware leaves some orders open; blocks take each in turn: loads land in the order of their issue or in reverse; the
  // threads that wait at a barrier go on before or after the thread that completes its phase.
  bool newest_first() const { return (serial >> 1 ^ serial >> 3) & 1; }
  bool waiters_first() const { return (serial >> 2 ^ serial >> 4) & 1; }

  inline static uint32_t blocks = 0;

  Asynchronous(unsigned count, size_t shared);
  ~Asynchronous();
  void reset();

  bool holds(const void* at) const { return at >= memory && at < memory + bytes; }
  char* at(uint32_t address, int64_t size) const;
  void check_visible(const char* from, int size, const char* reader) const;
  void write(char* to, const char* from, int size);
};

// Orders addresses of static shared memory.
alignas(1024) inline char static_anchor[16];

inline Asynchronous& asynchronous() { return *block->asynchronous; }
inline char* dynamic_shared() { return asynchronous().memory; }

inline void Asynchronous::reset() {
  std::memset(memory, kPoison, bytes);
#ifndef FLOWSEG_OS_THREADS
  visible.assign(memory, memory + bytes);
  writers.assign(bytes / 4 + 1, 0);
#endif
  barriers.clear();
  serial = ++blocks;
  change_turns();
}

inline char* Asynchronous::at(uint32_t address, int64_t size) const {
  if (address >= kStaticBase) return static_anchor + static_cast<int32_t>(address - kStaticBase);
  const int64_t offset = static_cast<int64_t>(address) - kSharedBase;
  if (offset < 0 || offset + size > static_cast<int64_t>(bytes)) {
    fail(text("an access at byte ", place(address), " is outside of the shared memory, which ends at byte ",
              place(kSharedBase + static_cast<uint32_t>(bytes))));
  }
  return memory + offset;
}

// Fails if a thread has written there without a fence.
inline void Asynchronous::check_visible([[maybe_unused]] const char* from, [[maybe_unused]] int size,
                                        [[maybe_unused]] const char* reader) const {
#ifndef FLOWSEG_OS_THREADS
  if (!holds(from)) return;
  const int64_t offset = from - memory;
  for (int64_t word = offset / 4; word < (offset + size) / 4; ++word) {
    if (!writers[word]) continue;
    fail(text(reader, " reads byte ", place(kSharedBase + static_cast<uint32_t>(word * 4)), " of shared memory, which thread ",
              writers[word] - 1, " has written without fence_async()"));
  }
  if (std::memcmp(from, visible.data() + offset, size) != 0) {
    fail(text(reader, " reads byte ", place(kSharedBase + static_cast<uint32_t>(offset)),
              " of shared memory, which was written without fence_async()"));
  }
#endif
}

// Writes as a copy does.
inline void Asynchronous::write(char* to, const char* from, int size) {
  std::memcpy(to, from, size);
#ifndef FLOWSEG_OS_THREADS
  if (!holds(to)) return;
  const int64_t offset = to - memory;
  std::memcpy(visible.data() + offset, from, size);
  std::fill(writers.begin() + offset / 4, writers.begin() + (offset + size + 3) / 4, 0);
#endif
}

inline void start_load(Copy copy) {
  Asynchronous& all = asynchronous();
  if (!copy.barrier->fenced) fail("a load completes bytes of a barrier without fence_barrier_init()");
  for (const Copy& other : all.loads) {
    if (copy.address < other.address + other.bytes && other.address < copy.address + copy.bytes) {
      fail(text("a load to byte ", place(copy.address), " of shared memory, where another load has not yet landed"));
    }
  }
  copy.for_each_chunk([&](const char* from, int, int) {
    const auto found = all.stored.find(from);
    if (found == all.stored.end()) return;
    fail(text("a load reads global memory that thread ", found->second,
              " has stored, before that thread's wait_for_copies() and fence_async_global()"));
  });
  const std::vector<char> poison(copy.bytes, static_cast<char>(kPoison));
  all.write(all.at(copy.address, copy.bytes), poison.data(), copy.bytes);
  all.loads.push_back(std::move(copy));
}

inline void land(const Copy& copy) {
  Asynchronous& all = asynchronous();
  char* to = all.at(copy.address, copy.bytes);
  for (int i = 0; i < copy.bytes; ++i) {
    if (static_cast<unsigned char>(to[i]) != kPoison) {
      fail(text("a thread wrote to byte ", place(copy.address + i), " of shared memory before a load to it had landed"));
    }
  }
  std::vector<char> data(copy.bytes, 0);  // zero outside of the matrix
  copy.for_each_chunk([&](const char* from, int offset, int size) { std::memcpy(data.data() + offset, from, size); });
  all.write(to, data.data(), copy.bytes);
  copy.barrier->bytes -= copy.bytes;
  copy.barrier->complete_if_due();
}

inline bool deliver_one_copy() {
  if (!block || asynchronous().loads.empty()) return false;
  std::deque<Copy>& loads = asynchronous().loads;
  const bool newest = asynchronous().newest_first();
  const Copy copy = newest ? loads.back() : loads.front();
  newest ? loads.pop_back() : loads.pop_front();
  land(copy);
  return true;
}

inline void start_store(Copy copy) {
  Asynchronous& all = asynchronous();
  const char* from = all.at(copy.address, copy.bytes);
  all.check_visible(from, copy.bytes, "a store");
  copy.seen.assign(from, from + copy.bytes);
  copy.for_each_chunk([&](const char* to, int, int) { all.stored[to] = threadIdx.x; });
  all.threads[threadIdx.x].open.push_back(std::move(copy));
}

// The store reads shared memory.
inline void read_store(Copy& copy) {
  if (copy.has_read) return;
  const char* from = asynchronous().at(copy.address, copy.bytes);
  {
    const Guard guard;
    if (std::memcmp(from, copy.seen.data(), copy.bytes) != 0) {
      fail(text("byte ", place(copy.address),
                " of shared memory was overwritten before the thread had waited for the reads of a store"));
    }
  }
  reads(from, copy.bytes);
  copy.has_read = true;
}

inline void finish_store(Copy& copy) {
  read_store(copy);
  copy.for_each_chunk([&](char* to, int offset, int size) { std::memcpy(to, copy.seen.data() + offset, size); });
  std::vector<const char*>& complete = asynchronous().threads[threadIdx.x].complete;
  copy.for_each_chunk([&](const char* to, int, int) { complete.push_back(to); });
}

inline void wait_for_stores(size_t pending, bool complete) {
  ThreadCopies& own = asynchronous().threads[threadIdx.x];
  for (size_t i = 0; i + pending < own.groups.size(); ++i) {
    for (Copy& copy : own.groups[i]) complete ? finish_store(copy) : read_store(copy);
  }
  while (complete && own.groups.size() > pending) own.groups.pop_front();
}

inline void end_copies_of_thread() {
  ThreadCopies& own = asynchronous().threads[threadIdx.x];
  bool read = own.open.empty();
  for (const auto& group : own.groups) {
    for (const Copy& copy : group) read = read && copy.has_read;
  }
  if (!read) fail(text("thread ", threadIdx.x, " ended before its stores had read shared memory"));
  wait_for_stores(0, true);
}

}  // namespace flowseg::host

namespace flowseg::cuda {

struct TensorMap {
  Matrices matrices;
};
// Lets the launches fail if TMA does not take the array.
inline TensorMap checked_tensor_map(const Matrices& m) {
  if (reinterpret_cast<uintptr_t>(m.data) % 16 || m.row_bytes % 16 || m.matrix_bytes % 16) {
    host::failure = "a tensor map of an array whose address or strides are no multiples of 16 bytes";
  }
  if (!m.data || m.columns < 1 || m.rows < 1 || m.count < 1) host::failure = "a tensor map of an empty array";
  return {m};
}

inline uint32_t shared_address(const void* at) {
  const host::Asynchronous& all = host::asynchronous();
  const char* byte = static_cast<const char*>(at);
  if (byte >= all.memory && byte <= all.memory + all.bytes) return host::kSharedBase + static_cast<uint32_t>(byte - all.memory);
  return host::kStaticBase + static_cast<uint32_t>(byte - host::static_anchor);
}

struct Barrier {
  uint64_t state;  // of the host build: the block's serial number, then the number of the barrier

  void init(int arrivals) {
    if (arrivals < 1) host::fail("a barrier of no arrivals");
    uint64_t number;
    {
      const host::Guard guard;
      host::Asynchronous& all = host::asynchronous();
      auto made = std::make_unique<host::BarrierState>();
      made->address = shared_address(this);
      made->expected = made->missing = arrivals;
      number = static_cast<uint64_t>(all.serial) << 32 | all.barriers.size();
      all.barriers.push_back(std::move(made));
    }
    state = number;
  }
  void arrive() { arrive_and_expect(0); }
  void arrive_and_expect(int bytes) {
    const uint64_t number = state;
    unsigned phase;
    {
      const host::Guard guard;
      phase = at(number).phase.count();
    }
    host::release(at(number).keys[phase % 2]);
    const host::Guard guard;
    host::BarrierState& own = at(number);
    if (!own.missing) host::fail(host::text("one arrival too many at the barrier at byte ", host::place(own.address)));
    --own.missing;
    own.bytes += bytes;
    own.complete_if_due();
    if (own.phase.count() != phase && host::asynchronous().waiters_first()) own.phase.let_waiters_go_first();
  }
  void wait(int parity) {
    const uint64_t number = state;
    if (parity != 0 && parity != 1) host::fail(host::text("a wait for the parity ", parity));
    {
      const host::Guard guard;
      host::BarrierState& own = at(number);
      while (own.phase.count() % 2 == static_cast<unsigned>(parity)) {
        own.phase.wait(own.phase.count(), {host::BarrierState::describe, &own});
      }
    }
    host::acquire(at(number).keys[parity]);
  }

  static host::BarrierState& at(uint64_t number) {
    host::Asynchronous& all = host::asynchronous();
    const uint64_t index = number & 0xffffffffu;
    if (number >> 32 != all.serial || index >= all.barriers.size()) host::fail("a barrier is used before init()");
    return *all.barriers[index];
  }
};
static_assert(sizeof(Barrier) == 8);

inline void fence_barrier_init() {
  const host::Guard guard;
  for (auto& barrier : host::asynchronous().barriers) barrier->fenced = true;
}

inline void fence_async() {
#ifndef FLOWSEG_OS_THREADS
  host::Asynchronous& all = host::asynchronous();
  std::memcpy(all.visible.data(), all.memory, all.bytes);
  const uint16_t own = static_cast<uint16_t>(threadIdx.x + 1);
  std::vector<uint32_t>& words = all.threads[threadIdx.x].unfenced;
  for (const uint32_t word : words) {
    if (all.writers[word] == own) all.writers[word] = 0;
  }
  words.clear();
#endif
}
inline void fence_async_global() {
  const host::Guard guard;
  host::Asynchronous& all = host::asynchronous();
  std::vector<const char*>& complete = all.threads[threadIdx.x].complete;
  for (const char* chunk : complete) {
    const auto found = all.stored.find(chunk);
    if (found != all.stored.end() && found->second == threadIdx.x) all.stored.erase(found);
  }
  complete.clear();
}

inline void load_copy(host::Copy copy, Barrier& barrier) {
  char* to = host::asynchronous().at(copy.address, copy.bytes);
  unsigned phase;
  const uint64_t number = barrier.state;
  {
    const host::Guard guard;
    copy.barrier = &Barrier::at(number);
    phase = copy.barrier->phase.count();
  }
  // The thread stands for the copy.
  copy.for_each_chunk([](const char* from, int, int size) { host::reads(from, size); });
  host::writes(to, copy.bytes);
  host::release(copy.barrier->keys[phase % 2]);
  const host::Guard guard;
  host::start_load(std::move(copy));
}
inline void check_tile(const TensorMap& map, uint32_t address) {
  if (map.matrices.data == nullptr) host::fail("a copy of a tile has no tensor map");
  if (address % 1024) {
    host::fail(host::text("a tile at byte ", host::place(address), " of shared memory, not a multiple of 1024"));
  }
}
inline void check_bytes(const void* global, uint32_t address, int bytes) {
  if (bytes <= 0 || (address | bytes | reinterpret_cast<uintptr_t>(global)) % 16) {
    host::fail(host::text("a copy of ", bytes, " bytes at byte ", host::place(address), ": wanted multiples of 16"));
  }
}
inline void load_tile(uint32_t to, const TensorMap& map, Barrier& barrier, int column, int row, int matrix) {
  check_tile(map, to);
  load_copy({.is_tile = true, .map = map.matrices, .column = column, .row = row, .matrix = matrix, .address = to}, barrier);
}
inline void load_bytes(uint32_t to, const void* from, Barrier& barrier, int bytes) {
  check_bytes(from, to, bytes);
  load_copy({.global = static_cast<char*>(const_cast<void*>(from)), .address = to, .bytes = bytes}, barrier);
}
inline void store_copy(host::Copy copy) {
  host::reads(host::asynchronous().at(copy.address, copy.bytes), copy.bytes);
  const host::Guard guard;
  host::start_store(std::move(copy));
}
inline void store_tile(const TensorMap& map, uint32_t from, int column, int row, int matrix) {
  check_tile(map, from);
  store_copy({.is_tile = true, .map = map.matrices, .column = column, .row = row, .matrix = matrix, .address = from});
}
inline void store_bytes(void* to, uint32_t from, int bytes) {
  check_bytes(to, from, bytes);
  store_copy({.global = static_cast<char*>(to), .address = from, .bytes = bytes});
}
inline void commit_copies() {
  host::ThreadCopies& own = host::asynchronous().threads[threadIdx.x];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}
template <int kPending>
void wait_for_reads() {
  host::wait_for_stores(kPending, false);
}
template <int kPending>
void wait_for_copies() {
  host::wait_for_stores(kPending, true);
}

template <int kId, int kThreads_>
void named_barrier() {
  static_assert(kId > 0 && kId < 16 && kThreads_ % 32 == 0);
  host::ThreadBarrier* barrier;
  {
    const host::Guard guard;
    auto& own = host::asynchronous().named[kId];
    if (!own) own = std::make_unique<host::ThreadBarrier>(kThreads_, host::text("named barrier ", kId));
    if (own->expected() != kThreads_) host::fail(host::text("named barrier ", kId, " is used for two numbers of threads"));
    barrier = own.get();
  }
  barrier->arrive_and_wait();
}

}  // namespace flowseg::cuda
