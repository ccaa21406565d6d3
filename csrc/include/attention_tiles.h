// What the attention kernels for compute capability 8.0 share: tiles in shared memory, their operands and products.
//
// A warp owns M times 16 rows of one head (queries, or keys in the key and value gradient) and goes through the rows of
// another tile 16 at a time. Every operand of every product is then a 16 x 16 block of a swizzled tile in shared memory
// (swizzle.cuh), which one ldmatrix.x4 brings as the four registers
//
//     r[0] = rows 0-7, columns 0-7   r[1] = rows 8-15, columns 0-7   r[2] = rows 0-7, columns 8-15   r[3] = the rest
//
// As it is that is mma's left operand; {r[0], r[2]} and {r[1], r[3]} are the right operands of rows 0-7 and 8-15 for a
// product with the tile's transpose (q k^T); and, transposed on the way, {r[0], r[1]} and {r[2], r[3]} are the right
// operands of columns 0-7 and 8-15 for a product with the tile itself (p v). A head dim that 16 does not divide ends in
// a 16 x 8 block: ldmatrix.x2, and m16n8k8 where it is contracted. No head dim is padded.
//
// Two accumulators of 16 x 8 beside each other, rounded, are the left operand of the next product: p and ds never leave
// their registers.
#pragma once

#include <cmath>
#include <initializer_list>
#include <utility>

#include "ops.h"
#include "swizzle.cuh"

namespace fastvit::sm80 {

constexpr int kLanes = 32;

// Thread blocks of four warps to a multiprocessor that a kernel leaves registers for: 3 take 168 a thread, 2 take 255.
// Where shared memory is 100 KB (8.6, 8.9, 12.0) there is no room for a third, so none is asked for.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMostBlocks = 2;
#else
constexpr int kMostBlocks = 3;
#endif

// Keys (or queries) come 16 at a time, as two slices of 8 columns of scores.
constexpr int kPair = 16;

// A (B, T, H, d) tensor: where the rows of one head of one image begin, or of a sequence that starts at row `first`.
// Strides count elements.
template <class T>
struct Heads {
  T* data;
  int64_t image, token, head;

  __device__ __forceinline__ T* rows(int64_t i, int64_t h, int64_t first = 0) const {
    return data + i * image + h * head + first * token;
  }
};

// packed: the images are sequences of one row.
template <class T>
Heads<T> heads_of(const Array& x, bool packed = false) {
  return {x.as<T>(), packed ? 0 : x.stride[0], x.stride[1], x.stride[2]};
}

// What a thread block owns: rows from `first` on of one head of one image. The grid is (row blocks, H, images): the
// blocks of a head run side by side and share its keys in L2, and nothing is divided.
struct Place {
  int64_t image;
  int head, first;

  __device__ __forceinline__ Place(int64_t first_image, int block_rows)
      : image(first_image + blockIdx.z), head(blockIdx.y), first(static_cast<int>(blockIdx.x) * block_rows) {}

  // Where this head begins in a (B, H, length) vector.
  __device__ __forceinline__ int64_t in(int64_t length) const { return (image * gridDim.y + head) * length; }
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % kLanes; }

// The block of rows `row` .. + 16 and chunks `chunk`, `chunk` + 1 of a (., DIM) tile; row a multiple of 16, chunk even.
template <int DIM, class T>
__device__ __forceinline__ const T* block_row(const T* tile, int row, int chunk) {
  return tile + Swizzle<DIM>::block(lane_id(), row, chunk);
}

// The same for the last chunk alone, for ldmatrix.x2: lanes 16 to 31 repeat the addresses of 0 to 15.
template <int DIM, class T>
__device__ __forceinline__ const T* last_chunk_row(const T* tile, int row) {
  return tile + row * DIM + Swizzle<DIM>::at(lane_id() % 16, DIM / 8 - 1);
}

// The left operand of a product contracted over the head dim: rows that a warp owns, in shared memory ...
template <class T, int DIM>
struct SharedRows {
  const T* tile;      // the warp's first row
  uint32_t flip = 0;  // 0x80008000 changes every sign

  __device__ __forceinline__ void load(uint32_t (&r)[4], int m, int k) const {
    ptx::ldmatrix(r, block_row<DIM>(tile, 16 * m, 2 * k));
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] ^= flip;
  }

  __device__ __forceinline__ void load_half(uint32_t (&r)[2], int m) const {
    ptx::ldmatrix(r, last_chunk_row<DIM>(tile, 16 * m));
    r[0] ^= flip;
    r[1] ^= flip;
  }
};

