// The linear layer and its two gradients for compute capability 8.0 and later: one GEMM (gemm_sm80.cuh) read three
// ways, and everything that surrounds it in a Vision Transformer in its epilogue, in float32, rounded once.
//
//   forward           out (m, n) = x (m, k) weight (n, k)^T           both operands k_major
//   folded forward    the same, where the LayerNorm of x is left to the epilogue
//   input gradient    dx (m, k) = dout (m, n) weight (n, k)           contracted over n: weight is mn_major
//   weight gradient   partials[s] (n, k) = dout (m, n)^T x (m, k)     contracted over a split of m: both are mn_major
//
// Nothing is transposed or copied in memory: every operand is read where it lies, by rows, 16 bytes a thread. x, weight
// and dout come from L2 once per tile of the other operand (tiles are walked in groups that share it), and everything
// the epilogue touches is read or written once, a row's 64 columns by 8 neighbouring lanes.
//
// LayerScale's gamma multiplies dout's columns in the input gradient: in registers, between ldmatrix and mma, in
// float32 and then rounded, as (gamma * dout) in the weight's dtype would be in memory. The column sums of dout that
// the bias needs are one more product of the fragments at hand, with ones, in the blocks of the first column of tiles.
//
// The activation and the dtypes of bias, gamma, residual and result are chosen at run time: a uniform branch for each 8
// values of the epilogue, against k products for each, and a third of the kernels to compile.
#include <algorithm>
#include <iterator>

#include "activations.cuh"
#include "linear_sm80_tiles.h"
#include "ops.h"

namespace fastvit::sm80 {
namespace {

// A matrix or vector in one of the floating dtypes, or none.
struct Values {
  void* data = nullptr;
  DType dtype = DType::float32;

