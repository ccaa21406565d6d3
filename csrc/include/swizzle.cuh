// Where a row-major tile of 16-bit values lies in shared memory, so that nothing that reads or writes it by 16 bytes
// meets a bank conflict: no padding, for every row length that is a multiple of 8.
//
// A row is n = COLUMNS / 8 chunks of 16 bytes; the banks take 8 chunks at a time. Chunk c of row r lies at place
// r * n + (c ^ x(r)) with x(r) = (r >> (3 - z)) % 2^z, where 2^z is the power of two in n, at most 8:
//
//   COLUMNS            n    2^z  x(r)         for instance
//   8 * odd            odd   1   0            40, 56, 72, 88, 104, 120: an odd stride meets 8 different banks itself
//   16 * odd           2 mod 4   2   r / 4 % 2    48, 80, 112
//   32 * odd           4 mod 8   4   r / 2 % 4    32, 96
//   64 * any           0 mod 8   8   r % 8        64, 128: for 64 this is TMA's and wgmma's 128-byte swizzle
//
// ldmatrix reads one chunk column c of 8 rows from a multiple of 8 on. r * n mod 8 takes each multiple of 2^z (mod 8)
// 2^z times, once for each value of r >> (3 - z), and x(r) then takes each value below 2^z once: 8 different places.
// A copy writes 8 neighbouring chunks, by rows, from a multiple of 2^z on: whole aligned groups of 2^z, each permuted
// within itself: 8 different places. x depends on r % 8 only, so a step of 8 rows is the same step in the address.
#pragma once

#include "ptx.cuh"

namespace fastvit {

template <int COLUMNS>
struct Swizzle {
  static_assert(COLUMNS % 8 == 0 && COLUMNS > 0);
  static constexpr int kChunks = COLUMNS / 8;
  static constexpr int kBits = kChunks % 8 == 0 ? 3 : kChunks % 4 == 0 ? 2 : kChunks % 2 == 0 ? 1 : 0;  // z
  static constexpr int kMask = (1 << kBits) - 1;

  // How many elements into the tile chunk (row, chunk) begins, that is elements (row, 8 chunk) to (row, 8 chunk + 7).
  __device__ __forceinline__ static int at(int row, int chunk) {
    return row * COLUMNS + (chunk ^ ((row >> (3 - kBits)) & kMask)) * 8;
  }

  // Where a lane finds its row of a 16 x 16 block for ldmatrix.x4: row `row` + lane % 16, chunk `chunk` + lane / 16;
  // row a multiple of 16, chunk even. Written so that what depends on the lane takes few values (one for an odd n or
  // 2 mod 4, two, or four for 0 mod 8) and the rest is a constant of the instruction.
  __device__ __forceinline__ static int block(int lane, int row, int chunk) {
    const int low = chunk & kMask, x = ((lane >> (3 - kBits)) & kMask) ^ (lane / 16);
    const int lanes = lane % 16 * COLUMNS + (kBits == 0 ? lane / 16 : low ^ x) * 8;
    return row * COLUMNS + (chunk - low) * 8 + lanes;
  }
};

// Starts copying `tile_rows` rows of a matrix, COLUMNS values each and `stride` apart, from row `first` on, into a tile
// of shared memory, by all `threads` threads of the block; rows that are not below `rows` become 0. commit and wait are
// the caller's. `matrix` and its rows are 16-byte aligned. A thread keeps to one chunk column, so that a step costs an
// addition: the threads % (COLUMNS / 8) last ones have nothing to do.
template <int COLUMNS, class T>
__device__ __forceinline__ void copy_rows_async(
    T* tile, int tile_rows, const T* matrix, int64_t stride, int first, int rows, int thread, int threads) {
  constexpr int kChunks = COLUMNS / 8;
  const int step = threads / kChunks, chunk = thread % kChunks;
  if (thread >= step * kChunks) return;
  const T* from = matrix + static_cast<int64_t>(first + thread / kChunks) * stride + chunk * 8;
#pragma unroll 2
  for (int row = thread / kChunks; row < tile_rows; row += step, from += step * stride) {
    const bool inside = first + row < rows;
    ptx::copy_async(tile + Swizzle<COLUMNS>::at(row, chunk), inside ? from : matrix, inside);
  }
}

// The same for TILE_ROWS rows that are all there, the first of them at `from`, and THREADS threads: no bounds, no loop.
template <int COLUMNS, int TILE_ROWS, int THREADS, class T>
__device__ __forceinline__ void copy_tile_async(T* tile, const T* from, int64_t stride, int thread) {
  constexpr int kChunks = COLUMNS / 8, kStep = THREADS / kChunks;
  const int row = thread / kChunks, chunk = thread % kChunks;
  if (THREADS % kChunks != 0 && row >= kStep) return;
  from += row * stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < TILE_ROWS; i += kStep, from += kStep * stride) {
    if (TILE_ROWS % kStep != 0 && i + row >= TILE_ROWS) break;
    ptx::copy_async(tile + Swizzle<COLUMNS>::at(i + row, chunk), from);
  }
}

}  // namespace fastvit
