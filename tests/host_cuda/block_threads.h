// The threads of a CUDA block on the host: run_threads(count, body) calls body() once per thread, concurrently, with threadIdx.x
// from 0 to count - 1. Threads wait for a Phase to change; a ThreadBarrier is made of one.
//
// They are operating-system threads if a sanitizer watches them. Otherwise they are fibers that take turns in
// one thread: a barrier then takes microseconds. A fiber runs until it waits at a barrier; the last fiber to arrive goes on first.
// The fibers of every other block take turns in reverse order. If a barrier is missing, either order lets some fiber read before
// the fiber that should have written, so a launch of two blocks shows the fault in every run. In each block half of the warps are
// slow: they run only when no other one can. Over eight blocks, each warp is once slow while any other one is not.
//
// If every thread waits, an asynchronous copy is delivered; without one, the launch fails with a message that says who waits for
// what.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct Index {
  unsigned x;
};

namespace flowseg::host {

// The message of the first failure; empty if all is well. Later launches do nothing.
inline std::string failure;
// The failure since the last call, or null. Launches run again.
inline const char* take_failure() {
  static std::string message;
  message = std::exchange(failure, "");
  return message.empty() ? nullptr : message.c_str();
}

// Ends the launch with a message.
[[noreturn]] void fail(const std::string& message);

// Completes an asynchronous copy. Returns false if there is none. Called when every thread waits.
bool deliver_one_copy();

// The reason of a wait: `describe(about)` gives its part of the message of a deadlock.
struct Wanted {
  std::string (*describe)(const void* about) = nullptr;
  const void* about = nullptr;
};

inline std::string deadlock(const std::vector<Wanted>& wanted) {
  std::map<std::string, std::string> threads;
  for (size_t t = 0; t < wanted.size(); ++t) {
    if (!wanted[t].describe) continue;
    size_t last = t;
    while (last + 1 < wanted.size() && wanted[last + 1].about == wanted[t].about) ++last;
    std::string& list = threads[wanted[t].describe(wanted[t].about)];
    list += (list.empty() ? "" : ", ") + std::to_string(t) + (last > t ? "-" + std::to_string(last) : "");
    t = last;
  }
  std::string text = "deadlock: every thread waits";
  for (const auto& [what, list] : threads) text += "\n  threads " + list + ": " + what;
  return text;
}

}  // namespace flowseg::host

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)

#define FLOWSEG_OS_THREADS

#include <atomic>
#include <mutex>
#include <thread>

inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

#ifdef __SANITIZE_THREAD__
extern "C" {
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
}
#endif

namespace flowseg::host {

// The order of events that ThreadSanitizer may rely on, and accesses that the thread makes on behalf of a copy or a product.
#ifdef __SANITIZE_THREAD__
inline void acquire(uint64_t& key) { __tsan_acquire(&key); }
inline void release(uint64_t& key) { __tsan_release(&key); }
inline void reads(const void* at, size_t bytes) { __tsan_read_range(const_cast<void*>(at), bytes); }
inline void writes(const void* at, size_t bytes) { __tsan_write_range(const_cast<void*>(at), bytes); }
#else
inline void acquire(uint64_t&) {}
inline void release(uint64_t&) {}
inline void reads(const void*, size_t) {}
inline void writes(const void*, size_t) {}
#endif

struct Scheduler {
  std::mutex lock;
  std::vector<Wanted> wanted;  // of the threads that wait
  unsigned waiting = 0, live = 0;
};
inline Scheduler scheduler;
inline void change_turns() {}

// A section whose accesses ThreadSanitizer does not see.
struct Unwatched {
#ifdef __SANITIZE_THREAD__
  Unwatched() {
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  }
#else
  Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
};

// An unwatched section that one thread at a time enters. It orders threads only as acquire, release, reads and writes say.
class Guard {
 public:
  Guard() { scheduler.lock.lock(); }
  ~Guard() { scheduler.lock.unlock(); }

 private:
  Unwatched unwatched_;
};

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::_Exit(67);
}

// A number that only grows. A thread waits until it differs from a number it has seen.
class Phase {
 public:
  unsigned count() const { return count_.load(std::memory_order_relaxed); }

  // The caller is in a Guard.
  void advance() {
    scheduler.waiting -= waiting_;
    waiting_ = 0;
    count_.fetch_add(1);
    count_.notify_all();
  }
  void let_waiters_go_first() {}
  // The caller is in a Guard, which is open during the wait.
  void wait(unsigned seen, Wanted wanted) {
    if (count() != seen) return;
    scheduler.wanted[threadIdx.x] = wanted;
    ++waiting_;
    ++scheduler.waiting;
    deliver_if_all_wait();
    while (count() == seen) {
      scheduler.lock.unlock();
      count_.wait(seen);
      scheduler.lock.lock();
    }
    scheduler.wanted[threadIdx.x] = {};
  }
  static void deliver_if_all_wait() {
    while (scheduler.live && scheduler.waiting == scheduler.live) {
      if (!deliver_one_copy()) fail(deadlock(scheduler.wanted));
    }
  }

 private:
  std::atomic<unsigned> count_{0};
  unsigned waiting_ = 0;
};

