// The tiles of linear_sm80.cu, and which one suits which sizes. Derived, not measured yet.
//
// Every warp of the two larger tiles computes 64 x 64: for 16 of k, 8 ldmatrix (4 KB) for 32 mma. At the rate of the
// tensor cores of compute capability 8.0 (1024 products a cycle) that is 64 of the 128 bytes that shared memory gives a
// cycle. The small tile's warps compute 32 x 32 and read twice as much for a product, all of the 128; but a quarter of
// the rows fills a device. Every tile fits in the 99 KB that the smallest of the architectures grants a block, so one
// table serves them all.
#pragma once

#include "gemm_sm80.cuh"

namespace fastvit::sm80 {

struct LinearTile {
  Tile tile;
  int blocks;   // that are meant to share a multiprocessor: the register budget, and each hides the other's epilogue
  double rate;  // of products, against the best tile's
};

constexpr LinearTile kLinearTiles[] = {
    {{128, 256, 32, 2, 4, 4}, 1, 1.0},  // 96 KB, 8 warps of 64 x 64
    {{128, 128, 32, 2, 2, 3}, 2, 0.95}, // 48 KB, 4 warps of 64 x 64
    {{64, 64, 64, 2, 2, 4}, 1, 0.6},    // 64 KB, 4 warps of 32 x 32
};
constexpr int kLarge = 0, kMedium = 1, kSmall = 2;

// What one multiprocessor computes of (rows, columns), `splits` times, in units of the best tile's output values: whole
// tiles, of which the unluckiest multiprocessor has the most.
inline double linear_work(
    const Device& device, const LinearTile& choice, int64_t rows, int64_t columns, int64_t splits) {
  const int64_t tiles = ceil_div(rows, choice.tile.m) * ceil_div(columns, choice.tile.n) * splits;
  return static_cast<double>(ceil_div(tiles, device.multiprocessors)) * choice.tile.m * choice.tile.n / choice.rate;
}

// The tile with the least work.
inline int choose_linear_tile(const Device& device, int64_t rows, int64_t columns, int64_t splits = 1) {
  int best = 0;
  for (int i = 1; i < static_cast<int>(std::size(kLinearTiles)); ++i) {
    const auto work = [&](int tile) { return linear_work(device, kLinearTiles[tile], rows, columns, splits); };
    if (work(i) < work(best)) best = i;
  }
  return best;
}

}  // namespace fastvit::sm80
