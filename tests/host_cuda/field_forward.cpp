// The neural field's forward kernel by itself, on the host, for tests/flowseg_kernels/cuda/test_field_forward.py.
#include "field_launch.h"

using namespace flowseg;
using namespace flowseg::cuda;

extern "C" {

// The parts of FieldParams that the kernel reads, and more.
struct ForwardCall {
  void *x, *weights, *embed, *gains, *out_gain, *out_weight, *out_bias, *out, *states, *later_states, *grad_weights;
  float *table, *inverse_lengths, *inverse_rms;
  int64_t hidden, inner, p, freqs, depth, columns, per_image, batch, channels, stride[4], first, count;
  int64_t both, residual, keep, aliased, is_half, multiprocessors;
  double eps;
};

// Returns what was wrong, or null.
const char* field_forward_blocks(const ForwardCall& call) {
  const Real type = call.is_half ? Real::f16 : Real::bf16;
  const int64_t width = call.columns * call.p, height = call.per_image / call.columns * call.p;
  Image x{call.x, type, call.batch, call.channels, height, width, {}};
  std::copy(call.stride, call.stride + 4, x.stride);
  const FieldShared shared{call.embed, nullptr, call.gains, call.out_gain, call.out_weight, call.out_bias};
  const FieldOptions options{call.p, call.inner / call.hidden, call.eps, call.both != 0, call.residual != 0};
  FieldParams f = field_params(x, call.weights, call.depth, shared, call.hidden, call.channels + call.freqs * call.freqs, options);
  f.out = call.out;
  f.grad_weights = call.grad_weights;
  f.states = static_cast<char*>(call.states);
  f.later_states = static_cast<char*>(call.later_states);
  f.table = call.table;
  f.inverse_lengths = call.inverse_lengths;
  f.inverse_rms = call.inverse_rms;
  f.first = call.first;
  f.count = call.count;
  f.aliased = call.aliased;
  const host::FieldLaunch launch{call.multiprocessors};
  make_maps(f, call.weights, f.w1, f.w2, launch);
  call.keep ? launch_forward<true>(f, type, launch) : launch_forward<false>(f, type, launch);
  return host::take_failure();
}

}  // extern "C"
