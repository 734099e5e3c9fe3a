// The backward of the field of one patch: recomputes the chain with its states, then the chain rule of docs/ops/neural_field.md.
#pragma once

#include "chain.h"

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
  static constexpr int64_t kUnits = kPanel / P::features;  // of a panel, over pixels
  static constexpr int64_t kRow = kGroup / P::features;    // of a group
  const FieldBackward& b;
  const Field& a;
  Chain<P> chain;
  const int64_t step;  // Hx padded to whole vectors
  float *grad_out, *g, *g_pixels, *back, *column_sums, *swapped;
  float *first, *second;  // gradients of the normalised W1, transposed, and of W2: (wide, step)
  Unit *scaled, *logit_grad, *rows_scaled, *rows_entered;
  // Operands of the products over the pixels of a group: rows of features, and features in the lanes.
  Unit *inner_rows, *logit_rows, *entered_lanes, *scaled_lanes;
  // Sums over patches, with kLanes partial sums for each number but those by position.
  float *by_position, *embed, *gains, *out_gain, *out_weight, *out_bias;
  int64_t sums_size;
  float* sums_begin;

  Backward(const FieldBackward& backward, Arena& arena)
      : b(backward), a(backward.field), chain(a, true, arena), step((a.hidden + kLanes - 1) / kLanes * kLanes) {
    const int64_t channels = a.x.channels;
    grad_out = arena.take(channels * a.padded);
    g_pixels = arena.take(channels * a.padded);
    g = arena.take(chain.panels * a.hidden * kPanel);
    back = arena.take(a.hidden * kPanel);
    column_sums = arena.take(a.wide);
    swapped = arena.take(a.hidden * a.wide);
    first = arena.take(a.wide * step);
    second = arena.take(a.wide * step);
    const auto units = [&](int64_t count) { return reinterpret_cast<Unit*>(arena.take(count)); };
    scaled = units(a.hidden * kPanel);
    logit_grad = units(a.wide * kPanel);
    rows_scaled = units(a.hidden * kUnits);
    rows_entered = units(a.hidden * kUnits);
    inner_rows = units(a.wide * kRow);
    logit_rows = units(a.wide * kRow);
    entered_lanes = units(kRow * step);
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
    // Lanes past Hx take part in products whose results nobody reads; garbage there could be slow denormals.
    for (int64_t i = 0; i < kRow * step; ++i) entered_lanes[i] = scaled_lanes[i] = 0;
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

  // Gradient of h from that of n = h * scale with its sum of products with n over the features.
  FLOWSEG_INLINE F norm_backward(F grad, F normal, F product, F scale) const {
    return scale * (grad - normal * (product / static_cast<float>(a.hidden)));
  }

  void leave(int64_t panel) {
    const int64_t channels = a.x.channels;
    const float* from = chain.state(a.depth, panel);
    float* to = g + panel * a.hidden * kPanel;
    const float* grad = grad_out + panel * kPanel;
    F scale[2], product[2] = {};
    chain.measure(from, scale);
    for (int64_t c = 0; c < channels; ++c) {
      add_to(out_bias + c * kLanes, load(grad + c * a.padded) + load(grad + c * a.padded + kLanes));
    }
    for (int64_t i = 0; i < a.hidden; ++i) {
      F normal[2], sum[2] = {};
      const float gain = a.residual ? a.out_gain[i] : 1.0f;
      for (int v = 0; v < 2; ++v) normal[v] = load(from + i * kPanel + v * kLanes) * scale[v];
      for (int64_t c = 0; c < channels; ++c) {
        const F low = load(grad + c * a.padded), high = load(grad + c * a.padded + kLanes);
        add_to(out_weight + (c * a.hidden + i) * kLanes, (low * normal[0] + high * normal[1]) * gain);
        sum[0] += a.out_weight[c * a.hidden + i] * low;
        sum[1] += a.out_weight[c * a.hidden + i] * high;
      }
      if (a.residual) add_to(out_gain + i * kLanes, sum[0] * normal[0] + sum[1] * normal[1]);
      for (int v = 0; v < 2; ++v) {
        sum[v] *= gain;
        product[v] += sum[v] * normal[v];
        store(to + i * kPanel + v * kLanes, sum[v]);
      }
    }
    if (!a.residual) return;
    for (int64_t i = 0; i < a.hidden; ++i) {
      for (int v = 0; v < 2; ++v) {
        const int64_t place = i * kPanel + v * kLanes;
        store(to + place, norm_backward(load(to + place), load(from + place) * scale[v], product[v], scale[v]));
      }
    }
  }

  // The weights of a block as the operand whose rows are broadcast along the row.
  struct Natural {
    const Unit *w1, *w2;
  };
  Natural natural(const PatchPlace& at, int64_t block) {
    if constexpr (P::features == 1) {
      const float* w1 = read_weights(a, at, block, chain.copy);
      return {w1, w1 + a.hidden * a.wide};
    } else {
      // bf16 pairs of a row lie so in memory; they are copied because callers may have offset them by one.
      const char* from = static_cast<const char*>(block_weights(a, at, block));
      Unit* to = reinterpret_cast<Unit*>(chain.copy);
      std::memcpy(to, from, 4 * a.hidden * a.wide);
      return {to, to + a.hidden * a.wide / 2};
    }
  }

  void block_panel(int64_t block, int64_t panel, int64_t in_group, const Natural& w) {
    const float* from = chain.state(block, panel);
    float* grad = g + panel * a.hidden * kPanel;
    const float* scale1 = chain.scale1 + block * a.wide;
    const float* scale2 = chain.scale2 + block * a.hidden;
    const float* gain = a.residual ? a.gains + block * a.hidden : nullptr;
    const float* inverse = chain.inverse + block * a.padded + panel * kPanel;
    const F scale[2] = {load(inverse), load(inverse + kLanes)};
    const bool weights = b.grad_weights.data != nullptr;

    for (int64_t i = 0; i < a.hidden; i += P::features) {
      F v[P::features][2];
      for (int r = 0; r < P::features; ++r) {
        for (int j = 0; j < 2; ++j) v[r][j] = load(grad + (i + r) * kPanel + j * kLanes) * scale2[i + r];
      }
      store_activations<P>(scaled, kPanel, i, v);
      if constexpr (P::features == 2) {
        for (int r = 0; r < 2; ++r) P::store_pixels(rows_scaled + (i + r) * kUnits, v[r][0], v[r][1]);
      }
    }
    if (weights) {
      for (int64_t i = 0; i < a.hidden; ++i) {
        F q[2];
        for (int v = 0; v < 2; ++v) q[v] = load(from + i * kPanel + v * kLanes) * scale[v] * (gain ? gain[i] : 1.0f);
        if constexpr (P::features == 1) {
          store(rows_entered + i * kUnits, q[0]);
          store(rows_entered + i * kUnits + kLanes, q[1]);
        } else {
          P::store_pixels(rows_entered + i * kUnits, q[0], q[1]);
        }
      }
      transpose(rows_entered, kUnits, a.hidden, kUnits, entered_lanes + in_group * kUnits * step, step);
      transpose(P::features == 1 ? scaled : rows_scaled, kUnits, a.hidden, kUnits, scaled_lanes + in_group * kUnits * step, step);
    }

    const float* logits = chain.logits(block, panel);
    multiply<P, false>(w.w2, a.hidden / P::features, scaled, kPanel, a.wide, a.hidden / P::features,
                       [&]<int R>(int64_t row, F (&sum)[R][2]) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        F inner[2];
        for (int v = 0; v < 2; ++v) {
          const F z = load(logits + (row + r) * kPanel + v * kLanes);
          const F s = sigmoid(z);
          inner[v] = z * s;
          sum[r][v] *= (s + inner[v] * (1.0f - s)) * scale1[row + r];
        }
        if (weights) {
          Unit* inner_to = inner_rows + (row + r) * kRow + in_group * kUnits;
          Unit* logit_to = logit_rows + (row + r) * kRow + in_group * kUnits;
          if constexpr (P::features == 1) {
            for (int v = 0; v < 2; ++v) {
              store(inner_to + v * kLanes, inner[v]);
              store(logit_to + v * kLanes, sum[r][v]);
            }
          } else {
            P::store_pixels(inner_to, inner[0], inner[1]);
            P::store_pixels(logit_to, sum[r][0], sum[r][1]);
          }
        }
      }
      store_activations<P>(logit_grad, kPanel, row, sum);
    });

    F product[2] = {};
    multiply<P, false>(w.w1, a.wide / P::features, logit_grad, kPanel, a.hidden, a.wide / P::features,
                       [&]<int R>(int64_t row, F (&sum)[R][2]) {
      for (int r = 0; r < R; ++r) {
        const int64_t place = (row + r) * kPanel;
        if (gain) {
          F by_gain{};
          for (int v = 0; v < 2; ++v) {
            const F normal = load(from + place + v * kLanes) * scale[v];
            by_gain += sum[r][v] * normal;
            sum[r][v] *= gain[row + r];
            product[v] += sum[r][v] * normal;
          }
          add_to(gains + (block * a.hidden + row + r) * kLanes, by_gain);
        }
        for (int v = 0; v < 2; ++v) store((gain ? back : grad) + place + v * kLanes, sum[r][v]);
      }
    });
    if (!gain) return;
    for (int64_t i = 0; i < a.hidden; ++i) {
      for (int v = 0; v < 2; ++v) {
        const int64_t place = i * kPanel + v * kLanes;
        add_to(grad + place, norm_backward(load(back + place), load(from + place) * scale[v], product[v], scale[v]));
      }
    }
  }

  // grad -= w scale^2 columnsum(grad w): from the gradient of w * scale, times scale, to that of w.
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

  void store_weights(const PatchPlace& at, int64_t patch, int64_t block) {
    const float* w1 = read_weights(a, at, block, chain.copy);
    const float* w2 = w1 + a.hidden * a.wide;
    transpose(first, step, a.wide, a.hidden, swapped, a.wide);
    columns_backward(swapped, a.wide, w1, a.hidden, a.wide, chain.scale1 + block * a.wide, column_sums);
    if (a.both) columns_backward(second, step, w2, a.wide, a.hidden, chain.scale2 + block * a.hidden, column_sums);
    const int64_t half = a.hidden * a.wide, size = size_of(b.grad_weights.type);
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
    put(swapped, half, 0);
    for (int64_t j = 0; j < a.wide; ++j) put(second + j * step, a.hidden, half + j * a.hidden);
  }

  void enter(int64_t panel) {
    const int64_t channels = a.x.channels;
    const float* grad = g + panel * a.hidden * kPanel;
    const float* x = chain.pixels + panel * kPanel;
    for (int64_t i = 0; i < a.hidden; ++i) {
      const F low = load(grad + i * kPanel), high = load(grad + i * kPanel + kLanes);
      float* place = by_position + i * a.padded + panel * kPanel;
      add_to(place, low);
      add_to(place + kLanes, high);
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
      for (int v = 0; v < 2; ++v) store(g_pixels + c * a.padded + panel * kPanel + v * kLanes, sum[v]);
    }
  }

  void patch(int64_t patch) {
    const PatchPlace at = patch_place(a, patch);
    read_pixels(a.x, a, at, chain.pixels);
    read_pixels(b.grad, a, at, grad_out);
    chain.embed();
    chain.template blocks<true>(at);
    for (int64_t panel = 0; panel < chain.panels; ++panel) leave(panel);
    for (int64_t block = a.depth; block-- > 0;) {
      const Natural w = natural(at, block);
      for (int64_t begin = 0; begin < chain.panels; begin += kGroup / kPanel) {
        int64_t count = 0;
        for (; count < kGroup / kPanel && begin + count < chain.panels; ++count) block_panel(block, begin + count, count, w);
        if (!b.grad_weights.data) continue;
        multiply_over_pixels<P>(inner_rows, scaled_lanes, second, a.wide, step, count * kUnits, begin == 0);
        multiply_over_pixels<P>(logit_rows, entered_lanes, first, a.wide, step, count * kUnits, begin == 0);
      }
      if (b.grad_weights.data) store_weights(at, patch, block);
    }
    for (int64_t panel = 0; panel < chain.panels; ++panel) enter(panel);
    if (b.grad_x.data) write_pixels(g_pixels, a, at, b.grad_x);
  }
};

}  // namespace
}  // namespace flowseg::cpu