// ... or held in registers.
template <int DIM, int M>
struct RegisterRows {
  uint32_t whole[M][DIM / 16][4];
  uint32_t half[M][2];

  template <class Rows>
  __device__ __forceinline__ explicit RegisterRows(const Rows& rows) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int k = 0; k < DIM / 16; ++k) rows.load(whole[m][k], m, k);
      if constexpr (DIM % 16 != 0) rows.load_half(half[m], m);
    }
  }

  __device__ __forceinline__ void load(uint32_t (&r)[4], int m, int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = whole[m][k][i];
  }

  __device__ __forceinline__ void load_half(uint32_t (&r)[2], int m) const {
    r[0] = half[m][0];
    r[1] = half[m][1];
  }
};

// s = rows tile^T: (16 M, 8 SLICES) from the warp's rows and the first `slices` times 8 rows of a (., DIM) tile. The
// first SURE pairs are known to be there; of the others, those from `slices` on are left 0. The contraction is the
// outer loop: one left operand serves every slice, and the accumulators are independent of each other.
template <class T, int DIM, int SURE, int M, int SLICES, class Rows>
__device__ __forceinline__ void products(float (&s)[M][SLICES][4], const Rows& rows, const T* tile, int slices) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int j = 0; j < SLICES; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][j][i] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < DIM / 16; ++k) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) rows.load(a[m], m, k);
#pragma unroll
    for (int j = 0; j < SLICES / 2; ++j) {
      if (j >= SURE && 2 * j >= slices) break;
      uint32_t r[4];
      ptx::ldmatrix(r, block_row<DIM>(tile, j * kPair, 2 * k));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma<T>(s[m][2 * j], a[m], {r[0], r[2]});
        if (j < SURE - 1 || 2 * j + 1 < slices) ptx::mma<T>(s[m][2 * j + 1], a[m], {r[1], r[3]});
      }
    }
  }
  if constexpr (DIM % 16 != 0) {
    uint32_t a[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) rows.load_half(a[m], m);
#pragma unroll
    for (int j = 0; j < SLICES / 2; ++j) {
      if (j >= SURE && 2 * j >= slices) break;
      uint32_t r[2];
      ptx::ldmatrix(r, last_chunk_row<DIM>(tile, j * kPair));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ptx::mma_k8<T>(s[m][2 * j], a[m], r[0]);
        if (j < SURE - 1 || 2 * j + 1 < slices) ptx::mma_k8<T>(s[m][2 * j + 1], a[m], r[1]);
      }
    }
  }
}

// acc (16 M, DIM) += a (16 M, 16) times rows `row` .. + 16 of a (., DIM) tile.
template <class T, int DIM, int M>
__device__ __forceinline__ void add_products(
    float (&acc)[M][DIM / 8][4], const uint32_t (&a)[M][4], const T* tile, int row) {
#pragma unroll
  for (int c = 0; c < DIM / 16; ++c) {
    uint32_t r[4];
    ptx::ldmatrix_transposed(r, block_row<DIM>(tile, row, 2 * c));
#pragma unroll
    for (int m = 0; m < M; ++m) {
      ptx::mma<T>(acc[m][2 * c], a[m], {r[0], r[1]});
      ptx::mma<T>(acc[m][2 * c + 1], a[m], {r[2], r[3]});
    }
  }
  if constexpr (DIM % 16 != 0) {
    uint32_t r[2];
    ptx::ldmatrix_transposed(r, last_chunk_row<DIM>(tile, row));
#pragma unroll
    for (int m = 0; m < M; ++m) ptx::mma<T>(acc[m][DIM / 8 - 1], a[m], r);
  }
}

// The left operand of the next product: two neighbouring slices, rounded.
template <class T>
__device__ __forceinline__ void pack_pair(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// The sum, or the greatest, over the four lanes that hold one row of an accumulator.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Rows `first` .. + 16 of a matrix of `rows` rows = acc * factor, factor for the lane's rows l / 4 and l / 4 + 8. It
// goes through 16 rows of shared memory that are this warp's, to be written in whole chunks of 16 bytes: the lanes of a
// row write 4 bytes each there, 8 rows in 8 different chunks of the banks.
template <class T, int DIM>
__device__ __forceinline__ void store_rows(
    const float (&acc)[DIM / 8][4], const float (&factor)[2], T* scratch, T* matrix, int64_t stride, int first,
    int rows) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  __syncwarp();
#pragma unroll
  for (int c = 0; c < DIM / 8; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      T* at = scratch + Swizzle<DIM>::at(g + 8 * i, c) + 2 * t;
      *reinterpret_cast<uint32_t*>(at) = pack<T>(acc[c][2 * i] * factor[i], acc[c][2 * i + 1] * factor[i]);
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane_id(); i < 16 * (DIM / 8); i += kLanes) {
    const int row = i / (DIM / 8), chunk = i % (DIM / 8);
    if (first + row >= rows) break;
    *reinterpret_cast<Vector<T, 8>*>(matrix + static_cast<int64_t>(first + row) * stride + chunk * 8) =
        *reinterpret_cast<const Vector<T, 8>*>(scratch + Swizzle<DIM>::at(row, chunk));
  }
  __syncwarp();
}

