// LayerNorm with the residual add, LayerScale and drop-path before it, and its gradients (Ba et al. 2016, equations 3
// and 4; LayerScale: Touvron et al. 2021, equation 7). Both directions are bound by memory, and every element of every
// (M, D) operand is moved exactly once.
//
// A row belongs to a team: one warp up to 2048 columns (768 backward), else 2, 4, 8 or 16 warps. A warp holds CHUNKS
// neighbouring pieces of 32 N columns, and a lane N neighbours of each, 16 bytes of the widest operand: a load is of
// whole lines, and a row needs one address, for the pieces are a constant apart. The row stays in registers between its
// only load and its only store, so that the variance is the mean of squared deviations (the mean of squares minus the
// squared mean cancels). Sums over a row are shuffles; only teams of several warps meet in shared memory, and only with
// a few words.
//
// All of a row's loads are issued before the first is used. Forward, a team of narrow rows takes two at once, to have
// enough bytes under way and to read the parameters once for both. Backward, a block walks over its share of the rows,
// keeps its sums for the parameters in registers, adds its teams at the end and writes one row of partials:
// sum_partials adds those in a fixed order.
#include <algorithm>

#include "device.cuh"
#include "ops.h"
#include "vectors.cuh"

namespace fastvit {
namespace {

constexpr int kMaxWidth = 8192;
constexpr int kBlockWarps = 4;  // of a block whose teams are not wider

// Which lane of which team this thread is, and its columns: N from column(c) on, for each of CHUNKS pieces.
template <int N, int CHUNKS>
struct Team {
  int lanes;
  int team, teams;  // of the block
  int lane;
  int first;  // column

  __device__ __forceinline__ explicit Team(int lanes)
      : lanes(lanes),
        team(threadIdx.x / lanes),
        teams(blockDim.x / lanes),
        lane(threadIdx.x % lanes),
        first((lane / 32 * CHUNKS * 32 + lane % 32) * N) {}

  __device__ __forceinline__ int column(int chunk) const { return first + chunk * (32 * N); }
};

// Sums over the team's lanes, in the same order in every run and the same bits in every lane.
template <int N, int CHUNKS, int COUNT>
__device__ __forceinline__ void sum_over(const Team<N, CHUNKS>& team, float (&values)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
  }
  if (team.lanes == 32) return;
  float* of_warps = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) of_warps[threadIdx.x / 32 * COUNT + i] = values[i];
  }
  __syncthreads();
  const int warps = team.lanes / 32;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    values[i] = 0;
    for (int w = 0; w < warps; ++w) values[i] += of_warps[(team.team * warps + w) * COUNT + i];
  }
  __syncthreads();  // the next sum writes there
}

// A row's part in a lane; what lies outside the matrix is zero.
template <class T, int N, int CHUNKS>
__device__ __forceinline__ void load_row(
    Vector<Loaded<T>, N> (&out)[CHUNKS], const Matrix& m, int64_t row, bool inside, int width,
    const Team<N, CHUNKS>& team) {
  with_type<T>(m.dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(m.data) + row * m.stride + team.first;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      if (inside && team.column(c) < width) {
        load<T>(out[c], from + c * 32 * N);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) out[c].at[i] = from_float<Loaded<T>>(0);
      }
    }
  });
}

template <class T, int N, int CHUNKS>
__device__ __forceinline__ void store_row(
    const Matrix& m, int64_t row, bool inside, int width, const Team<N, CHUNKS>& team,
    const float (&values)[CHUNKS][N]) {
  with_type<T>(m.dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(m.data) + row * m.stride + team.first;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      if (inside && team.column(c) < width) store(to + c * 32 * N, values[c]);
    }
  });
}

