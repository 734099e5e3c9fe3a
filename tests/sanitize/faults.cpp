// Linked into the library that a sanitizer checks. With FLOWSEG_OWN_THREADS the parallel loops run on plain threads: ThreadSanitizer
// does not know the barriers of OpenMP, and would report races between accesses that they order.
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/launch.h"

#if defined(FLOWSEG_OWN_THREADS)
extern "C" {

// The functions that torch::stable::parallel_for and get_num_threads call. The linker flag -Bsymbolic prefers them to libtorch's.
AOTITorchError torch_get_num_threads(uint32_t* threads) {
  *threads = 3;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc body, void* context) {
  const int64_t count = end - begin, parts = count < 3 ? count : 3;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < parts; ++i) {
    threads.emplace_back(body, begin + i * count / parts, begin + (i + 1) * count / parts, context);
  }
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
#endif

// Makes a real kernel do something that the named sanitizer must find: read an image that is one pixel wider than its memory, read
// labels at an odd address, or compute the same chunk in two threads.
extern "C" __attribute__((visibility("default"))) int flowseg_planted_fault(const char* name) {
  using namespace flowseg;
  using namespace flowseg::cpu;
  constexpr int64_t kWidth = 17;
  const bool wide = !std::strcmp(name, "address"), odd = !std::strcmp(name, "undefined"), twice = !std::strcmp(name, "thread");
  const int64_t have = wide ? kWidth - 1 : kWidth;
  std::vector<float> source(3 * have), out(3 * kWidth), mu(6);
  std::vector<int32_t> labels(kWidth + 1);
  const double time = 0.5;
  int64_t first_bad = INT64_MAX;
  const char* at = reinterpret_cast<const char*>(labels.data()) + odd;
  const Interpolate a{
      .source = {source.data(), Real::f32, 1, 3, 1, kWidth, {3 * have, have, have, 1}},
      .labels = {{at, Integer::i32, {kWidth, kWidth, 1}, 255}, &first_bad},
      .times = &time,
      .codes = {.data = mu.data(), .classes = 2, .padded = 3, .max_abs = 1.0},
      .out = {.data = out.data(), .type = Real::f32},
  };
  with_kernels([&](auto kernels) {
    torch::stable::parallel_for(0, twice ? 2 : 1, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernels.interpolate(a, 0);
    });
  });
  return wide || odd || twice;
}
