// Times variants of flow_interpolate against the library's kernel, and compares every result with it bit by bit.
//
// 512 x 512 pixels, 16 images, K = 150, 8-bit labels. The library's kernel loads, computes and stores one channel after the other,
// for any number of channels. The variants have the channels and the dtype at compile time, one block per tile, and issue all loads
// before the first store.
#include "common.h"
#include "cuda/flow_interpolate.cuh"

using namespace flowseg;
using namespace flowseg::cuda;

template <class S, int C, int P>
__global__ void __launch_bounds__(kThreads) loads_first(const InterpolateParams a) {
  const PixelRun run = run_of_block<P>(a.out.pixels, a.blocks_per_image);
  const float t = static_cast<float>(time_of(a.times, run.image));
  const Offsets<P> offsets = offsets_of<P>(run, a.source);
  float x[C][P];
  int y[P];
  load_labels(a.labels, a.codes.classes, run, y);
#pragma unroll
  for (int c = 0; c < C; ++c) load_plane_as<S>(a.source, c, run, offsets, x[c]);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    float code[P];
    load_code(a.codes, y, c, code);
#pragma unroll
    for (int p = 0; p < P; ++p) x[c][p] = y[p] >= 0 ? (1 - t) * x[c][p] + t * code[p] : x[c][p];
    store_plane_as<S>(a.out, c, run, x[c]);
  }
}

constexpr int64_t kBatch = 16, kSide = 512, kPixels = kSide * kSide, kClasses = 150;

// Median and best time of 20 graphs of 50 calls each.
template <class Kernel>
void time_kernel(const std::string& name, Kernel kernel, InterpolateParams a, int pixels_per_thread, const void* want,
                 int64_t bytes) {
  const int64_t blocks = blocks_per_image(kPixels, pixels_per_thread);
  a.blocks_per_image = static_cast<unsigned>(blocks);
  CK(cudaMemset(a.out.data, 0xff, bytes));
  cudaStream_t stream;
  CK(cudaStreamCreate(&stream));
  CK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < 50; ++i) kernel<<<static_cast<unsigned>(blocks * kBatch), kThreads, 0, stream>>>(a);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CK(cudaStreamEndCapture(stream, &graph));
  CK(cudaGraphInstantiate(&exec, graph, 0));
  double best = 0;
  const double median = Timer().median([&] { CK(cudaGraphLaunch(exec, nullptr)); }, 20, &best);
  std::vector<char> got(bytes), wanted(bytes);
  CK(cudaMemcpy(got.data(), a.out.data, bytes, cudaMemcpyDeviceToHost));
  CK(cudaMemcpy(wanted.data(), want, bytes, cudaMemcpyDeviceToHost));
  cudaFuncAttributes used;
  CK(cudaFuncGetAttributes(&used, kernel));
  J("time", name).f("ms", median * 1e3 / 50).f("best_ms", best * 1e3 / 50).f("registers", used.numRegs).b("equal", got == wanted);
}

template <class S, int C>
void compare(const char* dtype, Real type) {
  const int64_t count = kBatch * C * kPixels, bytes = count * sizeof(S);
  std::vector<S> source(count);
  for (int64_t i = 0; i < count; ++i) narrow(noise(static_cast<uint32_t>(i), 1), source[i]);
  std::vector<uint8_t> labels(kBatch * kPixels);
  for (size_t i = 0; i < labels.size(); ++i) {
    labels[i] = static_cast<uint8_t>(hash32(static_cast<uint32_t>(i / kSide / 32 * 16 + i % kSide / 32)) % kClasses);  // squares
  }
  std::vector<float> codes(kClasses * C), times(kBatch, 0.25f);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = noise(static_cast<uint32_t>(i), 2);
  void *want, *out;
  CK(cudaMalloc(&want, bytes));
  CK(cudaMalloc(&out, bytes));
  const Image image{.data = up(source), .type = type, .batch = kBatch, .channels = C, .height = kSide, .width = kSide,
                    .stride = {C * kPixels, kPixels, kSide, 1}};
  const LabelMap map{.data = up(labels), .type = Integer::u8, .stride = {kPixels, kSide, 1}, .ignore = 255};
  InterpolateParams a{.source = input_image(image),
                      .labels = input_labels(map, kBatch, kSide, kSide),
                      .times = {.data = up(times), .type = Real::f32, .stride = 1},
                      .codes = {.data = up(codes), .classes = kClasses, .channels = C},
                      .out = output_image({want, type}, C, kPixels)};
  const std::string name = std::string(dtype) + " C=" + std::to_string(C);
  time_kernel(name + " library", interpolate<float>, a, kInterpolatePixels, want, bytes);
  a.out.data = out;
  time_kernel(name + " loads first, 4 pixels", loads_first<S, C, 4>, a, 4, want, bytes);
  time_kernel(name + " loads first, 8 pixels", loads_first<S, C, 8>, a, 8, want, bytes);
}

int main() {
  g_program = "interpolate";
  compare<float, 3>("fp32", Real::f32);
  compare<BFloat, 3>("bf16", Real::bf16);
  compare<float, 8>("fp32", Real::f32);
  compare<BFloat, 8>("bf16", Real::bf16);
}