// f(c, i, value) for the values of a parameter (D,) at the lane's columns.
template <int N, int CHUNKS, class F>
__device__ __forceinline__ void with_parameter(const Matrix& parameter, int width, const Team<N, CHUNKS>& team, F f) {
  with_type<Any>(parameter.dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(parameter.data) + team.first;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      if (team.column(c) >= width) continue;
      Vector<decltype(type), N> values;
      load<decltype(type)>(values, from + c * 32 * N);
#pragma unroll
      for (int i = 0; i < N; ++i) f(c, i, to_float(values.at[i]));
    }
  });
}

template <int N, int CHUNKS, class F>
__device__ __forceinline__ void for_each(F f) {
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
    for (int i = 0; i < N; ++i) f(c, i);
  }
}

// Of a team, forward, where a lane holds so many values of one.
constexpr int rows_at_once(int values) { return values <= 24 ? 2 : 1; }

struct Forward {
  Matrix x;         // (M, D)
  Matrix residual;  // (M, D), or none
  Matrix gamma;     // (D,), or none
  Matrix weight;    // (D,), or none
  Matrix bias;      // (D,), or none
  Matrix y;         // (M, D), or none
  Matrix stream;    // (M, D), or none: without a residual
  const float* row_scale;  // (B,), or null
  float* mean;             // (M,)
  float* rstd;             // (M,)
  int64_t rows;
  int width;
  int lanes;  // of a team
  int rows_per_image;
  float eps;
};

// X, S, Y: the dtypes of x, of the residual and of y. A lane holds CHUNKS * N values of each row. At least two or three
// blocks to a multiprocessor: left to itself, ptxas spills for more.
template <class X, class S, class Y, int N, int CHUNKS>
__global__ void __launch_bounds__(kBlockWarps * 32, N > 1 && CHUNKS * N <= 40 ? 3 : 2) layer_norm_forward_kernel(
    const __grid_constant__ Forward a) {
  constexpr int ROWS = rows_at_once(CHUNKS * N);
  const Team<N, CHUNKS> team(a.lanes);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * team.teams + team.team) * ROWS;

  Vector<Loaded<X>, N> x[ROWS][CHUNKS];
  float s[ROWS][CHUNKS][N];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) load_row<X>(x[r], a.x, first + r, first + r < a.rows, a.width, team);
  if (a.residual) {
    Vector<Loaded<S>, N> residual[ROWS][CHUNKS];
    float scale[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const bool inside = first + r < a.rows;
      load_row<S>(residual[r], a.residual, first + r, inside, a.width, team);
      scale[r] = inside && a.row_scale ? a.row_scale[static_cast<unsigned>(first + r) / a.rows_per_image] : 1;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) for_each<N, CHUNKS>([&](int c, int i) { s[r][c][i] = to_float(x[r][c].at[i]); });
    if (a.gamma) {
      with_parameter<N, CHUNKS>(a.gamma, a.width, team, [&](int c, int i, float gamma) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) s[r][c][i] *= gamma;
      });
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      with_type<S>(a.stream.dtype, [&](auto type) {
        for_each<N, CHUNKS>([&](int c, int i) {  // rounded: the statistics are those of what backward will read
          const float sum = fmaf(s[r][c][i], scale[r], to_float(residual[r][c].at[i]));
          s[r][c][i] = to_float(from_float<decltype(type)>(sum));
        });
      });
      store_row<S>(a.stream, first + r, first + r < a.rows, a.width, team, s[r]);
    }
  } else {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) for_each<N, CHUNKS>([&](int c, int i) { s[r][c][i] = to_float(x[r][c].at[i]); });
  }

  float mean[ROWS] = {}, rstd[ROWS] = {};
