// The neural field's backward of the blocks by itself, on the host, for tests/flowseg_kernels/cuda/test_field_backward.py.
#include "field_launch.h"

using namespace flowseg;
using namespace flowseg::cuda;

extern "C" {

// The parts of FieldParams that the blocks' backward reads, and more.
struct BackwardCall {
  void *weights, *gains, *grad_weights, *states, *later_states;
  float *inverse_lengths, *inverse_rms, *along2, *dn_sums, *gain_sums;
  int64_t hidden, inner, p, depth, patches, first, count, both, residual, aliased, is_half, multiprocessors;
};

// Returns what was wrong, or null.
const char* field_backward_blocks(const BackwardCall& call) {
  FieldParams f{};
  f.weights = call.weights;
  f.gains = call.gains;
  f.grad_weights = call.grad_weights;
  f.states = static_cast<char*>(call.states);
  f.later_states = static_cast<char*>(call.later_states);
  f.inverse_lengths = call.inverse_lengths;
  f.inverse_rms = call.inverse_rms;
  f.along2 = call.along2;
  f.dn_sums = call.dn_sums;
  f.gain_sums = call.gain_sums;
  f.hidden = static_cast<int>(call.hidden);
  f.inner = static_cast<int>(call.inner);
  f.p = static_cast<int>(call.p);
  f.depth = static_cast<int>(call.depth);
  f.patches = call.patches;
  f.first = call.first;
  f.count = call.count;
  f.both = call.both;
  f.residual = call.residual;
  f.aliased = call.aliased;
  const host::FieldLaunch launch{call.multiprocessors};
  make_maps(f, call.weights, f.w1, f.w2, launch);
  make_maps(f, call.grad_weights, f.grad_w1, f.grad_w2, launch);
  launch_backward_blocks(f, call.is_half ? Real::f16 : Real::bf16, launch);
  return host::take_failure();
}

}  // extern "C"
