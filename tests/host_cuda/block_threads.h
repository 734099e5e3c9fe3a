// The threads of a CUDA block on the host: run_threads(count, body) calls body() once per thread, concurrently, with threadIdx.x
// from 0 to count - 1. Threads wait for each other at a Barrier.
//
// They are operating-system threads if a sanitizer watches them. Otherwise they are fibers that take turns in
// one thread: a barrier then takes microseconds. A fiber runs until it waits at a barrier; the last fiber to arrive goes on first.
// The fibers of every other block take turns in reverse order. If a barrier is missing, either order lets some fiber read before
// the fiber that should have written, so a launch of two blocks shows the fault in every run.
#pragma once

struct Index {
  unsigned x;
};

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)

#include <barrier>
#include <thread>
#include <vector>

inline thread_local Index threadIdx, blockIdx, gridDim;

namespace flowseg::host {

using Barrier = std::barrier<>;

template <class Body>
void run_threads(unsigned count, const Body& body) {
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < count; ++t) {
    threads.emplace_back([&body, t] {
      threadIdx.x = t;
      body();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace flowseg::host

#else

#include <ucontext.h>

#include <cstddef>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

inline Index threadIdx, blockIdx, gridDim;  // threadIdx is the fiber that runs

namespace flowseg::host {

struct Fibers {
  static constexpr size_t kStackBytes = size_t{256} << 10;

  ucontext_t caller;
  std::vector<ucontext_t> contexts;
  std::vector<bool> finished;
  std::unique_ptr<char[]> stacks;
  std::function<void()> body;
  unsigned count = 0, left = 0;
  bool in_reverse = false;

  // Lets the next unfinished fiber run.
  void yield() {
    const unsigned own = threadIdx.x;
    unsigned other = own;
    do {
      other = (other + (in_reverse ? count - 1 : 1)) % count;
    } while (finished[other]);
    if (other == own) std::abort();  // a deadlock: all other fibers have finished
    threadIdx.x = other;
    swapcontext(&contexts[own], &contexts[other]);
  }

  void run() {
    body();
    finished[threadIdx.x] = true;
    if (--left == 0) setcontext(&caller);
    yield();
  }
};
inline Fibers fibers;

class Barrier {
 public:
  explicit Barrier(unsigned expected) : expected_(expected) {}

  void arrive_and_wait() {
    const unsigned phase = phase_;
    if (++arrived_ == expected_) {
      arrived_ = 0;
      ++phase_;
    }
    while (phase == phase_) fibers.yield();
  }

 private:
  unsigned expected_, arrived_ = 0, phase_ = 0;
};

template <class Body>
void run_threads(unsigned count, const Body& body) {
  if (count > fibers.contexts.size()) {
    fibers.contexts.resize(count);
    fibers.stacks.reset(new char[count * Fibers::kStackBytes]);
  }
  fibers.body = std::cref(body);
  fibers.count = fibers.left = count;
  fibers.finished.assign(count, false);
  for (unsigned t = 0; t < count; ++t) {
    ucontext_t& context = fibers.contexts[t];
    getcontext(&context);
    context.uc_stack.ss_sp = fibers.stacks.get() + t * Fibers::kStackBytes;
    context.uc_stack.ss_size = Fibers::kStackBytes;
    makecontext(&context, [] { fibers.run(); }, 0);
  }
  fibers.in_reverse = !fibers.in_reverse;
  threadIdx.x = fibers.in_reverse ? count - 1 : 0;
  swapcontext(&fibers.caller, &fibers.contexts[threadIdx.x]);
}

}  // namespace flowseg::host

#endif