#pragma unroll
  for (int r = 0; r < ROWS; ++r) for_each<N, CHUNKS>([&](int c, int i) { mean[r] += s[r][c][i]; });
  sum_over(team, mean);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    mean[r] /= a.width;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      if (team.column(c) >= a.width) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        s[r][c][i] -= mean[r];
        rstd[r] = fmaf(s[r][c][i], s[r][c][i], rstd[r]);
      }
    }
  }
  sum_over(team, rstd);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    rstd[r] = rsqrtf(rstd[r] / a.width + a.eps);
    if (team.lane == 0 && first + r < a.rows) {
      a.mean[first + r] = mean[r];
      a.rstd[first + r] = rstd[r];
    }
  }
  if (!a.y) return;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) for_each<N, CHUNKS>([&](int c, int i) { s[r][c][i] *= rstd[r]; });
  if (a.weight) {
    with_parameter<N, CHUNKS>(a.weight, a.width, team, [&](int c, int i, float weight) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) s[r][c][i] *= weight;
    });
  }
  if (a.bias) {
    with_parameter<N, CHUNKS>(a.bias, a.width, team, [&](int c, int i, float bias) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) s[r][c][i] += bias;
    });
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) store_row<Y>(a.y, first + r, first + r < a.rows, a.width, team, s[r]);
}

// Of a multiprocessor, backward, where a lane holds so many values of a row: what they leave each other of the 65536
// registers is enough for five float32 values a column and the loads under way. (16 are also what 8192 columns need.)
constexpr int backward_warps(int values) { return values <= 16 ? 16 : 8; }

struct Backward {
  Matrix dy;          // (M, D)
  Matrix dstream;     // (M, D), or none
  Matrix normalised;  // (M, D)
  Matrix weight;      // (D,), or none
  Matrix branch;      // (M, D), or none: where dgamma is not wanted
  Matrix gamma;       // (D,), or none
  Matrix dx;          // (M, D)
  Matrix dresidual;   // (M, D), or none: without a branch
  const float* mean;       // (M,)
  const float* rstd;       // (M,)
  const float* row_scale;  // (B,), or null
  float* partials;         // (gridDim.x, 2 or 3, D), or null
  int64_t rows;
  int width;
  int lanes;  // of a team
  int rows_per_image;
};

// sums[c][i] of every team added up by the first, which writes the row out (D,). They meet in shared memory with lane
// after lane in neighbouring words: no bank conflicts.
template <int N, int CHUNKS>
__device__ __forceinline__ void write_partials(
    float* out, int width, const Team<N, CHUNKS>& team, float (&sums)[CHUNKS][N]) {
  float* meeting = reinterpret_cast<float*>(shared_memory());  // (CHUNKS, N, lanes)
  for (int giver = team.teams - 1; giver > 0; --giver) {
    __syncthreads();
    if (team.team == giver) {
      for_each<N, CHUNKS>([&](int c, int i) { meeting[(c * N + i) * team.lanes + team.lane] = sums[c][i]; });
    }
    __syncthreads();
    if (team.team == giver - 1) {
      for_each<N, CHUNKS>([&](int c, int i) { sums[c][i] += meeting[(c * N + i) * team.lanes + team.lane]; });
    }
  }
  if (team.team > 0) return;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    if (team.column(c) < width) store(out + team.column(c), sums[c]);
  }
}