  Values() = default;
  explicit Values(const Array& array) : data(array.data), dtype(array.dtype) {}
  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
};

// f(T{}) for the T that `dtype` names.
template <class F>
__device__ __forceinline__ auto with_dtype(DType dtype, F&& f) {
  if (dtype == DType::float32) return f(float{});
  if (dtype == DType::float16) return f(half{});
  return f(bfloat16{});
}

// values = from[at ..], which need not be aligned; `otherwise` where there is nothing.
__device__ __forceinline__ void load8(float (&values)[8], const Values& from, int at, bool inside, float otherwise) {
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = otherwise;
  if (!from || !inside) return;
  with_dtype(from.dtype, [&](auto zero) {
    using T = decltype(zero);
    T loaded[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) loaded[i] = static_cast<const T*>(from.data)[at + i];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = to_float(loaded[i]);
  });
}

template <class T>
__device__ __forceinline__ void store8(void* to, int64_t at, const float (&values)[8]) {
  constexpr int kLane = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < 8; i += kLane) {
    Vector<T, kLane> part;
#pragma unroll
    for (int e = 0; e < kLane; ++e) part.at[e] = from_float<T>(values[i + e]);
    *reinterpret_cast<Vector<T, kLane>*>(static_cast<T*>(to) + at + i) = part;
  }
}

__device__ __forceinline__ void store8(const Values& to, int64_t at, const float (&values)[8]) {
  with_dtype(to.dtype, [&](auto zero) { store8<decltype(zero)>(to.data, at, values); });
}

__device__ __forceinline__ Beside beside(
    const void* matrix, int64_t stride, int element_bytes, Origin origin, int rows, int columns) {
  if (!matrix) return {};
  const int64_t corner = (origin.row * stride + origin.column) * element_bytes;
  return {
      static_cast<const char*>(matrix) + corner, stride * element_bytes, element_bytes, rows - origin.row,
      columns - origin.column};
}

template <class T>
__device__ __forceinline__ T* shared_tiles() {
  return reinterpret_cast<T*>(shared_memory());
}

struct Forward {
  const void* x;  // (m, k) T, rows x_stride apart
  int64_t x_stride;
  const void* weight;  // (n, k) T
  int m, n, k;
  Values bias;             // (n,) or none
  Values gamma;            // (n,) or none
  const float* row_scale;  // or none: row i takes entry i / rows_per_image
  int rows_per_image;
  Values residual;  // (m, n) or none, rows residual_stride apart
  int64_t residual_stride;
  Values out;    // (m, n)
  void* preact;  // (m, n) T or none
  Activation activation;
  // Folded alone: what bias and gamma are to the columns, and the LayerNorm of the rows.
  Values sums;        // (n,) float32
  const float* mean;  // (m,)
  const float* rstd;  // (m,)
};

// Folded: x is not normalised yet, weight is multiplied by the norm's weight. The row's norm is taken from the sums:
// rstd * (y - mean * sums) + bias. Then there is no gamma, no row_scale and no residual.
template <class T, int choice, bool folded>
__global__ void __launch_bounds__(kLinearTiles[choice].tile.threads(), kLinearTiles[choice].blocks)
    linear_forward_kernel(const __grid_constant__ Forward p) {
  constexpr Tile tile = kLinearTiles[choice].tile;
  using G = Gemm<T, tile, Layout::k_major, Layout::k_major>;
  const Origin origin = tile_origin(tile, blockIdx.x, p.m, p.n);
  typename G::LoaderA x(p.x, p.x_stride, origin.row, p.m, 0, p.k);
  typename G::LoaderB weight(p.weight, p.k, origin.column, p.n, 0, p.k);
  typename G::Sum sum = {};
  G::multiply(sum, x, weight, (p.k + tile.k - 1) / tile.k, shared_tiles<T>());

  const int column = origin.column + G::template piece_column<8>();
  const bool in_columns = column < p.n;
  typename G::template Pieces<8> pieces(
      shared_memory(),
      beside(p.residual.data, p.residual_stride, p.out.dtype == DType::float32 ? 4 : 2, origin, p.m, p.n));
  float bias[8], of_column[8];  // gamma or, folded, sums: a lane keeps its columns
  load8(bias, p.bias, column, in_columns, 0);
  load8(of_column, folded ? p.sums : p.gamma, column, in_columns, 1);
  pieces.for_each(sum, [&](int within, float (&y)[8], const char* piece) {
    const int row = origin.row + within;
    if (row >= p.m || !in_columns) return;
    const int64_t at = static_cast<int64_t>(row) * p.n + column;
    if constexpr (folded) {
      const float mean = p.mean[row], rstd = p.rstd[row];
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = fmaf(rstd, fmaf(-mean, of_column[i], y[i]), bias[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] += bias[i];
      if (p.preact) store8<T>(p.preact, at, y);
    }
    with_activation(p.activation, [&](auto act) {
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = act(y[i]).value;
    });
    if constexpr (folded) return store8<T>(p.out.data, at, y);
    const float scale = p.row_scale ? p.row_scale[row / p.rows_per_image] : 1;
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] *= of_column[i] * scale;
    with_dtype(p.out.dtype, [&](auto zero) {
      using Out = decltype(zero);
      if (p.residual) {
        float residual[8];
        G::template load_piece<Out>(residual, piece);
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] += residual[i];
      }
      store8<Out>(p.out.data, at, y);
    });
  });
}

struct InputGradient {
  const void* dout;  // (m, n) T, rows dout_stride apart
  int64_t dout_stride;
  const void* weight;  // (n, k) T
  int m, n, k;
  Values gamma;        // (n,), or none
  const void* preact;  // (m, k) T, or none
  void* hidden;        // (m, k) T, or none
  Values dx;           // (m, k)
  Activation activation;
};

// Multiplies the columns of A's fragments, rounded to T again. This lane's four of the next 16 are on their way, as
// they lie in memory, while the last 16 are multiplied.
template <class T>
struct ScaleColumns {
  const Values& scale;
  int size;
  uint32_t next[4];

  __device__ __forceinline__ ScaleColumns(const Values& scale, int size) : scale(scale), size(size) { load_next(0); }

  __device__ __forceinline__ void load_next(int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = k + threadIdx.x % 4 * 2 + i / 2 * 8 + i % 2;
      next[i] = 0;
      if (column < size) {
        next[i] = scale.dtype == DType::float32 ? static_cast<const uint32_t*>(scale.data)[column]
                                                : static_cast<const uint16_t*>(scale.data)[column];
      }
    }
  }

  template <int blocks>
  __device__ __forceinline__ void operator()(uint32_t (&a)[blocks][4], int k) {
    float by[4];
    with_dtype(scale.dtype, [&](auto zero) {
#pragma unroll
      for (int i = 0; i < 4; ++i) by[i] = to_float(*reinterpret_cast<const decltype(zero)*>(&next[i]));
    });
    load_next(k + 16);
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // a[0], a[1] are columns 2t, 2t + 1; a[2], a[3] those 8 further
        const auto pair = *reinterpret_cast<const Vector<T, 2>*>(&a[i][j]);
        a[i][j] = pack<T>(to_float(pair.at[0]) * by[j / 2 * 2], to_float(pair.at[1]) * by[j / 2 * 2 + 1]);
      }
    }
  }
};

