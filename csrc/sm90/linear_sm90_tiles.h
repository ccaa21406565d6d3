// Which output tile the GEMM of linear_sm90.cu takes: the tiles it is compiled for, and what each is expected to cost.
//
// The costs are derived from the machine's published rates, not measured; they only have to rank four tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "array.h"

namespace fastvit::sm90 {

struct Tile {
  int block_m, block_n;  // of the output
  int stages;            // of 64 values of the sum each, in shared memory
  int team;              // consumer warpgroups that share a tile: 2 work on one together, 1 takes turns with the other
};

// 128 x 256 moves the fewest bytes for a product, for long sums. 128 x 192 divides the widths of ViT-S, B and H and, as
// its warpgroups take turns, hides one's epilogue behind the other's products: for the short sums of K = D. 128 x 128
// wastes less at other widths, and 64 x 64 gives the small batches enough tiles.
constexpr Tile kTiles[] = {{128, 256, 4, 2}, {128, 192, 4, 1}, {128, 128, 6, 1}, {64, 64, 8, 1}};
constexpr int kWeightGradientTile = 2;

constexpr int kBlockK = 64;

// Clocks that one multiprocessor needs for `tiles` tiles on `multiprocessors` of them, each a sum over k.
constexpr double expected_clocks(Tile tile, int64_t tiles, int64_t k, int multiprocessors) {
  constexpr double kProducts = 2048;  // multiply-adds a clock: 989 TFLOP/s over 132 multiprocessors at 1.83 GHz
  constexpr double kBytes = 40;       // a clock from L2: 5.5 TB/s and better are reported, 46 is the width of the wires
  constexpr double kEpilogue = 24;    // instructions for an element, four warps a clock
  const double area = tile.block_m * tile.block_n;
  const double block = std::max(area * kBlockK / kProducts, (tile.block_m + tile.block_n) * 2.0 * kBlockK / kBytes);
  const double sum = ceil_div(k, kBlockK) * block, epilogue = area * kEpilogue / 128;
  const double waves = ceil_div(tiles, multiprocessors);
  return tile.team == 2 ? waves * (sum + epilogue) : waves * std::max(sum, (sum + epilogue) / 2) + epilogue;
}

constexpr int64_t tiles_of(Tile tile, int64_t m, int64_t n) {
  return ceil_div(m, tile.block_m) * ceil_div(n, tile.block_n);
}

// An index into kTiles.
inline int choose_tile(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  const auto clocks = [&](Tile tile) { return expected_clocks(tile, tiles_of(tile, m, n), k, multiprocessors); };
  const auto less = [&](Tile a, Tile b) { return clocks(a) < clocks(b); };
  return static_cast<int>(std::min_element(std::begin(kTiles), std::end(kTiles), less) - std::begin(kTiles));
}

// Splits of the m rows that the weight gradient (n, k) sums over: more fill the device better, and each writes and has
// read again n * k float32.
inline int64_t choose_splits(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  constexpr double kBytes = 18;  // a clock and multiprocessor from device memory: 4.3 TB/s
  const auto clocks = [&](int64_t splits) {
    constexpr Tile kTile = kTiles[kWeightGradientTile];
    const double partials = splits * 8.0 * n * k / (kBytes * multiprocessors);
    return expected_clocks(kTile, tiles_of(kTile, n, k) * splits, ceil_div(m, splits), multiprocessors) + partials;
  };
  int64_t best = 1;
  for (int64_t splits = 2; splits <= std::min<int64_t>(32, ceil_div(m, kBlockK)); ++splits) {
    if (clocks(splits) < clocks(best)) best = splits;
  }
  return best;
}

}  // namespace fastvit::sm90
