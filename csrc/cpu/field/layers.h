// The layers of the neural field for one patch: reads its pixels, normalises and packs its generated weights, runs the embedding,
// the blocks and the output layer panel by panel, and writes its pixels. The backward runs them too, and keeps the states.
#pragma once

#include "cpu/field/gemm.h"

namespace flowseg::cpu {
namespace {

// Hands out parts of a thread's scratch, each aligned to a cache line. Constructed with null it only counts.
class Arena {
 public:
  explicit Arena(float* memory) : memory_(memory) {}
  float* take(int64_t floats) {
    float* at = memory_ ? memory_ + used_ : nullptr;
    used_ += (floats + 15) / 16 * 16;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

struct PatchPosition {
  int64_t image, index;  // index: of the patch in its image
  int64_t row, column;   // of its first pixel
};

inline PatchPosition position_of(const Field& a, int64_t patch) {
  const int64_t across = a.x.width / a.patch_size, patches = across * (a.x.height / a.patch_size);
  const int64_t image = patch / patches, index = patch % patches;
  return {image, index, index / across * a.patch_size, index % across * a.patch_size};
}

template <class S>
void read_pixels_as(const Image& image, const Field& a, const PatchPosition& at, float* out) {
  const int64_t p = a.patch_size;
  for (int64_t c = 0; c < image.channels; ++c) {
    float* FLOWSEG_RESTRICT to = out + c * a.padded;
    for (int64_t row = 0; row < p; ++row) {
      const S* FLOWSEG_RESTRICT from = static_cast<const S*>(image.data) + at.image * image.stride[0] + c * image.stride[1] +
                                       (at.row + row) * image.stride[2] + at.column * image.stride[3];
      if (image.stride[3] == 1) {
        for (int64_t i = 0; i < p; ++i) to[row * p + i] = static_cast<float>(widen(from[i]));
      } else {
        for (int64_t i = 0; i < p; ++i) to[row * p + i] = static_cast<float>(widen(from[i * image.stride[3]]));
      }
    }
    for (int64_t i = p * p; i < a.padded; ++i) to[i] = 0;
  }
}

// Reads the pixels of a patch to (C, padded), with zeros in the padding.
inline void read_pixels(const Image& image, const Field& a, const PatchPosition& at, float* out) {
  switch (image.type) {
    case Real::f32: return read_pixels_as<float>(image, a, at, out);
    case Real::f64: return read_pixels_as<double>(image, a, at, out);
    case Real::f16: return read_pixels_as<Half>(image, a, at, out);
    case Real::bf16: return read_pixels_as<BFloat>(image, a, at, out);
  }
}

template <class S>
void write_pixels_as(const float* pixels, const Field& a, const PatchPosition& at, const Output& out) {
  const int64_t p = a.patch_size;
  for (int64_t c = 0; c < a.x.channels; ++c) {
    const float* FLOWSEG_RESTRICT from = pixels + c * a.padded;
    for (int64_t row = 0; row < p; ++row) {
      S* FLOWSEG_RESTRICT to = static_cast<S*>(out.data) +
                               ((at.image * a.x.channels + c) * a.x.height + at.row + row) * a.x.width + at.column;
      for (int64_t i = 0; i < p; ++i) narrow(from[row * p + i], to[i]);
    }
  }
}

inline void write_pixels(const float* pixels, const Field& a, const PatchPosition& at, const Output& out) {
  switch (out.type) {
    case Real::f32: return write_pixels_as<float>(pixels, a, at, out);
    case Real::f64: return write_pixels_as<double>(pixels, a, at, out);
    case Real::f16: return write_pixels_as<Half>(pixels, a, at, out);
    case Real::bf16: return write_pixels_as<BFloat>(pixels, a, at, out);
  }
}

template <class S>
void widen_all(const void* from, int64_t count, float* FLOWSEG_RESTRICT to) {
  const S* FLOWSEG_RESTRICT values = static_cast<const S*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(widen(values[i]));
}

// The generated weights of a block, in place.
inline const void* block_weights(const Field& a, const PatchPosition& at, int64_t block) {
  const int64_t offset = at.image * a.weight_stride[0] + at.index * a.weight_stride[1] + block * a.weight_stride[2];
  return static_cast<const char*>(a.weights) + offset * size_of(a.weight_type);
}

// The generated weights of a block in fp32: in place if they are, otherwise converted into `copy`.
inline const float* read_weights(const Field& a, const PatchPosition& at, int64_t block, float* copy) {
  const void* from = block_weights(a, at, block);
  const int64_t count = 2 * a.hidden * a.inner;
  switch (a.weight_type) {
    case Real::f32: return static_cast<const float*>(from);
    case Real::f64: widen_all<double>(from, count, copy); break;
    case Real::f16: widen_all<Half>(from, count, copy); break;
    case Real::bf16: widen_all<BFloat>(from, count, copy); break;
  }
  return copy;
}

// Replaces sums of squares by reciprocal lengths.
inline void reciprocal_lengths(float* squares, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float length = std::sqrt(squares[i]);
    squares[i] = 1.0f / (length > 1e-12f ? length : 1e-12f);
  }
}

// Stores features row .. row + R of a panel as units for a product over features; units are `step` apart.
template <class P, int R>
FLOWSEG_INLINE void store_activations(typename P::Unit* to, int64_t step, int64_t row, const F (&v)[R][2]) {
  if constexpr (P::features == 1) {
    for (int r = 0; r < R; ++r) {
      store(to + (row + r) * step, v[r][0]);
      store(to + (row + r) * step + kLanes, v[r][1]);
    }
  } else {
    for (int r = 0; r < R; r += 2) {
      P::store_features(to + (row + r) / 2 * step, v[r][0], v[r + 1][0]);
      P::store_features(to + (row + r) / 2 * step + kLanes, v[r][1], v[r + 1][1]);
    }
  }
}

// One thread's buffers for one patch, and the layers that fill them. Buffers of panels are stored panel by panel, each panel as
// (features, kPanel). keep: keeps the states, the pre-activations and 1 / rms of all blocks for the backward.
template <class P>
struct Layers {
  using Unit = typename P::Unit;
  const Field& a;
  const int64_t panels;  // with pixels in them
  float *pixels, *out;     // (C, padded)
  float* copy;             // fp32 weights of one block
  float *scale1, *scale2;  // reciprocal column lengths of W1 (L, inner) and W2 (L, Hx)
  Unit *tiles1, *tiles2;   // packed W1 and W2 of one block
  Unit *normed, *silu;     // operands of the two products: (Hx, kPanel), (inner, kPanel)
  float* h;                // states: (panels, Hx, kPanel); if kept, L + 1 times
  float* z;                // pre-activations of SiLU: (L, panels, inner, kPanel), if kept
  float* inverse_rms;      // 1 / rms(h): (L, padded), if kept

