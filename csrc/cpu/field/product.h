// Register-blocked products for the neural field.
//
// Activations are kept feature by feature, pixels in the lanes: norms and SiLU need no horizontal sums, a generated weight is a
// scalar that is broadcast, and column lengths are one factor a row. The contraction runs over units of 32 bits: one fp32
// feature, or a pair of bf16 ones where the CPU multiplies pairs.
#pragma once

#include "../chunk/blocks.h"
#include "arguments.h"

namespace flowseg::cpu {
namespace {

constexpr int kLanes = Lanes<float>::width;
constexpr int kPanel = 2 * kLanes;  // pixels that are computed together
constexpr int kGroup = 2 * kPanel;  // pixels that a product over pixels contracts at once
#if defined(__AVX512F__)
constexpr int kRows = 12;  // rows of a tile of 2 vectors; with the operands they fill the registers
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

// fp32 features: the operand with pixels in its lanes and the one broadcast pixel by pixel lie the same in memory.
struct Single {
  using Unit = float;
  static constexpr int features = 1;
  static FLOWSEG_INLINE F multiply_add(F sum, const Unit* scalar, const Unit* vector) {
    return sum + *scalar * load(vector);
  }
};

#if defined(__AVX512BF16__)
struct Pair {
  using Unit = uint32_t;
  static constexpr int features = 2;
  static FLOWSEG_INLINE F multiply_add(F sum, const Unit* scalar, const Unit* vector) {
    int32_t pair;
    std::memcpy(&pair, scalar, 4);
    // Around the intrinsic GCC 12 copies every sum twice a step.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(pair)), "v"(_mm512_loadu_si512(vector)));
    return sum;
  }
  // Lane i: the rounded (even[i], odd[i]).
  static FLOWSEG_INLINE void store_features(Unit* to, F even, F odd) {
    static constexpr auto order = [] {
      struct { alignas(64) uint16_t at[32]; } o{};
      for (int i = 0; i < 32; ++i) o.at[i] = static_cast<uint16_t>(i / 2 + (i % 2) * 16);
      return o;
    }();
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(order.at), rounded));
  }
  // Pixels of one feature in their order: the units of a product over pixels.
  static FLOWSEG_INLINE void store_pixels(Unit* to, F first, F second) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
  }
};
#endif

// sum[r][v] += over k of scalar(r, k) * vector v of row k.
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

// emit(row, sums of R rows of 2 vectors) for every tile of rows. With `packed`, tiles lie one after the other, a unit of all rows
// of a tile together (pack_columns); else rows are `a_row` units apart.
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

// The tile of rows that `multiply` takes at `row`.
FLOWSEG_INLINE int tile_rows(int64_t row, int64_t rows) {
  return row + kRows <= rows ? kRows : row + 4 <= rows ? 4 : row + 2 <= rows ? 2 : 1;
}

// w (depth, rows) row-major to the tiles of `multiply`, with the sum of squares of each column.
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

// The same for bf16 values held as fp32: units of two neighbours of a column.
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

// out (columns, rows) = in (rows, columns) transposed, of 32-bit values.
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
        const __m512 even2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88), odd2 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
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

// c (rows, columns) += a b over `depth` units of pixels; a has its rows kGroup / P::features units apart, b and c `step`, a
// multiple of the lanes. With `first`, c is overwritten.
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
  // 2^t = 2^n 2^f, t = -z log2(e), n the nearest integer; f comes from z itself, so that no digits of a large t are lost. The
  // polynomial is the minimax fit of 2^f on [-1/2, 1/2] (2e-9 relative). The operand order of min and max lets NaN pass.
  const __m512 x = _mm512_min_ps(_mm512_set1_ps(87.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), (__m512)z));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
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
