// The layout of a 64 x 64 tile of 16-bit elements, and descriptors of operands in tiles. Plain C++, also for the host.
#pragma once

#include <cstdint>

#include "shared/types.h"

namespace flowseg::cuda {

constexpr int kTile = 64;             // rows and columns
constexpr int kTileRowBytes = 128;
constexpr int kTileBytes = 8192;
constexpr int kRowStep = 2048;        // bytes to the next 16 rows
constexpr int kColumnStep = 32;       // bytes to the next 16 columns

// The offset in bytes of an element: rows of 128 bytes, whose 16-byte chunks are swizzled by the row. TMA's SWIZZLE_128B.
FLOWSEG_INLINE constexpr uint32_t tile_offset(uint32_t row, uint32_t column) {
  return row * kTileRowBytes + (((column / 8) ^ (row % 8)) * 16) + column % 8 * 2;
}

// A wgmma descriptor of a tile with 128-byte swizzle, in two words: the low one holds the address in shared memory, in units of
// 16 bytes; the high one is the same for all tiles. Groups of 8 rows are 1024 bytes apart. The leading offset has no effect for 64
// columns.
constexpr uint32_t kDescriptorLow = 1u << 16;                       // leading offset of 16 bytes
constexpr uint32_t kDescriptorHigh = (1024u >> 4) | (1u << 30);     // stride offset; swizzle code 1 in bits 62 and 63
FLOWSEG_INLINE constexpr uint32_t descriptor_low(uint32_t address) { return (address >> 4 & 0x3fff) | kDescriptorLow; }
// The descriptor `bytes` after the place of a low word. The sum must stay below 256 KiB.
FLOWSEG_INLINE constexpr uint64_t descriptor(uint32_t low, uint32_t bytes = 0) {
  return static_cast<uint64_t>(low + (bytes >> 4)) | static_cast<uint64_t>(kDescriptorHigh) << 32;
}

// A contiguous array of matrices of 16-bit elements in global memory, as TMA reads and writes it: in boxes of one tile. What lies
// outside of a matrix is read as zero and not written.
struct Matrices {
  const void* data;                    // at a multiple of 16 bytes
  int64_t columns, rows, count;        // of one matrix; number of matrices
  int64_t row_bytes, matrix_bytes;     // strides, multiples of 16
};

}  // namespace flowseg::cuda
