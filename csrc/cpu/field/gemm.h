// Small matrix products for the neural field, and the transposition and packing that they need.
//
// Activations are stored feature by feature, with pixels in the vector lanes (a panel has two vectors of pixels). So the norms and
// SiLU need no sums across lanes, a generated weight is a scalar that is broadcast, and a column's length is one factor per row.
// A product computes a tile of kRows rows x 2 vectors in registers, and reads each vector once for all rows of the tile.
//
// A product sums over 32-bit units. A unit is one fp32 number, or two bf16 numbers if the CPU multiplies pairs of them. The types
// Floats and Bf16Pairs define the unit and its multiply-add. All products are templates of that type.
//
// `multiply` is the product over features, used by the forward and the backward. `multiply_over_pixels` is the product over pixels,
// used for the gradients of the generated weights; both of its operands need the pixels as rows, hence `transpose`.
#pragma once

#include "cpu/field/params.h"
#include "cpu/pixel/blocks.h"

namespace flowseg::cpu {
namespace {

constexpr int kLanes = Lanes<float>::width;
constexpr int kPanel = 2 * kLanes;  // pixels per tile of a product over features
constexpr int kGroup = 2 * kPanel;  // pixels per step of a product over pixels
#if defined(__AVX512F__)
constexpr int kRows = 12;  // rows per tile: the sums and the operands fill the registers
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif

FLOWSEG_INLINE F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FLOWSEG_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

struct Floats {
  using Unit = float;
  static constexpr int features = 1;  // per unit
  static FLOWSEG_INLINE F multiply_add(F sum, const Unit* scalar, const Unit* vector) {
    return sum + *scalar * load(vector);
  }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  using Unit = uint32_t;
  static constexpr int features = 2;
  static FLOWSEG_INLINE F multiply_add(F sum, const Unit* scalar, const Unit* vector) {
    int32_t pair;
    std::memcpy(&pair, scalar, 4);
    // Not the intrinsic: with it GCC 12 copies every sum twice per step.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(pair)), "v"(_mm512_loadu_si512(vector)));
    return sum;
  }
  // Stores units of two features of the same pixel: lane i holds (even[i], odd[i]), rounded.
  static FLOWSEG_INLINE void store_features(Unit* to, F even, F odd) {
    static constexpr auto order = [] {
      struct { alignas(64) uint16_t at[32]; } o{};
      for (int i = 0; i < 32; ++i) o.at[i] = static_cast<uint16_t>(i / 2 + (i % 2) * 16);
      return o;
    }();
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(order.at), rounded));
  }
  // Stores units of two neighbouring pixels of the same feature, for a product over pixels.
  static FLOWSEG_INLINE void store_pixels(Unit* to, F first, F second) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
  }
};
#endif

// sum[r][v] += sum over k < depth of a(r, k) * vector v of row k of b.
template <class P, int R, int V>
FLOWSEG_INLINE void accumulate(F (&sum)[R][V], const typename P::Unit* a, int64_t a_row, int64_t a_step,
                               const typename P::Unit* b, int64_t b_step, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = P::multiply_add(sum[r][v], a + r * a_row, b + v * kLanes);
    }
    a += a_step;
    b += b_step;
  }
}

// Product over features of a (rows, depth) and b (depth, 2 vectors). Calls emit(row, sums of R rows x 2 vectors) for each tile.
// packed: a is stored tile by tile (see pack_columns); otherwise the rows of a are `a_row` units apart.
template <class P, bool packed, class Emit>
FLOWSEG_INLINE void multiply(const typename P::Unit* a, int64_t a_row, const typename P::Unit* b, int64_t b_step, int64_t rows,
                             int64_t depth, Emit emit) {
  int64_t row = 0;
  const auto tile = [&]<int R>() {
    F sum[R][2] = {};
    if constexpr (packed) {
      accumulate<P>(sum, a + row * depth, 1, R, b, b_step, depth);
    } else {
      accumulate<P>(sum, a + row * a_row, a_row, 1, b, b_step, depth);
    }
    emit(row, sum);
    row += R;
  };
  while (row + kRows <= rows) tile.template operator()<kRows>();
  while (row + 4 <= rows) tile.template operator()<4>();
  while (row + 2 <= rows) tile.template operator()<2>();
  if constexpr (P::features == 1) {
    if (row < rows) tile.template operator()<1>();
  }
}

// Rows of the tile that `multiply` computes at `row`.
FLOWSEG_INLINE int tile_rows(int64_t row, int64_t rows) {
  return row + kRows <= rows ? kRows : row + 4 <= rows ? 4 : row + 2 <= rows ? 2 : 1;
}

// Packs w (depth, rows) into tiles for `multiply`: within a tile, the kRows numbers of each k are contiguous. Also computes the sum
// of squares of each column of w.
inline void pack_columns(const float* w, int64_t depth, int64_t rows, float* tiles, float* squares) {
  for (int64_t row = 0; row < rows; ++row) squares[row] = 0;
  for (int64_t k = 0; k < depth; ++k) {
    const float* FLOWSEG_RESTRICT from = w + k * rows;
    for (int64_t row = 0; row < rows; ++row) squares[row] += from[row] * from[row];
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) std::memcpy(tiles + row * depth + k * kRows, from + row, kRows * sizeof(float));
    for (int size; row < rows; row += size) {
      size = tile_rows(row, rows);
      for (int r = 0; r < size; ++r) tiles[row * depth + k * size + r] = from[row + r];
    }
  }
}

