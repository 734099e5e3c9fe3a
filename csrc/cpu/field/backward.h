// The backward of the neural field for one patch; the derivation is in docs/ops/neural_field.md.
//
// The forward stores nothing, so the backward first runs the layers again and keeps the states h, the pre-activations z and
// 1 / rms(h) of all blocks. Then it goes back through the output layer, the blocks and the embedding. In a block, per panel:
//   1. du = G W2^T; the epilogue of the product computes dz = du silu'(z);
//   2. dq = dz W1^T, then through the gain and the norm to the gradient of the state, which replaces G;
//   3. dW2 += silu(z)^T G and dW1 += q^T dz, as products over kGroup pixels. Steps 1 and 2 write the operands of these products to
//      silu_rows, preactivation_grad_rows, normed_lanes and scaled_lanes.
// W1 and W2 are the normalised weights here: column lengths are factors of rows of activations. store_weights turns the gradient of
// a normalised column into that of the generated column.
// Gradients of shared parameters are sums over patches. They are kept per vector lane and added across lanes at the end (finish).
#pragma once

#include "cpu/field/layers.h"

namespace flowseg::cpu {
namespace {

template <class S>
void narrow_all(const float* FLOWSEG_RESTRICT from, int64_t count, void* to) {
  S* FLOWSEG_RESTRICT values = static_cast<S*>(to);
  for (int64_t i = 0; i < count; ++i) narrow(from[i], values[i]);
}

inline float sum_lanes(const float* p) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += p[i];
  return sum;
}

FLOWSEG_INLINE void add_to(float* p, F v) { store(p, load(p) + v); }

template <class P>
struct Backward {
  using Unit = typename P::Unit;
  static constexpr int64_t kUnits = kPanel / P::features;  // units of pixels per panel
  static constexpr int64_t kRow = kGroup / P::features;    // units of pixels per group
  const FieldBackward& b;
  const Field& a;
  Layers<P> layers;
  const int64_t step;  // Hx padded to whole vectors
  float *grad_out, *grad_pixels;  // gradients of the output and of the input: (C, padded)
  float* g;                       // gradient of the state: (panels, Hx, kPanel)
  float* grad_normed;             // gradient of a panel's normalised state: (Hx, kPanel)
  float *column_sums, *transposed;
  float *grad_w1, *grad_w2;       // gradients of the normalised W1, transposed, and of W2: (inner, step)
  Unit *scaled, *preactivation_grad;  // operands of the products over features: (Hx, kPanel), (inner, kPanel)
  Unit *scaled_rows, *normed_rows;
  // Operands of the products over pixels: features as rows (inner, kRow), and features in the lanes (kRow, step).
  Unit *silu_rows, *preactivation_grad_rows, *normed_lanes, *scaled_lanes;
  // Sums over patches. All but by_position have kLanes partial sums per number.
  float *by_position, *embed, *gains, *out_gain, *out_weight, *out_bias;
  int64_t sums_size;
  float* sums_begin;

  Backward(const FieldBackward& backward, Arena& arena)
      : b(backward), a(backward.field), layers(a, true, arena), step((a.hidden + kLanes - 1) / kLanes * kLanes) {
    const int64_t channels = a.x.channels;
    grad_out = arena.take(channels * a.padded);
    grad_pixels = arena.take(channels * a.padded);
    g = arena.take(layers.panels * a.hidden * kPanel);
    grad_normed = arena.take(a.hidden * kPanel);
    column_sums = arena.take(a.inner);
    transposed = arena.take(a.hidden * a.inner);
    grad_w1 = arena.take(a.inner * step);
    grad_w2 = arena.take(a.inner * step);
    const auto units = [&](int64_t count) { return reinterpret_cast<Unit*>(arena.take(count)); };
    scaled = units(a.hidden * kPanel);
    preactivation_grad = units(a.inner * kPanel);
    scaled_rows = units(a.hidden * kUnits);
    normed_rows = units(a.hidden * kUnits);
    silu_rows = units(a.inner * kRow);
    preactivation_grad_rows = units(a.inner * kRow);
    normed_lanes = units(kRow * step);
    scaled_lanes = units(kRow * step);
    by_position = arena.take(a.hidden * a.padded);
    embed = arena.take(a.hidden * channels * kLanes);
    gains = arena.take(a.depth * a.hidden * kLanes);
    out_gain = arena.take(a.hidden * kLanes);
    out_weight = arena.take(channels * a.hidden * kLanes);
    out_bias = arena.take(channels * kLanes);
    sums_begin = by_position;
    sums_size = arena.take(0) - by_position;
  }