  Layers(const Field& field, bool keep, Arena& arena)
      : a(field), panels((field.patch_size * field.patch_size + kPanel - 1) / kPanel) {
    const int64_t all = panels * kPanel;
    pixels = arena.take(a.x.channels * a.padded);
    out = arena.take(a.x.channels * a.padded);
    copy = arena.take(2 * a.hidden * a.inner);
    scale1 = arena.take(a.depth * a.inner);
    scale2 = arena.take(a.depth * a.hidden);
    tiles1 = reinterpret_cast<Unit*>(arena.take(a.hidden * a.inner));
    tiles2 = reinterpret_cast<Unit*>(arena.take(a.hidden * a.inner));
    normed = reinterpret_cast<Unit*>(arena.take(a.hidden * kPanel));
    silu = reinterpret_cast<Unit*>(arena.take(a.inner * kPanel));
    h = arena.take((keep ? a.depth + 1 : 1) * a.hidden * all);
    z = arena.take(keep ? a.depth * a.inner * all : 0);
    inverse_rms = arena.take(keep ? a.depth * a.padded : 0);
  }

  float* state(int64_t block, int64_t panel) const { return h + (block * panels + panel) * a.hidden * kPanel; }
  float* preactivations(int64_t block, int64_t panel) const { return z + (block * panels + panel) * a.inner * kPanel; }

  // h_0 = embed x + table.
  void embed() {
    const int64_t channels = a.x.channels;
    for (int64_t panel = 0; panel < panels; ++panel) {
      float* to = state(0, panel);
      const float* x = pixels + panel * kPanel;
      for (int64_t i = 0; i < a.hidden; ++i) {
        const float* from = a.table + i * a.padded + panel * kPanel;
        F v[2] = {load(from), load(from + kLanes)};
        for (int64_t c = 0; c < channels; ++c) {
          const float weight = a.embed[i * channels + c];
          v[0] += weight * load(x + c * a.padded);
          v[1] += weight * load(x + c * a.padded + kLanes);
        }
        store(to + i * kPanel, v[0]);
        store(to + i * kPanel + kLanes, v[1]);
      }
    }
  }