// X, S, Y: the dtypes of the branch and dx; of what was normalised and the stream's gradients; of dy.
template <class X, class S, class Y, int N, int CHUNKS>
__global__ void __launch_bounds__(backward_warps(CHUNKS * N) * 32) layer_norm_backward_kernel(
    const __grid_constant__ Backward a) {
  constexpr bool kEarly = CHUNKS * N != 16;  // where 16 values a lane leave no registers, 16 warps hide the latency
  const Team<N, CHUNKS> team(a.lanes);
  float dweight[CHUNKS][N] = {}, dbias[CHUNKS][N] = {}, dgamma[CHUNKS][N] = {};

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * team.teams; first < a.rows;
       first += static_cast<int64_t>(gridDim.x) * team.teams) {
    const int64_t row = first + team.team;
    const bool inside = row < a.rows;
    Vector<Loaded<S>, N> x[CHUNKS], dstream[CHUNKS];
    Vector<Loaded<Y>, N> dy[CHUNKS];
    Vector<Loaded<X>, N> branch[CHUNKS];
    load_row<S>(x, a.normalised, row, inside, a.width, team);
    load_row<Y>(dy, a.dy, row, inside, a.width, team);
    if (a.dstream) load_row<S>(dstream, a.dstream, row, inside, a.width, team);
    if (kEarly && a.branch) load_row<X>(branch, a.branch, row, inside, a.width, team);
    const float mean = inside ? a.mean[row] : 0, rstd = inside ? a.rstd[row] : 0;

    // Three times over, from registers that hold two: past the edge it only meets dy = 0.
    const auto xhat = [&](int c, int i) { return (to_float(x[c].at[i]) - mean) * rstd; };
    float g[CHUNKS][N];
    for_each<N, CHUNKS>([&](int c, int i) { g[c][i] = to_float(dy[c].at[i]); });
    if (a.partials) {
      for_each<N, CHUNKS>([&](int c, int i) {
        dweight[c][i] = fmaf(g[c][i], xhat(c, i), dweight[c][i]);
        dbias[c][i] += g[c][i];
      });
    }
    if (a.weight) {
      with_parameter<N, CHUNKS>(a.weight, a.width, team, [&](int c, int i, float weight) { g[c][i] *= weight; });
    }
    float along[2] = {};  // one, xhat
    for_each<N, CHUNKS>([&](int c, int i) {
      along[0] += g[c][i];
      along[1] = fmaf(g[c][i], xhat(c, i), along[1]);
    });
    sum_over(team, along);
    along[0] /= a.width;
    along[1] /= a.width;
    for_each<N, CHUNKS>([&](int c, int i) { g[c][i] = (g[c][i] - along[0] - xhat(c, i) * along[1]) * rstd; });
    if (a.dstream) {
      for_each<N, CHUNKS>([&](int c, int i) { g[c][i] += to_float(dstream[c].at[i]); });
    }

    if (a.dresidual) {
      store_row<S>(a.dresidual, row, inside, a.width, team, g);
      if (a.row_scale) {
        const float scale = inside ? a.row_scale[static_cast<unsigned>(row) / a.rows_per_image] : 0;
        for_each<N, CHUNKS>([&](int c, int i) { g[c][i] *= scale; });
      }
      if (a.gamma) {
        if (a.branch) {
          if (!kEarly) load_row<X>(branch, a.branch, row, inside, a.width, team);
          for_each<N, CHUNKS>([&](int c, int i) {
            dgamma[c][i] = fmaf(g[c][i], to_float(branch[c].at[i]), dgamma[c][i]);
          });
        }
        with_parameter<N, CHUNKS>(a.gamma, a.width, team, [&](int c, int i, float gamma) { g[c][i] *= gamma; });
      }
    }
    store_row<X>(a.dx, row, inside, a.width, team, g);
  }

  if (!a.partials) return;
  float* partials = a.partials + static_cast<int64_t>(blockIdx.x) * (a.gamma ? 3 : 2) * a.width;
  write_partials(partials, a.width, team, dweight);
  write_partials(partials + a.width, a.width, team, dbias);
  if (a.gamma) write_partials(partials + 2 * a.width, a.width, team, dgamma);
}

template <class X_, class S_, class Y_, int N_>
struct Types {
  using X = X_;
  using S = S_;
  using Y = Y_;
  static constexpr int N = N_;  // 16 bytes of the widest
};

// f(Types<...>()) for the dtypes that models have: all the same, a float32 residual stream, float32 rounded for the
// next product; else, or where rows can't be read in vectors, the kernel that takes everything value by value.
template <class F>
void with_types(DType x, DType s, DType y, bool vectors, F f) {
  bool done = false;
  const auto attempt = [&](auto types) {
    using T = decltype(types);
    const bool same = x == dtype_of<typename T::X> && s == dtype_of<typename T::S> && y == dtype_of<typename T::Y>;
    if (done || !vectors || !same) return;
    done = true;
    f(types);
  };
  attempt(Types<half, half, half, 8>());
  attempt(Types<bfloat16, bfloat16, bfloat16, 8>());
  attempt(Types<float, float, float, 4>());
  attempt(Types<half, float, half, 4>());
  attempt(Types<bfloat16, float, bfloat16, 4>());
  attempt(Types<float, float, half, 4>());
  attempt(Types<float, float, bfloat16, 4>());
  if (!done) f(Types<Any, Any, Any, 1>());
}