  void clear() {
    for (int64_t i = 0; i < sums_size; ++i) sums_begin[i] = 0;
    // Lanes past Hx take part in products with unused results; uninitialised numbers there could be subnormal, hence slow.
    for (int64_t i = 0; i < kRow * step; ++i) normed_lanes[i] = scaled_lanes[i] = 0;
  }

  void finish(float* sums) const {
    const FieldSums at(a.hidden, a.x.channels, a.depth, a.padded);
    for (int64_t i = 0; i < a.hidden * a.padded; ++i) sums[at.position + i] = by_position[i];
    const auto fold = [&](const float* lanes, int64_t count, float* to) {
      for (int64_t i = 0; i < count; ++i) to[i] = sum_lanes(lanes + i * kLanes);
    };
    fold(embed, a.hidden * a.x.channels, sums + at.embed);
    fold(gains, a.depth * a.hidden, sums + at.gains);
    fold(out_gain, a.hidden, sums + at.out_gain);
    fold(out_weight, a.x.channels * a.hidden, sums + at.out_weight);
    fold(out_bias, a.x.channels, sums + at.out_bias);
  }

  // Returns the gradient of h from `grad`, the gradient of n = h * scale. product: the sum of grad * n over the features.
  FLOWSEG_INLINE F norm_backward(F grad, F n, F product, F scale) const {
    return scale * (grad - n * (product / static_cast<float>(a.hidden)));
  }

  // Output layer: sums its gradients and writes the gradient of h_L.
  void project_backward(int64_t panel) {
    const int64_t channels = a.x.channels;
    const float* from = layers.state(a.depth, panel);
    float* to = g + panel * a.hidden * kPanel;
    const float* grad = grad_out + panel * kPanel;
    F scale[2], product[2] = {};
    layers.reciprocal_rms(from, scale);
    for (int64_t c = 0; c < channels; ++c) {
      add_to(out_bias + c * kLanes, load(grad + c * a.padded) + load(grad + c * a.padded + kLanes));
    }
    for (int64_t i = 0; i < a.hidden; ++i) {
      F n[2], sum[2] = {};
      const float gain = a.residual ? a.out_gain[i] : 1.0f;
      for (int v = 0; v < 2; ++v) n[v] = load(from + i * kPanel + v * kLanes) * scale[v];
      for (int64_t c = 0; c < channels; ++c) {
        const F low = load(grad + c * a.padded), high = load(grad + c * a.padded + kLanes);
        add_to(out_weight + (c * a.hidden + i) * kLanes, (low * n[0] + high * n[1]) * gain);
        sum[0] += a.out_weight[c * a.hidden + i] * low;
        sum[1] += a.out_weight[c * a.hidden + i] * high;
      }
      if (a.residual) add_to(out_gain + i * kLanes, sum[0] * n[0] + sum[1] * n[1]);
      for (int v = 0; v < 2; ++v) {
        sum[v] *= gain;
        product[v] += sum[v] * n[v];
        store(to + i * kPanel + v * kLanes, sum[v]);
      }
    }
    if (!a.residual) return;
    for (int64_t i = 0; i < a.hidden; ++i) {
      for (int v = 0; v < 2; ++v) {
        const int64_t offset = i * kPanel + v * kLanes;
        store(to + offset, norm_backward(load(to + offset), load(from + offset) * scale[v], product[v], scale[v]));
      }
    }
  }

  // The weights of a block row by row, as the broadcast operands of products with W1^T and W2^T.
  struct RowOperand {
    const Unit *w1, *w2;
  };
  RowOperand row_operand(const PatchPosition& at, int64_t block) {
    if constexpr (P::features == 1) {
      const float* w1 = read_weights(a, at, block, layers.copy);
      return {w1, w1 + a.hidden * a.inner};
    } else {
      // The pairs of a row are as in memory. The copy aligns them: a caller's weights may start at an odd element.
      const char* from = static_cast<const char*>(block_weights(a, at, block));
      Unit* to = reinterpret_cast<Unit*>(layers.copy);
      std::memcpy(to, from, 4 * a.hidden * a.inner);
      return {to, to + a.hidden * a.inner / 2};
    }
  }