template <class T, int choice, bool scaled>
__global__ void __launch_bounds__(kLinearTiles[choice].tile.threads(), kLinearTiles[choice].blocks)
    linear_input_gradient_kernel(const __grid_constant__ InputGradient p) {
  constexpr Tile tile = kLinearTiles[choice].tile;
  using G = Gemm<T, tile, Layout::k_major, Layout::mn_major>;
  const Origin origin = tile_origin(tile, blockIdx.x, p.m, p.k);
  typename G::LoaderA dout(p.dout, p.dout_stride, origin.row, p.m, 0, p.n);
  typename G::LoaderB weight(p.weight, p.k, origin.column, p.k, 0, p.n);
  typename G::Sum sum = {};
  const int steps = (p.n + tile.k - 1) / tile.k;
  if constexpr (scaled) {
    G::multiply(sum, dout, weight, steps, shared_tiles<T>(), ScaleColumns<T>(p.gamma, p.n));
  } else {
    G::multiply(sum, dout, weight, steps, shared_tiles<T>());
  }

  const int column = origin.column + G::template piece_column<8>();
  typename G::template Pieces<8> pieces(shared_memory(), beside(p.preact, p.k, 2, origin, p.m, p.k));
  pieces.for_each(sum, [&](int within, float (&dx)[8], const char* piece) {
    const int row = origin.row + within;
    if (row >= p.m || column >= p.k) return;
    const int64_t at = static_cast<int64_t>(row) * p.k + column;
    if (p.preact) {
      float hidden[8];
      G::template load_piece<T>(hidden, piece);
      with_activation(p.activation, [&](auto act) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const Activated y = act(hidden[i]);
          hidden[i] = y.value;
          dx[i] *= y.slope;
        }
      });
      store8<T>(p.hidden, at, hidden);
    }
    store8(p.dx, at, dx);
  });
}

struct WeightGradient {
  const void* dout;  // (m, n) T, rows dout_stride apart
  int64_t dout_stride;
  const void* x;  // (m, k) T, rows x_stride apart
  int64_t x_stride;
  int m, n, k, rows;     // rows of each split
  float* partials;       // (splits, n, k)
  float* bias_partials;  // (splits, n), or none
};

// Adds A's fragments along k, as a product with ones: every column of the result is the sum of A's row.
template <class T, int blocks>
struct SumRows {
  float at[blocks][4] = {};
  bool wanted;

  __device__ __forceinline__ explicit SumRows(bool wanted) : wanted(wanted) {}

  __device__ __forceinline__ void operator()(uint32_t (&a)[blocks][4], int) {
    if (!wanted) return;
    const uint32_t ones[2] = {pack<T>(1, 1), pack<T>(1, 1)};
#pragma unroll
    for (int i = 0; i < blocks; ++i) ptx::mma<T>(at[i], a[i], ones);
  }
};

