// Throughput of a CPU's arithmetic units on its widest vectors: fused multiply-adds per second, and pairs of a pixel and a class per
// second of the distance-aware correction's arithmetic, without the loop around it.
#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#define BYTES 64
#elif defined(__AVX2__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float V __attribute__((vector_size(BYTES)));

// Hides the value of v from the compiler without an instruction, so nothing is precomputed or kept.
#if defined(__x86_64__) || defined(__i386__)
#define FORGET(v) asm volatile("" : "+v"(v))
#else
#define FORGET(v) asm volatile("" : "+w"(v))
#endif

namespace {

struct MultiplyAdd {
  // Twelve independent chains hide the latency.
  static constexpr int kUnroll = 12;
  V chain[kUnroll], factor;

  MultiplyAdd() {
    for (int i = 0; i < kUnroll; ++i) chain[i] = V{} + (1.0f + static_cast<float>(i));
    factor = V{} + 0.5f;
    FORGET(factor);
  }
  void step(int i) { chain[i] = chain[i] * factor + factor; }
  V sum() const {
    V all{};
    for (const V& v : chain) all += v;
    return all;
  }
};

struct Divide {
  static V reciprocal(V v) { return 1.0f / v; }
};

#if defined(__AVX512F__)
struct Newton {
  static V reciprocal(V v) {
    const V estimate = (V)_mm512_rcp14_ps((__m512)v);
    return estimate + estimate * (1.0f - v * estimate);
  }
};
#endif

// The arithmetic that every direct algorithm needs: sum_k r_k and sum_k r_k^2 (x - mu_k) with r_k = 1 / (|x - mu_k|^2 + eps). All
// operands stay in registers: no loads, no pixel loop, no class loop, no special case for the pixel's own class. kTwice: subtract
// again for the sums. That takes fewer registers, and is faster where the differences of 16 channels would spill.
template <int C, class Division, bool kTwice>
struct Pair {
  static constexpr int kUnroll = 8;
  // Partial sums of the distance, as in the kernels: one sum of 16 channels is a chain that takes longer than the arithmetic.
  static constexpr int kParts = C <= 4 ? 1 : C / 4;
  V x = V{} + 0.2f, mu{}, eps = V{} + 1e-3f, pull[C]{}, weight{};

  void step(int) {
    V diff[C], part[kParts]{};
    part[0] = eps;
    for (int c = 0; c < C; ++c) {
      FORGET(mu);
      diff[c] = x - mu;
      part[c % kParts] += diff[c] * diff[c];
    }
    for (int i = 1; i < kParts; ++i) part[0] += part[i];
    const V r = Division::reciprocal(part[0]), square = r * r;
    weight += r;
    for (int c = 0; c < C; ++c) {
      if (kTwice) {
        FORGET(mu);
        diff[c] = x - mu;
      }
      pull[c] += square * diff[c];
    }
  }
  V sum() const {
    V all = weight;
    for (const V& v : pull) all += v;
    return all;
  }
};

template <class Work>
float spin(long rounds) {
  Work work;
  for (long r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < Work::kUnroll; ++i) work.step(i);
  }
  return work.sum()[0];
}

// Steps per second, summed over threads and SIMD lanes; the best of five attempts.
template <class Work>
double rate(int threads, long rounds) {
  double best = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    std::vector<std::thread> team;
    std::vector<float> results(threads);
    const auto begin = std::chrono::steady_clock::now();
    for (int t = 0; t < threads; ++t) team.emplace_back([&, t] { results[t] = spin<Work>(rounds); });
    for (auto& thread : team) thread.join();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    volatile float keep = results[0];
    (void)keep;
    const double done = static_cast<double>(threads) * rounds * Work::kUnroll * (BYTES / 4) / took.count();
    if (done > best) best = done;
  }
  return best;
}

// Uses the form and the reciprocal that are faster on this CPU.
template <int C, class Division>
double pair_rate_by(int threads, long rounds) {
  const double once = rate<Pair<C, Division, false>>(threads, rounds);
  return C > 8 ? std::max(once, rate<Pair<C, Division, true>>(threads, rounds)) : once;
}
template <int C>
double pair_rate(int threads, long rounds) {
  const double divided = pair_rate_by<C, Divide>(threads, rounds);
#if defined(__AVX512F__)
  return std::max(divided, pair_rate_by<C, Newton>(threads, rounds));
#else
  return divided;
#endif
}

}  // namespace

extern "C" double fused_multiply_adds(int threads, long rounds) { return rate<MultiplyAdd>(threads, rounds); }

// Pairs of a pixel and a class per second; 0 for a number of channels without an instance.
extern "C" double pairs(int channels, int threads, long rounds) {
  switch (channels) {
    case 2: return pair_rate<2>(threads, rounds);
    case 3: return pair_rate<3>(threads, rounds);
    case 4: return pair_rate<4>(threads, rounds);
    case 8: return pair_rate<8>(threads, rounds);
    case 16: return pair_rate<16>(threads, rounds);
  }
  return 0;
}