  // One block for one panel, the panel number in_group of its group.
  void block_backward(int64_t block, int64_t panel, int64_t in_group, const RowOperand& w) {
    const float* from = layers.state(block, panel);
    float* grad = g + panel * a.hidden * kPanel;
    const float* scale1 = layers.scale1 + block * a.inner;
    const float* scale2 = layers.scale2 + block * a.hidden;
    const float* gain = a.residual ? a.gains + block * a.hidden : nullptr;
    const float* inverse_rms = layers.inverse_rms + block * a.padded + panel * kPanel;
    const F scale[2] = {load(inverse_rms), load(inverse_rms + kLanes)};
    const bool weights = b.grad_weights.data != nullptr;

    for (int64_t i = 0; i < a.hidden; i += P::features) {
      F v[P::features][2];
      for (int r = 0; r < P::features; ++r) {
        for (int j = 0; j < 2; ++j) v[r][j] = load(grad + (i + r) * kPanel + j * kLanes) * scale2[i + r];
      }
      store_activations<P>(scaled, kPanel, i, v);
      if constexpr (P::features == 2) {
        for (int r = 0; r < 2; ++r) P::store_pixels(scaled_rows + (i + r) * kUnits, v[r][0], v[r][1]);
      }
    }
    if (weights) {
      for (int64_t i = 0; i < a.hidden; ++i) {
        F q[2];
        for (int v = 0; v < 2; ++v) q[v] = load(from + i * kPanel + v * kLanes) * scale[v] * (gain ? gain[i] : 1.0f);
        if constexpr (P::features == 1) {
          store(normed_rows + i * kUnits, q[0]);
          store(normed_rows + i * kUnits + kLanes, q[1]);
        } else {
          P::store_pixels(normed_rows + i * kUnits, q[0], q[1]);
        }
      }
      transpose(normed_rows, kUnits, a.hidden, kUnits, normed_lanes + in_group * kUnits * step, step);
      transpose(P::features == 1 ? scaled : scaled_rows, kUnits, a.hidden, kUnits, scaled_lanes + in_group * kUnits * step, step);
    }

    const float* preactivations = layers.preactivations(block, panel);
    multiply<P, false>(w.w2, a.hidden / P::features, scaled, kPanel, a.inner, a.hidden / P::features,
                       [&]<int R>(int64_t row, F (&sum)[R][2]) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        F silu[2];
        for (int v = 0; v < 2; ++v) {
          const F z = load(preactivations + (row + r) * kPanel + v * kLanes);
          const F s = sigmoid(z);
          silu[v] = z * s;
          sum[r][v] *= (s + silu[v] * (1.0f - s)) * scale1[row + r];
        }
        if (weights) {
          Unit* silu_to = silu_rows + (row + r) * kRow + in_group * kUnits;
          Unit* grad_to = preactivation_grad_rows + (row + r) * kRow + in_group * kUnits;
          if constexpr (P::features == 1) {
            for (int v = 0; v < 2; ++v) {
              store(silu_to + v * kLanes, silu[v]);
              store(grad_to + v * kLanes, sum[r][v]);
            }
          } else {
            P::store_pixels(silu_to, silu[0], silu[1]);
            P::store_pixels(grad_to, sum[r][0], sum[r][1]);
          }
        }
      }
      store_activations<P>(preactivation_grad, kPanel, row, sum);
    });