  // 1 / rms of each pixel of a panel; 1 in the plain form.
  FLOWSEG_INLINE void reciprocal_rms(const float* from, F (&scale)[2]) const {
    scale[0] = scale[1] = F{} + 1.0f;
    if (!a.residual) return;
    F sum[2][2] = {};
    for (int64_t i = 0; i < a.hidden; ++i) {
      for (int v = 0; v < 2; ++v) {
        const F value = load(from + i * kPanel + v * kLanes);
        sum[i % 2][v] += value * value;
      }
    }
    for (int v = 0; v < 2; ++v) {
      scale[v] = 1.0f / square_root((sum[0][v] + sum[1][v]) / static_cast<float>(a.hidden) + a.eps);
    }
  }

  // Stores RMSNorm with its gain as the operand of the first product.
  FLOWSEG_INLINE void normalize(const float* from, const F (&scale)[2], const float* gains) {
    for (int64_t i = 0; i < a.hidden; i += P::features) {
      F q[P::features][2];
      for (int r = 0; r < P::features; ++r) {
        const float gain = gains ? gains[i + r] : 1.0f;
        for (int v = 0; v < 2; ++v) q[r][v] = load(from + (i + r) * kPanel + v * kLanes) * scale[v] * gain;
      }
      store_activations<P>(normed, kPanel, i, q);
    }
  }

  // All blocks: h += silu(RMSNorm(h) W1) W2.
  template <bool keep>
  void blocks(const PatchPosition& at) {
    for (int64_t block = 0; block < a.depth; ++block) {
      const float* w1 = read_weights(a, at, block, copy);
      const float* w2 = w1 + a.hidden * a.inner;
      float* first = scale1 + block * a.inner;
      float* second = scale2 + block * a.hidden;
      pack_columns(w1, a.hidden, a.inner, tiles1, first);
      pack_columns(w2, a.inner, a.hidden, tiles2, second);
      reciprocal_lengths(first, a.inner);
      if (a.both) {
        reciprocal_lengths(second, a.hidden);
      } else {
        for (int64_t i = 0; i < a.hidden; ++i) second[i] = 1;
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const float* from = state(keep ? block : 0, panel);
        float* to = state(keep ? block + 1 : 0, panel);
        F scale[2];
        reciprocal_rms(from, scale);
        if constexpr (keep) {
          store(inverse_rms + block * a.padded + panel * kPanel, scale[0]);
          store(inverse_rms + block * a.padded + panel * kPanel + kLanes, scale[1]);
        }
        normalize(from, scale, a.residual ? a.gains + block * a.hidden : nullptr);
        float* kept = keep ? preactivations(block, panel) : nullptr;
        multiply<P, true>(tiles1, 0, normed, kPanel, a.inner, a.hidden / P::features, [&]<int R>(int64_t row, F (&sum)[R][2]) {
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            for (int v = 0; v < 2; ++v) {
              const F preactivation = sum[r][v] * first[row + r];
              if constexpr (keep) store(kept + (row + r) * kPanel + v * kLanes, preactivation);
              sum[r][v] = preactivation * sigmoid(preactivation);
            }
          }
          store_activations<P>(silu, kPanel, row, sum);
        });
        multiply<P, true>(tiles2, 0, silu, kPanel, a.hidden, a.inner / P::features, [&]<int R>(int64_t row, F (&sum)[R][2]) {
          for (int r = 0; r < R; ++r) {
            for (int v = 0; v < 2; ++v) {
              const int64_t offset = (row + r) * kPanel + v * kLanes;
              F value = sum[r][v] * second[row + r];
              if (a.residual) value += load(from + offset);
              store(to + offset, value);
            }
          }
        });
      }
    }
  }

  // out = out_weight RMSNorm(h_L) + out_bias.
  void project() {
    for (int64_t panel = 0; panel < panels; ++panel) {
      const float* from = state(0, panel);
      F scale[2];
      reciprocal_rms(from, scale);
      for (int64_t c = 0; c < a.x.channels; ++c) {
        F sum[2] = {};
        for (int64_t i = 0; i < a.hidden; ++i) {
          const float weight = a.out_weight[c * a.hidden + i] * (a.residual ? a.out_gain[i] : 1.0f);
          for (int v = 0; v < 2; ++v) sum[v] += weight * load(from + i * kPanel + v * kLanes);
        }
        for (int v = 0; v < 2; ++v) store(out + c * a.padded + panel * kPanel + v * kLanes, sum[v] * scale[v] + a.out_bias[c]);
      }
    }
  }

  void forward(int64_t patch) {
    const PatchPosition at = position_of(a, patch);
    read_pixels(a.x, a, at, pixels);
    embed();
    blocks<false>(at);
    project();
    write_pixels(out, a, at, a.out);
  }
};

}  // namespace
}  // namespace flowseg::cpu