template <class T, int choice>
__global__ void __launch_bounds__(kLinearTiles[choice].tile.threads(), kLinearTiles[choice].blocks)
    linear_weight_gradient_kernel(const __grid_constant__ WeightGradient p) {
  constexpr Tile tile = kLinearTiles[choice].tile;
  using G = Gemm<T, tile, Layout::mn_major, Layout::mn_major>;
  const Origin origin = tile_origin(tile, blockIdx.x, p.n, max(p.k, 1));
  const int64_t split = blockIdx.y;
  const int begin = static_cast<int>(min(split * p.rows, static_cast<int64_t>(p.m))), end = min(begin + p.rows, p.m);
  typename G::LoaderA dout(p.dout, p.dout_stride, origin.row, p.n, begin, end);
  typename G::LoaderB x(p.x, p.x_stride, origin.column, p.k, begin, end);
  typename G::Sum sum = {};
  SumRows<T, G::kBlocksM> rows(p.bias_partials && origin.column == 0 && G::warp_n() == 0);
  G::multiply(sum, dout, x, (end - begin + tile.k - 1) / tile.k, shared_tiles<T>(), rows);

  if (rows.wanted && threadIdx.x % 4 == 0) {
    const int first = origin.row + G::warp_m() * G::kWarpM + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2 * G::kBlocksM; ++i) {
      if (first + 8 * i < p.n) p.bias_partials[split * p.n + first + 8 * i] = rows.at[i / 2][i % 2 * 2];
    }
  }
  const int column = origin.column + G::template piece_column<4>();
  float* const to = p.partials + split * p.n * p.k + column;
  G::template for_each_piece<4>(sum, shared_memory(), [&](int within, float (&g)[4]) {
    const int row = origin.row + within;
    if (row >= p.n || column >= p.k) return;
    *reinterpret_cast<Vector<float, 4>*>(to + static_cast<int64_t>(row) * p.k) = {g[0], g[1], g[2], g[3]};
  });
}

// (rows, columns), each row a whole number of 16-byte pieces; `packed`: without gaps between them.
void expect_matrix(
    const char* op, const char* name, const Array& matrix, int64_t rows, int64_t columns, bool packed = true) {
  if (matrix.dims != 2 || matrix.size[0] != rows || matrix.size[1] != columns) {
    throw error(
        op, ": ", name, " is (", matrix.size[0], ", ", matrix.size[1], "); accepted: (", rows, ", ", columns, ")");
  }
  if (matrix.elements() == 0) return;
  if (columns > 1 && matrix.stride[1] != 1) {
    throw error(op, ": ", name, " has a last stride of ", matrix.stride[1], "; accepted: 1");
  }
  const int64_t piece = 16 / bytes(matrix.dtype), stride = matrix.stride[0];
  if (rows > 1 && (packed ? stride != columns : stride % piece != 0)) {
    throw error(
        op, ": ", name, " has rows ", stride, " elements apart; accepted: ",
        packed ? columns : piece, packed ? "" : " or a multiple");
  }
  if (reinterpret_cast<uintptr_t>(matrix.data) % 16 != 0) {
    throw error(op, ": ", name, " begins at an address that 16 does not divide; accepted: 16-byte aligned");
  }
}

void expect_vector(const char* op, const char* name, const Array& vector, int64_t size) {
  if (vector && (vector.dims != 1 || vector.size[0] != size || (size > 1 && vector.stride[0] != 1))) {
    throw error(op, ": ", name, " is not a contiguous vector; accepted: ", size, " elements");
  }
}

void expect_dtype(const char* op, const char* name, const Array& array, DType dtype) {
  if (!array || array.dtype == dtype) return;
  throw error(op, ": ", name, " is ", fastvit::name(array.dtype), "; accepted: ", fastvit::name(dtype));
}

void expect_sizes(const char* op, int64_t m, int64_t n, int64_t k) {
  if (n % 8 != 0 || k % 8 != 0) throw error(op, ": weight is (", n, ", ", k, "); accepted: multiples of 8");
  if (std::max({m, n, k}) > INT32_MAX / 2) throw error(op, ": sizes ", m, ", ", n, ", ", k, "; accepted: below 2^30");
}

// launch_with(std::integral_constant<int, choice>, T{}) for the T and the choice given.
template <class F>
void with_kernel(const char* op, DType dtype, int choice, F&& launch_with) {
  const auto with_tile = [&](auto zero) {
    if (choice == kLarge) return launch_with(std::integral_constant<int, kLarge>{}, zero);
    if (choice == kMedium) return launch_with(std::integral_constant<int, kMedium>{}, zero);
    return launch_with(std::integral_constant<int, kSmall>{}, zero);
  };
  if (dtype == DType::float16) return with_tile(half{});
  if (dtype == DType::bfloat16) return with_tile(bfloat16{});
  throw error(op, ": operands are ", name(dtype), "; accepted: float16, bfloat16");
}

dim3 linear_grid(int choice, int64_t rows, int64_t columns, int64_t splits = 1) {
  const Tile& tile = kLinearTiles[choice].tile;
  return dim3(static_cast<unsigned>(ceil_div(rows, tile.m) * ceil_div(columns, tile.n)), static_cast<unsigned>(splits));
}