// Launches `blocks` for every head of every image, at most 65535 images at a time: so many fit a grid.
template <class P>
void launch_blocks(
    const Device& device, void (*kernel)(P), int64_t images, int64_t heads, int64_t blocks, int threads, size_t shared,
    P problem) {
  constexpr int64_t kMost = 65535;
  if (heads > kMost) throw error("attention: ", heads, " heads; accepted: up to ", kMost);
  if (blocks == 0) return;
  for (int64_t first = 0; first < images; first += kMost) {
    problem.first_image = first;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(heads),
                    static_cast<unsigned>(images - first < kMost ? images - first : kMost));
    launch(device, kernel, grid, threads, shared, problem);
  }
}

using Labelled = std::initializer_list<std::pair<const char*, const Array*>>;

// That all are (B, T, H, d) in q's dtype, T as q's for those `like_q` and as k's for those `like_k`, with a unit last
// stride, other strides that are multiples of 8 and data at a multiple of 16 bytes: what is copied by 16 bytes.
inline void check_heads(const Array& q, const Array& k, Labelled like_q, Labelled like_k) {
  const auto check = [&](const char* label, const Array& x, int64_t tokens) {
    const int64_t expected[] = {q.size[0], tokens, q.size[2], q.size[3]};
    if (x.dims != 4) throw error("attention: ", label, " of ", x.dims, " dimensions; accepted: (B, T, H, d)");
    if (x.dtype != q.dtype) throw error("attention: ", label, " in ", name(x.dtype), "; accepted: q's ", name(q.dtype));
    bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride[3] == 1;
    for (int i = 0; i < 4; ++i) {
      if (x.size[i] != expected[i]) {
        throw error("attention: ", label, " with ", x.size[i], " in dimension ", i, "; accepted: ", expected[i]);
      }
      aligned = aligned && (i == 3 || x.size[i] == 1 || x.stride[i] % 8 == 0);
    }
    if (tokens > INT32_MAX / 2) throw error("attention: ", tokens, " tokens; accepted: up to 2^30");
    if (!aligned && x.elements() > 0) {
      throw error("attention: ", label, " with strides (", x.stride[0], ", ", x.stride[1], ", ", x.stride[2], ", ",
                  x.stride[3], "); accepted: a last stride of 1, others multiples of 8, data at a multiple of 16",
                  " bytes");
    }
  };
  check("q", q, q.size[1]);
  check("k", k, k.size[1]);
  for (const auto& [label, x] : like_q) check(label, *x, q.size[1]);
  for (const auto& [label, x] : like_k) check(label, *x, k.size[1]);
}

// The head dims that are compiled, a bit for each of 32, 40, ... 128: all, unless a build asks for less (build.py).
#ifndef FASTVIT_HEAD_DIMS
#define FASTVIT_HEAD_DIMS 0x1fff
#endif

// f.template operator()<T, DIM>() for q's dtype and head dim.
template <class F>
void with_dtype_and_dim(const Array& q, const F& f) {
  const auto with = [&]<class T, int DIM>() {
    if constexpr ((FASTVIT_HEAD_DIMS >> (DIM / 8 - 4) & 1) != 0) {
      if (q.size[3] == DIM) return f.template operator()<T, DIM>(), true;
    }
    return false;
  };
  const auto with_dim = [&]<class T, int... EIGHTHS>(T, std::integer_sequence<int, EIGHTHS...>) {
    if ((with.template operator()<T, 32 + 8 * EIGHTHS>() || ...)) return;
    const bool built = FASTVIT_HEAD_DIMS == 0x1fff;
    throw error("attention: head dim ", q.size[3], "; accepted: multiples of 8 from 32 to 128",
                built ? "" : " that FASTVIT_HEAD_DIMS named in this build");
  };
  constexpr std::make_integer_sequence<int, 13> dims;
  if (q.dtype == DType::float16) return with_dim(half(), dims);
  if (q.dtype == DType::bfloat16) return with_dim(bfloat16(), dims);
  throw error("attention: dtype ", name(q.dtype), "; accepted: float16, bfloat16");
}

}  // namespace fastvit::sm80