// f(constant) with the least of VALUES, values that a lane holds, that covers a row of `width` by `lanes`.
template <int... VALUES, class F>
void with_values(int width, int lanes, F f) {
  bool done = false;
  const auto attempt = [&](auto values) {
    if (!done && values() * lanes >= width) done = true, f(values);
  };
  (attempt(std::integral_constant<int, VALUES>()), ...);
}

// The lanes that share a row of which one warp can hold `most`.
int lanes_of(int64_t width, int most) {
  int warps = 1;
  while (warps * most < width) warps *= 2;
  return 32 * warps;
}

constexpr int kForwardMost = 64 * 32, kBackwardMost = 24 * 32;

int backward_threads(int64_t width) {
  const int lanes = lanes_of(width, kBackwardMost);
  return lanes > kBlockWarps * 32 ? lanes : kBlockWarps * 32;
}

// Outside of the kernels' contract: rows are counted in 32 bits where an image is looked up.
void require_sizes(const char* op, int64_t rows, int64_t width) {
  require(width <= kMaxWidth, op, ": width ", width, "; accepted: up to ", kMaxWidth);
  require(rows < (int64_t{1} << 31), op, ": ", rows, " rows; accepted: fewer than 2^31");
}

}  // namespace

void layer_norm_forward(
    const Device& device, const Array& x, const Array& weight, const Array& bias, double eps, const Array& residual,
    const Array& gamma, const Array& row_scale, const Array& y, const Array& stream, const Array& mean,
    const Array& rstd) {
  const char* op = "layer_norm_forward";
  const int64_t rows = x.size[0], width = x.size[1];
  require_matrix(op, "x", x, rows, width);
  if (y) require_contiguous(op, "y", y, rows, width);
  require_sizes(op, rows, width);
  require_vector(op, "weight", weight, width);
  require_vector(op, "bias", bias, width);
  require_vector(op, "gamma", gamma, width);
  require(static_cast<bool>(residual) == static_cast<bool>(stream), op, ": a residual and a stream go together");
  if (residual) {
    require_matrix(op, "residual", residual, rows, width);
    require_contiguous(op, "stream", stream, rows, width);
    require(stream.dtype == residual.dtype, op, ": the stream is ", name(stream.dtype), "; accepted: the residual's ",
            name(residual.dtype));
  }
  if (rows == 0 || width == 0) return;

  const int lanes = lanes_of(width, kForwardMost);
  const Forward a{
      matrix(x), matrix(residual), matrix(gamma), matrix(weight), matrix(bias), matrix(y), matrix(stream),
      row_scale.as<float>(), mean.as<float>(), rstd.as<float>(), rows, static_cast<int>(width), lanes,
      rows_per_image(op, row_scale, rows), static_cast<float>(eps)};
  const DType s = residual ? residual.dtype : x.dtype, to = y ? y.dtype : s;
  const int n = x.dtype == DType::float32 || s == DType::float32 || to == DType::float32 ? 4 : 8;
  bool vectors = true;
  for (const Array* each : {&x, &residual, &gamma, &weight, &bias, &y, &stream}) vectors = vectors && suits(*each, n);

  with_types(x.dtype, s, to, vectors, [&](auto types) {
    using T = decltype(types);
    with_values<8, 24, 40, 64>(a.width, lanes, [&](auto values) {
      constexpr int chunks = values() / T::N;
      constexpr int at_once = rows_at_once(values());
      int teams = kBlockWarps * 32 / lanes;
      while (teams > 1 && ceil_div(rows, teams * at_once) < device.multiprocessors) teams /= 2;
      const auto blocks = static_cast<unsigned>(ceil_div(rows, teams * at_once));
      const size_t shared = lanes == 32 ? 0 : kBlockWarps * at_once * sizeof(float);
      launch(device, layer_norm_forward_kernel<typename T::X, typename T::S, typename T::Y, T::N, chunks>, dim3(blocks),
             teams * lanes, shared, a);
    });
  });
}