    F product[2] = {};
    multiply<P, false>(w.w1, a.inner / P::features, preactivation_grad, kPanel, a.hidden, a.inner / P::features,
                       [&]<int R>(int64_t row, F (&sum)[R][2]) {
      for (int r = 0; r < R; ++r) {
        const int64_t offset = (row + r) * kPanel;
        if (gain) {
          F by_gain{};
          for (int v = 0; v < 2; ++v) {
            const F n = load(from + offset + v * kLanes) * scale[v];
            by_gain += sum[r][v] * n;
            sum[r][v] *= gain[row + r];
            product[v] += sum[r][v] * n;
          }
          add_to(gains + (block * a.hidden + row + r) * kLanes, by_gain);
        }
        for (int v = 0; v < 2; ++v) store((gain ? grad_normed : grad) + offset + v * kLanes, sum[r][v]);
      }
    });
    if (!gain) return;
    for (int64_t i = 0; i < a.hidden; ++i) {
      for (int v = 0; v < 2; ++v) {
        const int64_t offset = i * kPanel + v * kLanes;
        add_to(grad + offset, norm_backward(load(grad_normed + offset), load(from + offset) * scale[v], product[v], scale[v]));
      }
    }
  }

  // grad -= w scale^2 columnsum(grad w): turns scale times the gradient of w * scale into the gradient of w.
  static void columns_backward(float* grad, int64_t grad_step, const float* w, int64_t rows, int64_t columns, const float* scale,
                               float* sums) {
    for (int64_t j = 0; j < columns; ++j) sums[j] = 0;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) sums[j] += grad[i * grad_step + j] * w[i * columns + j];
    }
    for (int64_t j = 0; j < columns; ++j) sums[j] *= scale[j] * scale[j];
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) grad[i * grad_step + j] -= w[i * columns + j] * sums[j];
    }
  }

  void store_weights(const PatchPosition& at, int64_t patch, int64_t block) {
    const float* w1 = read_weights(a, at, block, layers.copy);
    const float* w2 = w1 + a.hidden * a.inner;
    transpose(grad_w1, step, a.inner, a.hidden, transposed, a.inner);
    columns_backward(transposed, a.inner, w1, a.hidden, a.inner, layers.scale1 + block * a.inner, column_sums);
    if (a.both) columns_backward(grad_w2, step, w2, a.inner, a.hidden, layers.scale2 + block * a.hidden, column_sums);
    const int64_t half = a.hidden * a.inner, size = size_of(b.grad_weights.type);
    char* to = static_cast<char*>(b.grad_weights.data) + (patch * a.depth + block) * 2 * half * size;
    const auto put = [&](const float* from, int64_t count, int64_t offset) {
      char* at_offset = to + offset * size;
      switch (b.grad_weights.type) {
        case Real::f32: return narrow_all<float>(from, count, at_offset);
        case Real::f64: return narrow_all<double>(from, count, at_offset);
        case Real::f16: return narrow_all<Half>(from, count, at_offset);
        case Real::bf16: return narrow_all<BFloat>(from, count, at_offset);
      }
    };
    put(transposed, half, 0);
    for (int64_t j = 0; j < a.inner; ++j) put(grad_w2 + j * step, a.hidden, half + j * a.hidden);
  }

  // Embedding: sums its gradients and writes the gradient of the pixels.
  void embed_backward(int64_t panel) {
    const int64_t channels = a.x.channels;
    const float* grad = g + panel * a.hidden * kPanel;
    const float* x = layers.pixels + panel * kPanel;
    for (int64_t i = 0; i < a.hidden; ++i) {
      const F low = load(grad + i * kPanel), high = load(grad + i * kPanel + kLanes);
      float* offset = by_position + i * a.padded + panel * kPanel;
      add_to(offset, low);
      add_to(offset + kLanes, high);
      for (int64_t c = 0; c < channels; ++c) {
        add_to(embed + (i * channels + c) * kLanes, low * load(x + c * a.padded) + high * load(x + c * a.padded + kLanes));
      }
    }
    if (!b.grad_x.data) return;
    for (int64_t c = 0; c < channels; ++c) {
      F sum[2] = {};
      for (int64_t i = 0; i < a.hidden; ++i) {
        for (int v = 0; v < 2; ++v) sum[v] += a.embed[i * channels + c] * load(grad + i * kPanel + v * kLanes);
      }
      for (int v = 0; v < 2; ++v) store(grad_pixels + c * a.padded + panel * kPanel + v * kLanes, sum[v]);
    }
  }

  void patch(int64_t patch) {
    const PatchPosition at = position_of(a, patch);
    read_pixels(a.x, a, at, layers.pixels);
    read_pixels(b.grad, a, at, grad_out);
    layers.embed();
    layers.template blocks<true>(at);
    for (int64_t panel = 0; panel < layers.panels; ++panel) project_backward(panel);
    for (int64_t block = a.depth; block-- > 0;) {
      const RowOperand w = row_operand(at, block);
      for (int64_t begin = 0; begin < layers.panels; begin += kGroup / kPanel) {
        int64_t count = 0;
        for (; count < kGroup / kPanel && begin + count < layers.panels; ++count) block_backward(block, begin + count, count, w);
        if (!b.grad_weights.data) continue;
        multiply_over_pixels<P>(silu_rows, scaled_lanes, grad_w2, a.inner, step, count * kUnits, begin == 0);
        multiply_over_pixels<P>(preactivation_grad_rows, normed_lanes, grad_w1, a.inner, step, count * kUnits, begin == 0);
      }
      if (b.grad_weights.data) store_weights(at, patch, block);
    }
    for (int64_t panel = 0; panel < layers.panels; ++panel) embed_backward(panel);
    if (b.grad_x.data) write_pixels(grad_pixels, a, at, b.grad_x);
  }
};

}  // namespace
}  // namespace flowseg::cpu