// What every forward product has: x, weight, bias, activation and out.
Forward forward_of(
    const char* op, const Array& x, const Array& weight, const Array& bias, const std::string& activation,
    const Array& out) {
  const int64_t m = x.size[0], n = weight.size[0], k = weight.size[1];
  expect_sizes(op, m, n, k);
  expect_matrix(op, "x", x, m, k, false);
  expect_matrix(op, "weight", weight, n, k);
  expect_matrix(op, "out", out, m, n);
  expect_vector(op, "bias", bias, n);
  expect_dtype(op, "x", x, weight.dtype);
  Forward p = {x.data, x.stride[0], weight.data, static_cast<int>(m), static_cast<int>(n), static_cast<int>(k)};
  p.bias = Values(bias);
  p.out = Values(out);
  p.activation = parse_activation(op, activation);
  return p;
}

template <bool folded>
void launch_forward(const char* op, const Device& device, DType dtype, const Forward& p) {
  if (p.m == 0 || p.n == 0) return;
  const int choice = choose_linear_tile(device, p.m, p.n);
  with_kernel(op, dtype, choice, [&](auto tile, auto zero) {
    using T = decltype(zero);
    using G = Gemm<T, kLinearTiles[tile.value].tile, Layout::k_major, Layout::k_major>;
    const auto kernel = linear_forward_kernel<T, tile.value, folded>;
    launch(device, kernel, linear_grid(choice, p.m, p.n), G::kThreads, G::kSharedBytes, p);
  });
}

}  // namespace

void linear_forward(
    const Device& device, const Array& x, const Array& weight, const Array& bias, const std::string& activation,
    const Array& residual, const Array& gamma, const Array& row_scale, const Array& out, const Array& preact) {
  constexpr const char* op = "linear_forward";
  Forward p = forward_of(op, x, weight, bias, activation, out);
  if (residual) expect_matrix(op, "residual", residual, p.m, p.n, false);
  if (preact) expect_matrix(op, "preact", preact, p.m, p.n);
  expect_vector(op, "gamma", gamma, p.n);
  expect_dtype(op, "preact", preact, weight.dtype);
  expect_dtype(op, "out", out, residual ? residual.dtype : weight.dtype);
  expect_dtype(op, "row_scale", row_scale, DType::float32);
  if (row_scale && (row_scale.size[0] == 0 ? p.m : p.m % row_scale.size[0])) {
    throw error(op, ": ", row_scale.size[0], " row scales for ", p.m, " rows; accepted: a number that divides the rows");
  }
  p.gamma = Values(gamma);
  p.row_scale = row_scale.as<float>();
  p.rows_per_image = row_scale && p.m ? static_cast<int>(p.m / row_scale.size[0]) : 1;
  p.residual = Values(residual);
  p.residual_stride = residual.stride[0];
  p.preact = preact.data;
  launch_forward<false>(op, device, x.dtype, p);
}

void linear_folded_forward(
    const Device& device, const Array& x, const Array& weight, const Array& sums, const Array& offsets,
    const Array& mean, const Array& rstd, const std::string& activation, const Array& out) {
  constexpr const char* op = "linear_folded_forward";
  Forward p = forward_of(op, x, weight, offsets, activation, out);
  const auto expect = [&](const char* name, const Array& vector, int64_t size) {
    if (!vector) throw error(op, ": no ", name, "; accepted: (", size, ",) float32");
    expect_vector(op, name, vector, size);
    expect_dtype(op, name, vector, DType::float32);
  };
  expect("sums", sums, p.n);
  expect("offsets", offsets, p.n);
  expect("mean", mean, p.m);
  expect("rstd", rstd, p.m);
  expect_dtype(op, "out", out, weight.dtype);
  p.sums = Values(sums);
  p.mean = mean.as<float>();
  p.rstd = rstd.as<float>();
  launch_forward<true>(op, device, x.dtype, p);
}