template <class Body>
void run_threads(unsigned count, const Body& body) {
  scheduler.wanted.assign(count, {});
  scheduler.live = count;
  scheduler.waiting = 0;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < count; ++t) {
    threads.emplace_back([&body, t, count] {
      threadIdx.x = t;
      blockDim.x = count;
      body();
      const Guard guard;
      --scheduler.live;
      Phase::deliver_if_all_wait();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace flowseg::host

#else

#include <ucontext.h>

#include <cstddef>

inline Index threadIdx, blockIdx, blockDim, gridDim;  // threadIdx is the fiber that runs

namespace flowseg::host {

inline void acquire(uint64_t&) {}
inline void release(uint64_t&) {}
inline void reads(const void*, size_t) {}
inline void writes(const void*, size_t) {}

struct Unwatched {
  Unwatched() {}
};
using Guard = Unwatched;

class Phase {
 public:
  unsigned count() const { return count_; }
  void advance() { ++count_; }
  void wait(unsigned seen, Wanted wanted);
  void let_waiters_go_first() const;

 private:
  unsigned count_ = 0;
};

struct Fibers {
  static constexpr size_t kStackBytes = size_t{256} << 10;

  struct Wait {
    const Phase* phase = nullptr;  // null: it can run
    unsigned seen = 0;
    bool over() const { return !phase || phase->count() != seen; }
  };

  ucontext_t caller;
  std::vector<ucontext_t> contexts;
  std::vector<bool> finished;
  std::vector<Wait> waits;
  std::vector<Wanted> wanted;
  std::unique_ptr<char[]> stacks;
  std::function<void()> body;
  unsigned count = 0, left = 0;
  bool in_reverse = false;
  unsigned blocks = 0;

  // Slow warps have the same bit in their number: one of four bits, set or not.
  bool is_slow(unsigned t) const { return (t / 32 >> blocks / 2 % 4 & 1) == blocks % 2; }

  // Lets the next fiber run that can. May return at once.
  void yield() {
    unsigned other = threadIdx.x, slow = count;
    for (unsigned tried = 1;; ++tried) {
      other = in_reverse ? (other ? other : count) - 1 : other + 1 == count ? 0 : other + 1;
      if (!finished[other] && waits[other].over()) {
        if (!is_slow(other)) return go_to(other);
        if (slow == count) slow = other;
      }
      if (tried < count) continue;
      if (slow < count) return go_to(slow);
      if (!deliver_one_copy()) fail(deadlock(wanted));
      tried = 0;
    }
  }

  void go_to(unsigned other) {
    const unsigned own = threadIdx.x;
    waits[other].phase = nullptr;
    if (other == own) return;
    threadIdx.x = other;
    swapcontext(&contexts[own], &contexts[other]);
  }

  void run() {
    body();
    finished[threadIdx.x] = true;
    wanted[threadIdx.x] = {};
    if (--left == 0) setcontext(&caller);
    yield();
  }
};
inline Fibers fibers;
inline void change_turns() {
  fibers.in_reverse = !fibers.in_reverse;
  ++fibers.blocks;
}

// Abandons all fibers: the launch returns.
[[noreturn]] inline void fail(const std::string& message) {
  failure = message;
  setcontext(&fibers.caller);
  std::abort();
}

inline void Phase::wait(unsigned seen, Wanted wanted) {
  if (count_ != seen) return;
  fibers.waits[threadIdx.x] = {this, seen};
  fibers.wanted[threadIdx.x] = wanted;
  fibers.yield();
  fibers.wanted[threadIdx.x] = {};
}

inline void Phase::let_waiters_go_first() const {
  for (unsigned t = 0; t < fibers.count; ++t) {
    if (!fibers.finished[t] && fibers.waits[t].phase == this && fibers.waits[t].over()) return fibers.go_to(t);
  }
}

template <class Body>
void run_threads(unsigned count, const Body& body) {
  if (count > fibers.contexts.size()) {
    fibers.contexts.resize(count);
    fibers.stacks.reset(new char[count * Fibers::kStackBytes]);
  }
  fibers.body = std::cref(body);
  fibers.count = fibers.left = count;
  fibers.finished.assign(count, false);
  fibers.waits.assign(count, {});
  fibers.wanted.assign(count, {});
  blockDim.x = count;
  for (unsigned t = 0; t < count; ++t) {
    ucontext_t& context = fibers.contexts[t];
    getcontext(&context);
    context.uc_stack.ss_sp = fibers.stacks.get() + t * Fibers::kStackBytes;
    context.uc_stack.ss_size = Fibers::kStackBytes;
    makecontext(&context, [] { fibers.run(); }, 0);
  }
  threadIdx.x = fibers.in_reverse ? count - 1 : 0;
  swapcontext(&fibers.caller, &fibers.contexts[threadIdx.x]);
}

}  // namespace flowseg::host

#endif

namespace flowseg::host {

// A barrier of `expected` threads, used again and again.
class ThreadBarrier {
 public:
  ThreadBarrier(unsigned expected, std::string name) : expected_(expected), name_(std::move(name)) {}

  // The last thread to arrive calls last() before the others go on. Only if `orders`, the barrier orders the threads' accesses.
  template <class Last>
  void arrive_and_wait(bool orders, Last last) {
    const unsigned seen = current_phase();
    if (orders) release(keys_[seen % 2]);
    {
      const Guard guard;
      if (++arrived_ == expected_) {
        last();
        arrived_ = 0;
        phase_.advance();
      } else {
        phase_.wait(seen, {describe, this});
      }
    }
    if (orders) acquire(keys_[seen % 2]);
  }
  void arrive_and_wait(bool orders = true) {
    arrive_and_wait(orders, [] {});
  }
  unsigned expected() const { return expected_; }

 private:
  unsigned current_phase() const {
    const Unwatched unwatched;
    return phase_.count();
  }
  static std::string describe(const void* about) {
    const auto& own = *static_cast<const ThreadBarrier*>(about);
    return own.name_ + ": " + std::to_string(own.arrived_) + " of " + std::to_string(own.expected_) + " threads have come";
  }

  unsigned expected_, arrived_ = 0;
  std::string name_;
  Phase phase_;
  uint64_t keys_[2] = {};
};

}  // namespace flowseg::host
