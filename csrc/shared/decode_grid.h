// The cell of a point in the decode grid (flowseg_kernels/decode_grid.py).
#pragma once

#include "shared/types.h"

namespace flowseg {

// A word of the grid's second table contains three classes of kWordBits bits each if the codebook has at most kWordClasses classes.
constexpr int kWordBits = 10, kWordClasses = 1 << kWordBits;

// The index of the cell; -1 outside the grid and for NaN. The bitwise `and` keeps loops over this function free of branches.
FLOWSEG_INLINE int32_t cell_of(float x, float y, float z, float low, float scale, int size) {
  const float limit = static_cast<float>(size);
  const float a = (x - low) * scale, b = (y - low) * scale, c = (z - low) * scale;
  const bool inside = (a >= 0) & (a < limit) & (b >= 0) & (b < limit) & (c >= 0) & (c < limit);
  const int at = (static_cast<int>(inside ? c : 0) * size + static_cast<int>(inside ? b : 0)) * size +
                 static_cast<int>(inside ? a : 0);
  return inside ? at : -1;
}

}  // namespace flowseg