int64_t layer_norm_programs(const Device& device, int64_t rows, int64_t width) {
  const int lanes = lanes_of(width, kBackwardMost), threads = backward_threads(width);
  const int warps = backward_warps(static_cast<int>(ceil_div(width, lanes)));
  const int64_t resident = static_cast<int64_t>(device.multiprocessors) * (warps * 32 / threads);
  return std::min(ceil_div(rows, threads / lanes), resident);
}

void layer_norm_backward(
    const Device& device, const Array& dy, const Array& dstream, const Array& normalised, const Array& weight,
    const Array& mean, const Array& rstd, const Array& branch, const Array& gamma, const Array& row_scale,
    const Array& dx, const Array& dresidual, const Array& partials) {
  const char* op = "layer_norm_backward";
  const int64_t rows = normalised.size[0], width = normalised.size[1];
  require_matrix(op, "normalised", normalised, rows, width);
  require_matrix(op, "dy", dy, rows, width);
  require_contiguous(op, "dx", dx, rows, width);
  require_sizes(op, rows, width);
  require_vector(op, "weight", weight, width);
  require_vector(op, "gamma", gamma, width);
  require(static_cast<bool>(branch) == static_cast<bool>(dresidual), op, ": a branch and a dresidual go together");
  require(branch || (!gamma && !row_scale), op, ": gamma and row_scale need a branch");
  if (dstream) require_matrix(op, "dstream", dstream, rows, width);
  if (branch) {
    require_matrix(op, "branch", branch, rows, width);
    require_contiguous(op, "dresidual", dresidual, rows, width);
    require(dresidual.dtype == normalised.dtype, op, ": dresidual is ", name(dresidual.dtype),
            "; accepted: normalised's ", name(normalised.dtype));
  }
  const int64_t programs = layer_norm_programs(device, rows, width), sums = gamma ? 3 : 2;
  require(!partials || (partials.dims == 3 && partials.dtype == DType::float32 && partials.size[0] == programs &&
                        partials.size[1] == sums && partials.size[2] == width),
          op, ": partials; accepted: (", programs, ", ", sums, ", ", width, ") float32, contiguous");
  if (rows == 0 || width == 0) return;

  const int lanes = lanes_of(width, kBackwardMost), threads = backward_threads(width);
  const Backward a{
      matrix(dy), matrix(dstream), matrix(normalised), matrix(weight), matrix(partials && gamma ? branch : Array()),
      matrix(gamma), matrix(dx), matrix(dresidual), mean.as<float>(), rstd.as<float>(), row_scale.as<float>(),
      partials.as<float>(), rows, static_cast<int>(width), lanes, rows_per_image(op, row_scale, rows)};
  const DType s = normalised.dtype;
  const int n = dx.dtype == DType::float32 || s == DType::float32 || dy.dtype == DType::float32 ? 4 : 8;
  bool vectors = (!dstream || dstream.dtype == s) && (!branch || branch.dtype == dx.dtype);
  for (const Array* each : {&dy, &dstream, &normalised, &weight, &branch, &gamma, &dx, &dresidual, &partials}) {
    vectors = vectors && suits(*each, n);
  }
  with_types(dx.dtype, s, dy.dtype, vectors, [&](auto types) {
    using T = decltype(types);
    with_values<8, 16, 24>(a.width, lanes, [&](auto values) {
      constexpr int chunks = values() / T::N;
      const size_t shared = (threads > lanes ? values() * lanes : threads / 32 * 2) * sizeof(float);
      launch(device, layer_norm_backward_kernel<typename T::X, typename T::S, typename T::Y, T::N, chunks>,
             dim3(static_cast<unsigned>(programs)), threads, shared, a);
    });
  });
}

}  // namespace fastvit
