// Scores that depend on a distance: what relative attention (the ViT paper's appendix D.3) adds to the score of query i
// and key j is a product of q(i) with row i - j + T - 1 of a matrix R, which 16 x 16 scores from (i, j) on take from the
// 31 rows around D = i - j + T - 1: row D + a - b for the score at (a, b). With one more row they are a warp's window,
//
//     window(c) = R(D - 16 + c), 0 <= c < 32        the score at (a, b) takes c = 16 + a - b
//
// A warp multiplies its 16 rows with the whole window, as mma likes it, and then has the diagonals of a 16 x 32 matrix
// where it wants columns. In mma's layout a row is held by four lanes, and a diagonal moves along it by 8-column blocks
// and, within two neighbouring blocks, to another of the four: one shuffle for each value. TRANSPOSED, with queries as
// columns, the window is the left operand, and the same moves go down the columns: c = 16 + b - a.
//
// The gradient goes the other way: ds, spread to the diagonals of a 16 x 32 matrix, is the left operand of a product
// with the window. And since i - j + T - 1 = r is i - r + T - 1 = j, R's own gradient sees keys as scores see R.
#pragma once

#include "attention_tiles.h"

namespace fastvit::sm80 {

constexpr int kWindow = 2 * kPair;

// tile (ROWS, DIM) = rows `first` .. + ROWS of a matrix of `rows` rows, 0 where there are none, by one warp. Not
// asynchronous: other warps hide its latency.
template <int ROWS, int DIM, class T>
__device__ __forceinline__ void load_rows(T* tile, const T* matrix, int64_t stride, int first, int rows) {
  constexpr int kChunks = DIM / 8;
  __syncwarp();  // everyone is done with what lay there
#pragma unroll 4
  for (int i = lane_id(); i < ROWS * kChunks; i += kLanes) {
    const int row = i / kChunks, chunk = i % kChunks, from = first + row;
    Vector<T, 8> values{};
    if (from >= 0 && from < rows) {
      values = *reinterpret_cast<const Vector<T, 8>*>(matrix + from * stride + chunk * 8);
    }
    *reinterpret_cast<Vector<T, 8>*>(tile + Swizzle<DIM>::at(row, chunk)) = values;
  }
  __syncwarp();
}

// Of a lane's two values in each of two neighbouring blocks, those on the diagonal of its column 2 t + h: of row
// g = lane / 4, the value e = g - (2 t + h) columns from where `high` begins, which for e < 0 is in `low`.
// TRANSPOSED: of column 2 t + h, the value 2 t + h - g rows from there. Who holds it sends it: no two want the same.
template <bool TRANSPOSED>
__device__ __forceinline__ float on_diagonal(int h, const float* low, const float* high) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  if constexpr (TRANSPOSED) {
    const float sent = g <= 2 * t + h ? high[h] : low[h];
    return __shfl_sync(0xffffffffu, sent, ((2 * t + h - g) & 7) * 4 + t);
  } else {
    const bool odd = (h ^ g) & 1;  // of the columns wanted in this row
    const float of_low = odd ? low[1] : low[0], of_high = odd ? high[1] : high[0];
    const float sent = 2 * t + odd <= g - h ? of_high : of_low;
    return __shfl_sync(0xffffffffu, sent, g * 4 + ((g - 2 * t - h) & 7) / 2);
  }
}

// Two slices of scores (16, 16) += the diagonals of rows window^T.
template <class T, int DIM, class Rows>
__device__ __forceinline__ void add_diagonals(float (&left)[4], float (&right)[4], const Rows& rows, const T* window) {
  float all[1][4][4];
  products<T, DIM, 2>(all, rows, window, 4);
  const auto take = [&](float (&s)[4], int slice) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto block = [&](int n) { return &all[0][n + half - slice][2 * half]; };
        s[2 * half + h] += on_diagonal<false>(h, block(1), block(2));
      }
    }
  };
  take(left, 0);
  take(right, 1);
}

// The same with queries as columns: += the diagonals of window columns^T, columns 16 rows of a tile.
template <class T, int DIM>
__device__ __forceinline__ void add_transposed_diagonals(
    float (&left)[4], float (&right)[4], const T* columns, const T* window) {
  float all[2][2][4];
  products<T, DIM, 1>(all, SharedRows<T, DIM>{window}, columns, 2);
  const auto take = [&](float (&s)[4], int slice) {
    const auto block = [&](int n) { return &all[n / 2][slice][n % 2 * 2]; };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        s[2 * half + h] += on_diagonal<true>(h, block(1 + slice - half), block(2 + slice - half));
      }
    }
  };
  take(left, 0);
  take(right, 1);
}

// acc (16, DIM) += ds window, ds two slices of (16, 16) spread to their diagonals.
template <class T, int DIM>
__device__ __forceinline__ void add_spread(
    float (&acc)[1][DIM / 8][4], const float (&left)[4], const float (&right)[4], const T* window) {
  const float none[2] = {};
  float spread[4][4];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto block = [&](int slice) {
        return slice == 0 ? left + 2 * half : slice == 1 ? right + 2 * half : none;
      };
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        spread[n][2 * half + h] = on_diagonal<false>(h, block(1 + half - n), block(2 + half - n));
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    uint32_t a[1][4];
    pack_pair<T>(a[0], spread[2 * m], spread[2 * m + 1]);
    add_products<T, DIM, 1>(acc, a, window, m * kPair);
  }
}

}  // namespace fastvit::sm80
