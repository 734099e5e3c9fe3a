// What the arithmetic of one CPU gives: fused multiply-adds and divisions a second on its widest vectors, over a number of threads.
#include <chrono>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX2__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float V __attribute__((vector_size(BYTES)));

namespace {

// Twelve independent chains hide the latency of either operation.
constexpr int kChains = 12;

template <bool kDivide>
float spin(long rounds, float by) {
  V chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = V{} + (1.0f + static_cast<float>(i));
  const V factor = V{} + by;
  for (long r = 0; r < rounds; ++r) {
    for (int i = 0; i < kChains; ++i) chain[i] = kDivide ? factor / chain[i] : chain[i] * factor + factor;
  }
  V sum{};
  for (int i = 0; i < kChains; ++i) sum += chain[i];
  return sum[0];
}

template <bool kDivide>
double rate(int threads, long rounds) {
  double best = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    std::vector<std::thread> team;
    std::vector<float> results(threads);
    volatile float by = 0.5f;  // unknown to the compiler, which would work some chains out beforehand
    const float factor = by;
    const auto begin = std::chrono::steady_clock::now();
    for (int t = 0; t < threads; ++t) team.emplace_back([&, t] { results[t] = spin<kDivide>(rounds, factor); });
    for (auto& thread : team) thread.join();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    volatile float keep = results[0];
    (void)keep;
    const double done = static_cast<double>(threads) * rounds * kChains * (BYTES / 4) / took.count();
    if (done > best) best = done;
  }
  return best;
}

}  // namespace

// Elements a second: a fused multiply-add is one, as is a division.
extern "C" double fused_multiply_adds(int threads) { return rate<false>(threads, 4000000); }
extern "C" double divisions(int threads) { return rate<true>(threads, 400000); }
