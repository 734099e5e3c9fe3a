// Prints the layouts that the host's products use, in the order of CuTe's layouts, one per line: name, then indices.
#include <cstdio>

#include "hopper_products.h"

namespace {

using namespace flowseg::cuda;
using flowseg::host::TileOperand;

// Index m + 64 k of each (thread, element), the thread first.
void fragment(const char* name, int elements) {
  std::printf("%s", name);
  for (int i = 0; i < 128 * elements; ++i) {
    const auto [row, column] = flowseg::host::place_in_fragment(i % 32, i / 128);
    std::printf(" %d", i % 128 / 32 * 16 + row + 64 * column);
  }
  std::puts("");
}

// Index in the tile of each (index along M or N, index along K), as products of four steps read it. `parts` warps share the tile.
void operand(const char* name, bool rows_are_k, int parts) {
  static int at[64][64];
  for (int step = 0; step < 4; ++step) {
    for (int part = 0; part < parts; ++part) {
      const int extent = 64 / parts;
      const uint64_t start = descriptor(descriptor_low(0), step * (rows_are_k ? kRowStep : kColumnStep));
      const TileOperand read{start, rows_are_k, extent, extent * part};
      for (int i = 0; i < read.chunks(); ++i) {
        for (int e = 0; e < 8; ++e) {
          const auto [k, other] = read.element(i, e);
          at[extent * part + other][16 * step + k] = static_cast<int>(read.chunk(i)) / 2 + e;
        }
      }
    }
  }
  std::printf("%s", name);
  for (int i = 0; i < 4096; ++i) std::printf(" %d", at[i % 64][i / 64]);
  std::puts("");
}

void tile(const char* name, bool rows_are_k) {
  std::printf("%s", name);
  for (uint32_t i = 0; i < 4096; ++i) {
    std::printf(" %u", (rows_are_k ? tile_offset(i / 64, i % 64) : tile_offset(i % 64, i / 64)) / 2);
  }
  std::puts("");
}

}  // namespace

int main() {
  fragment("A", 8);
  fragment("D", 32);
  fragment("D16", 8);
  fragment("D32", 16);
  operand("K", false, 1);
  operand("K", false, 4);
  operand("MN", true, 1);
  operand("MN", true, 4);
  tile("K", false);
  tile("MN", true);
}