void linear_input_gradient(
    const Device& device, const Array& dout, const Array& weight, const Array& gamma, const Array& preact,
    const std::string& activation, const Array& dx, const Array& hidden) {
  constexpr const char* op = "linear_input_gradient";
  const int64_t m = dout.size[0], n = weight.size[0], k = weight.size[1];
  expect_sizes(op, m, n, k);
  expect_matrix(op, "dout", dout, m, n, false);
  expect_matrix(op, "weight", weight, n, k);
  expect_matrix(op, "dx", dx, m, k);
  if (preact) expect_matrix(op, "preact", preact, m, k);
  if (hidden) expect_matrix(op, "hidden", hidden, m, k);
  expect_vector(op, "gamma", gamma, n);
  expect_dtype(op, "dout", dout, weight.dtype);
  expect_dtype(op, "preact", preact, weight.dtype);
  expect_dtype(op, "hidden", hidden, weight.dtype);
  const Activation parsed = parse_activation(op, activation);
  if (bool(preact) != bool(hidden) || bool(preact) != (parsed != Activation::none)) {
    throw error(op, ": preact, hidden and activation; accepted: all or none of them");
  }
  if (m == 0 || k == 0) return;
  const InputGradient p = {
      dout.data,   dout.stride[0], weight.data, static_cast<int>(m), static_cast<int>(n), static_cast<int>(k),
      Values(gamma), preact.data,  hidden.data, Values(dx),          parsed};
  const int choice = choose_linear_tile(device, m, k);
  with_kernel(op, weight.dtype, choice, [&](auto tile, auto zero) {
    using T = decltype(zero);
    using G = Gemm<T, kLinearTiles[tile.value].tile, Layout::k_major, Layout::mn_major>;
    const auto kernel = gamma ? linear_input_gradient_kernel<T, tile.value, true>
                              : linear_input_gradient_kernel<T, tile.value, false>;
    launch(device, kernel, linear_grid(choice, m, k), G::kThreads, G::kSharedBytes, p);
  });
}

void linear_weight_gradient(
    const Device& device, const Array& dout, const Array& x, const Array& partials, const Array& bias_partials) {
  constexpr const char* op = "linear_weight_gradient";
  const int64_t m = x.size[0], n = dout.size[1], k = x.size[1], splits = partials.size[0];
  expect_sizes(op, m, n, k);
  if (splits < 1 || splits > 65535) throw error(op, ": ", splits, " splits; accepted: 1 to 65535");
  expect_matrix(op, "dout", dout, m, n, false);
  expect_matrix(op, "x", x, m, k, false);
  expect_dtype(op, "dout", dout, x.dtype);
  expect_dtype(op, "partials", partials, DType::float32);
  expect_dtype(op, "bias_partials", bias_partials, DType::float32);
  if (n == 0) return;  // with no rows, or no columns of x, there are still sums to write
  const int choice = choose_linear_tile(device, n, k, splits);
  const int64_t rows = ceil_div(ceil_div(m, splits), kLinearTiles[choice].tile.k) * kLinearTiles[choice].tile.k;
  const WeightGradient p = {
      dout.data, dout.stride[0], x.data, x.stride[0], static_cast<int>(m), static_cast<int>(n), static_cast<int>(k),
      static_cast<int>(rows), partials.as<float>(), bias_partials.as<float>()};
  with_kernel(op, x.dtype, choice, [&](auto tile, auto zero) {
    using T = decltype(zero);
    using G = Gemm<T, kLinearTiles[tile.value].tile, Layout::mn_major, Layout::mn_major>;
    const dim3 grid = linear_grid(choice, n, std::max<int64_t>(k, 1), splits);
    launch(device, linear_weight_gradient_kernel<T, tile.value>, grid, G::kThreads, G::kSharedBytes, p);
  });
}

// The count with the least predicted time. A split costs its rows, and the write and the read of its float32 partial
// sums: for each of these bytes a device of compute capability 8.0 could have made about 100 products.
int64_t linear_weight_gradient_splits(const Device& device, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kMost = 16, kLeastRows = 256;
  constexpr double kTrade = 100 * 8;
  int64_t best = 1;
  double least = 0;
  for (int64_t splits = 1; splits <= std::max<int64_t>(1, std::min(kMost, m / kLeastRows)); ++splits) {
    const LinearTile& tile = kLinearTiles[choose_linear_tile(device, n, k, splits)];
    const double product = linear_work(device, tile, n, k, splits) * ceil_div(m, splits);
    const double traffic = kTrade * splits * n * k / device.multiprocessors;
    if (splits == 1 || product + traffic < least) best = splits, least = product + traffic;
  }
  return best;
}

}  // namespace fastvit::sm80