// The same for bf16 numbers in fp32: units of two consecutive numbers of a column.
inline void pack_columns(const float* w, int64_t depth, int64_t rows, uint32_t* tiles, float* squares) {
  for (int64_t row = 0; row < rows; ++row) squares[row] = 0;
  for (int64_t k = 0; k < depth; k += 2) {
    const float* FLOWSEG_RESTRICT from = w + k * rows;
    for (int64_t row = 0; row < rows; ++row) squares[row] += from[row] * from[row] + from[rows + row] * from[rows + row];
    const auto pair = [&](int64_t row) {
      uint32_t even, odd;
      std::memcpy(&even, from + row, 4);
      std::memcpy(&odd, from + rows + row, 4);
      return even >> 16 | (odd & 0xffff0000u);
    };
    uint32_t* FLOWSEG_RESTRICT to = tiles + k / 2 * kRows;
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) {
      for (int r = 0; r < kRows; ++r) to[row * (depth / 2) + r] = pair(row + r);
    }
    for (int size; row < rows; row += size) {
      size = tile_rows(row, rows);
      for (int r = 0; r < size; ++r) tiles[row * (depth / 2) + k / 2 * size + r] = pair(row + r);
    }
  }
}

// Transposes 32-bit numbers: in (rows, columns) to out (columns, rows).
template <class Unit>
void transpose(const Unit* in, int64_t in_step, int64_t rows, int64_t columns, Unit* out, int64_t out_step) {
  int64_t row = 0;
#if defined(__AVX512F__)
  for (; row + 16 <= rows && columns % 16 == 0; row += 16) {
    for (int64_t column = 0; column < columns; column += 16) {
      __m512 a[16], b[16];
      for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + (row + i) * in_step + column);
#pragma GCC unroll 8
      for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
          const __m512d low = (__m512d)b[i + j], high = (__m512d)b[i + 2 + j];
          a[i + 2 * j] = (__m512)_mm512_unpacklo_pd(low, high);
          a[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(low, high);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512 even = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88), odd = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
        const __m512 even2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
        const __m512 odd2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
        Unit* to = out + (column + i) * out_step + row;
        _mm512_storeu_ps(to, _mm512_shuffle_f32x4(even, even2, 0x88));
        _mm512_storeu_ps(to + 8 * out_step, _mm512_shuffle_f32x4(even, even2, 0xdd));
        _mm512_storeu_ps(to + 4 * out_step, _mm512_shuffle_f32x4(odd, odd2, 0x88));
        _mm512_storeu_ps(to + 12 * out_step, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
      }
    }
  }
#endif
  for (; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) out[column * out_step + row] = in[row * in_step + column];
  }
}

// Product over pixels: c (rows, step) += a (rows, depth) b (depth, step). The rows of a are kGroup / P::features units apart, and
// step is a multiple of kLanes. first: overwrites c.
template <class P>
void multiply_over_pixels(const typename P::Unit* a, const typename P::Unit* b, float* c, int64_t rows, int64_t step,
                          int64_t depth, bool first) {
  constexpr int64_t a_row = kGroup / P::features;
  for (int64_t column = 0; column < step;) {
    const auto columns = [&]<int V>() {
      int64_t row = 0;
      const auto tile = [&]<int R>() {
        F sum[R][V];
        float* at = c + row * step + column;
        for (int r = 0; r < R; ++r) {
          for (int v = 0; v < V; ++v) sum[r][v] = first ? F{} : load(at + r * step + v * kLanes);
        }
        accumulate<P>(sum, a + row * a_row, a_row, 1, b + column, step, depth);
        for (int r = 0; r < R; ++r) {
          for (int v = 0; v < V; ++v) store(at + r * step + v * kLanes, sum[r][v]);
        }
        row += R;
      };
      while (row + kRows <= rows) tile.template operator()<kRows>();
      while (row + 4 <= rows) tile.template operator()<4>();
      while (row < rows) tile.template operator()<1>();
      column += V * kLanes;
    };
    if (column + 2 * kLanes <= step) {
      columns.template operator()<2>();
    } else {
      columns.template operator()<1>();
    }
  }
}

// 1 / (1 + exp(-z)).
FLOWSEG_INLINE F sigmoid(F z) {
#if defined(__AVX512F__)
  // exp(-z) = 2^t = 2^n 2^f with t = -z log2(e) and n the nearest integer. f is computed from z, not from the rounded t, to keep
  // all digits of a large t. The polynomial is the minimax fit of 2^f on [-1/2, 1/2] (relative error 2e-9). The order of the
  // operands of min and max lets NaN pass.
  const __m512 x = _mm512_min_ps(_mm512_set1_ps(87.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), (__m512)z));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F f = ((F)x * -1.44269502f - (F)n) - (F)x * 1.92596303e-8f;
  F p = F{} + 1.53458095e-4f;
  p = p * f + 1.33999309e-3f;
  p = p * f + 9.61848907e-3f;
  p = p * f + 5.55032864e-2f;
  p = p * f + 2.40226462e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  const F e = (F)_mm512_scalef_ps((__m512)p, n);
  return reciprocal(1.0f + e);
#else
  const F e = exponential(choose(z < 0.0f, z, -z));
  const F s = 1.0f / (1.0f + e);
  return choose(z < 0.0f, e * s, s);
#endif
}

}  // namespace
}  // namespace flowseg::cpu
