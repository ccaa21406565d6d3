// What only passes over memory: sums of partial results, scaled and rounded rows, SwiGLU, the gradient of an
// activation, the last step of a weight's gradient, and a norm's parameters multiplied into the weight after it. Every operand is moved once, 16 bytes a lane of the widest
// operand where rows, strides and addresses allow that, else value by value in the same kernels.
//
// Rows map to blocks by lanes: a block of up to 256 threads takes several narrow rows or an even part of a wide one, so
// that few lanes idle (768 bfloat16 values are 96 lanes: two rows a block); one division finds a thread's place.
#include <algorithm>

#include "activations.cuh"
#include "ops.h"
#include "vectors.cuh"

namespace fastvit {
namespace {

constexpr int kThreads = 256;

// The lanes that share a row, and the grid: (groups of rows, parts of a row).
struct Grid {
  dim3 blocks;
  int threads;
  int lanes;
};

Grid grid_of(const char* op, int64_t rows, int64_t vectors) {
  const int64_t parts = ceil_div(vectors, kThreads), lanes = ceil_div(vectors, parts);
  const int64_t together = std::min(kThreads / lanes, rows), groups = ceil_div(rows, together);
  require(parts < 65536 && groups < (int64_t{1} << 31), op, ": ", rows, " rows of ", vectors,
          " vectors; accepted: up to 2^31 rows of 2^24");
  return {dim3(static_cast<unsigned>(groups), static_cast<unsigned>(parts)),
          static_cast<int>(ceil_div(together * lanes, 32) * 32), static_cast<int>(lanes)};
}

// f(row, column) of the one vector of N values that is this thread's.
template <int N, class F>
__device__ __forceinline__ void at_own_place(int64_t rows, int width, int lanes, F f) {
  const int together = blockDim.x / lanes, place = threadIdx.x / lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * together + place;
  const int column = (blockIdx.y * lanes + threadIdx.x % lanes) * N;
  if (place < together && row < rows && column < width) f(row, column);
}

template <class T_, int N_>
struct Typed {
  using T = T_;
  static constexpr int N = N_;
};

// f(Typed<T, N>()) for one dtype throughout and N values in 16 bytes; without `vectors`, any dtypes, value by value.
template <class F>
void with_typed(DType dtype, bool vectors, F f) {
  if (!vectors) {
    f(Typed<Any, 1>());
  } else if (dtype == DType::float32) {
    f(Typed<float, 4>());
  } else if (dtype == DType::float16) {
    f(Typed<half, 8>());
  } else {
    f(Typed<bfloat16, 8>());
  }
}

int vector_of(DType dtype) { return 16 / bytes(dtype); }

// A block has kThreads / groups lanes, each with N columns, and `groups` threads to a column, which take every
// groups-th of the S partials and then meet in shared memory: (N, groups, lanes) float32, lanes in neighbouring words.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) sum_partials_kernel(
    Matrix partials,  // (S, columns), of T
    float* sums,      // (columns,)
    int64_t count,    // S
    int columns,
    int groups) {
  const int lanes = kThreads / groups, lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int column = (blockIdx.x * lanes + lane) * N;
  float sum[N] = {};
  if (column < columns) {
#pragma unroll 8
    for (int64_t s = group; s < count; s += groups) {
      Vector<Loaded<T>, N> part;
      load<T>(part, partials, s, column);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += to_float(part.at[i]);
    }
  }
  if (groups > 1) {
    float* meeting = reinterpret_cast<float*>(shared_memory());
#pragma unroll
    for (int i = 0; i < N; ++i) meeting[(i * groups + group) * lanes + lane] = sum[i];
    __syncthreads();
    if (group > 0) return;
    for (int other = 1; other < groups; ++other) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += meeting[(i * groups + other) * lanes + lane];
    }
  }
  if (column < columns) store(sums + column, sum);
}

template <int N>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(
    Matrix x,                // (M, N')
    const float* row_scale,  // (B,), or null
    Matrix out,              // (M, N')
    int64_t rows,
    int width,
    int rows_per_image,
    int lanes) {
  at_own_place<N>(rows, width, lanes, [&](int64_t row, int column) {
    float values[N];
    with_type<Any>(x.dtype, [&](auto type) {
      Vector<decltype(type), N> read;
      load<decltype(type)>(read, static_cast<const decltype(type)*>(x.data) + row * x.stride + column);
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = to_float(read.at[i]);
    });
    if (row_scale) {
      const float scale = row_scale[static_cast<unsigned>(row) / rows_per_image];
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] *= scale;
    }
    store<Any>(out, row, column, values);
  });
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) gated_forward_kernel(
    Matrix x,    // (M, 2 N'): gates, then values
    Matrix out,  // (M, N')
    Activation activation,
    int64_t rows,
    int width,  // N'
    int lanes) {
  at_own_place<N>(rows, width, lanes, [&](int64_t row, int column) {
    Vector<Loaded<T>, N> gates, values;
    load<T>(gates, x, row, column);
    load<T>(values, x, row, column + width);
    float result[N];
    with_activation(activation, [&](auto act) {
#pragma unroll
      for (int i = 0; i < N; ++i) result[i] = act(to_float(gates.at[i])).value * to_float(values.at[i]);
    });
    store<T>(out, row, column, result);
  });
}

template <bool gated, class T, int N>
__global__ void __launch_bounds__(kThreads) activation_gradient_kernel(
    Matrix dout,     // (M, N')
    Matrix preact,   // (M, N'), or gated (M, 2 N'): gates, then values
    Matrix dpreact,  // like preact
    Matrix hidden,   // (M, N')
    Activation activation,
    int64_t rows,
    int width,  // N'
    int lanes) {
  at_own_place<N>(rows, width, lanes, [&](int64_t row, int column) {
    Vector<Loaded<T>, N> above, before, values;
    load<T>(above, dout, row, column);
    load<T>(before, preact, row, column);
    if constexpr (gated) load<T>(values, preact, row, column + width);
    float gradient[N], second[N], output[N];
    with_activation(activation, [&](auto act) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float d = to_float(above.at[i]), times = gated ? to_float(values.at[i]) : 1;
        const auto [value, slope] = act(to_float(before.at[i]));
        gradient[i] = d * times * slope;
        second[i] = d * value;
        output[i] = value * times;
      }
    });
    store<T>(dpreact, row, column, gradient);
    if constexpr (gated) store<T>(dpreact, row, column + width, second);
    store<T>(hidden, row, column, output);
  });
}

// The sum of every thread's value, for thread 0. They meet in shared memory, (warps,) float32 from `meeting` on.
__device__ __forceinline__ float block_sum(float value, float* meeting) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) meeting[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) value += meeting[w];
  }
  return value;
}

// The value at `place` of a vector.
__device__ __forceinline__ float at(const Matrix& vector, int64_t place) {
  Vector<float, 1> value;
  load<Any>(value, vector, 0, static_cast<int>(place));
  return value.at[0];
}

// A block takes a row n. T: the dtype of weight and dweight.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) finish_weight_gradient_kernel(
    Matrix g,        // (N', K) float32
    float* sums,     // (N',), or null
    Matrix weight,   // (N', K), or none: read for dgamma only
    Matrix bias,     // (N',), or none
    Matrix gamma,    // (N',), or none
    Matrix dweight,  // (N', K)
    float* dgamma,   // (N',), or null
    int width) {     // K
  const int64_t row = blockIdx.x;
  const float scale = gamma ? at(gamma, row) : 1;
  float dot = 0;
  for (int column = threadIdx.x * N; column < width; column += blockDim.x * N) {
    Vector<float, N> gradient;
    load<float>(gradient, g, row, column);
    if (dgamma) {
      Vector<Loaded<T>, N> w;
      load<T>(w, weight, row, column);
#pragma unroll
      for (int i = 0; i < N; ++i) dot = fmaf(to_float(w.at[i]), gradient.at[i], dot);
    }
    float scaled[N];
#pragma unroll
    for (int i = 0; i < N; ++i) scaled[i] = scale * gradient.at[i];
    store<T>(dweight, row, column, scaled);
  }
  if (dgamma) {
    dot = block_sum(dot, reinterpret_cast<float*>(shared_memory()));
    if (threadIdx.x == 0) dgamma[row] = bias ? fmaf(at(bias, row), sums[row], dot) : dot;
  }
  if (threadIdx.x == 0 && gamma && sums) sums[row] *= scale;
}

// f(i, value i) for the N values of a vector from `column` on.
template <int N, class F>
__device__ __forceinline__ void for_each_of(const Matrix& vector, int column, F f) {
  with_type<Any>(vector.dtype, [&](auto type) {
    Vector<decltype(type), N> values;
    load<decltype(type)>(values, static_cast<const decltype(type)*>(vector.data) + column);
#pragma unroll
    for (int i = 0; i < N; ++i) f(i, to_float(values.at[i]));
  });
}

// A block takes a row n. T: the dtype of weight and folded.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) fold_norm_kernel(
    Matrix weight,       // (N', K)
    Matrix bias,         // (N',), or none
    Matrix norm_weight,  // (K,), or none
    Matrix norm_bias,    // (K,), or none
    Matrix folded,       // (N', K)
    float* sums,         // (N',)
    float* offsets,      // (N',)
    int width) {         // K
  const int64_t row = blockIdx.x;
  float sum = 0, offset = 0;
  for (int column = threadIdx.x * N; column < width; column += blockDim.x * N) {
    Vector<T, N> w;
    load<T>(w, weight, row, column);
    float product[N];
#pragma unroll
    for (int i = 0; i < N; ++i) product[i] = to_float(w.at[i]);
    if (norm_bias) for_each_of<N>(norm_bias, column, [&](int i, float b) { offset = fmaf(product[i], b, offset); });
    if (norm_weight) for_each_of<N>(norm_weight, column, [&](int i, float g) { product[i] *= g; });
#pragma unroll
    for (int i = 0; i < N; ++i) sum += to_float(from_float<T>(product[i]));  // what the products will be made of
    store<T>(folded, row, column, product);
  }
  float* meeting = reinterpret_cast<float*>(shared_memory());  // (2, warps)
  sum = block_sum(sum, meeting);
  offset = block_sum(offset, meeting + blockDim.x / 32);
  if (threadIdx.x == 0) {
    sums[row] = sum;
    offsets[row] = bias ? offset + at(bias, row) : offset;
  }
}

}  // namespace

void sum_partials(const Device& device, const Array& partials, const Array& sums) {
  const char* op = "sum_partials";
  const int64_t count = partials.size[0], columns = sums.dims == 0 ? 1 : sums.elements();
  require(sums.dtype == DType::float32, op, ": sums are ", name(sums.dtype), "; accepted: float32");
  require(is_floating(partials.dtype), op, ": partials are ", name(partials.dtype),
          "; accepted: float32, float16, bfloat16");
  require(partials.elements() == count * columns, op, ": ", partials.elements(), " partials; accepted: ", count,
          " times ", columns);
  require(columns < (int64_t{1} << 31), op, ": ", columns, " sums; accepted: fewer than 2^31");
  if (columns == 0) return;
  const int n = vector_of(partials.dtype), groups = count > 16 ? 8 : 1;  // few are of many columns
  const bool vectors = columns % n == 0 && reinterpret_cast<uintptr_t>(partials.data) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(sums.data) % 16 == 0;
  with_typed(partials.dtype, vectors, [&](auto typed) {
    using Type = decltype(typed);
    const auto blocks = static_cast<unsigned>(ceil_div(columns, kThreads / groups * Type::N));
    launch(device, sum_partials_kernel<typename Type::T, Type::N>, dim3(blocks), kThreads,
           groups > 1 ? kThreads * Type::N * sizeof(float) : 0, Matrix{partials.data, columns, partials.dtype},
           sums.as<float>(), count, static_cast<int>(columns), groups);
  });
}

void scale_rows(const Device& device, const Array& x, const Array& row_scale, const Array& out) {
  const char* op = "scale_rows";
  const int64_t rows = x.size[0], width = x.size[1];
  require_matrix(op, "x", x, rows, width);
  require_contiguous(op, "out", out, rows, width);
  if (rows == 0 || width == 0) return;
  const auto run = [&](auto vector) {
    constexpr int N = vector();
    const Grid grid = grid_of(op, rows, width / N);
    launch(device, scale_rows_kernel<N>, grid.blocks, grid.threads, 0, matrix(x), row_scale.as<float>(), matrix(out),
           rows, static_cast<int>(width), rows_per_image(op, row_scale, rows), grid.lanes);
  };
  const int n = std::min(vector_of(x.dtype), vector_of(out.dtype));
  if (!suits(x, n) || !suits(out, n)) {
    run(std::integral_constant<int, 1>());
  } else if (n == 4) {
    run(std::integral_constant<int, 4>());
  } else {
    run(std::integral_constant<int, 8>());
  }
}

void gated_forward(const Device& device, const Array& x, const std::string& activation, const Array& out) {
  const char* op = "gated_forward";
  const int64_t rows = out.size[0], width = out.size[1];
  const Activation act = parse_activation(op, activation);
  require(act != Activation::none, op, ": no activation");
  require_contiguous(op, "out", out, rows, width);
  require_matrix(op, "x", x, rows, 2 * width);
  if (rows == 0 || width == 0) return;
  const int n = vector_of(x.dtype);
  with_typed(x.dtype, out.dtype == x.dtype && suits(x, n) && suits(out, n), [&](auto typed) {
    using Type = decltype(typed);
    const Grid grid = grid_of(op, rows, width / Type::N);
    launch(device, gated_forward_kernel<typename Type::T, Type::N>, grid.blocks, grid.threads, 0, matrix(x),
           matrix(out), act, rows, static_cast<int>(width), grid.lanes);
  });
}

void activation_gradient(
    const Device& device, const Array& dout, const Array& preact, const std::string& activation, const Array& dpreact,
    const Array& hidden) {
  const char* op = "activation_gradient";
  const Activation act = parse_activation(op, activation);
  require(act != Activation::none, op, ": no activation");
  const int64_t rows = dout.size[0], width = dout.size[1], before = preact.size[1];
  require_matrix(op, "dout", dout, rows, width);
  require(before == width || before == 2 * width, op, ": preact has ", before, " columns; accepted: ", width,
          " or, with gates before them, ", 2 * width);
  require_matrix(op, "preact", preact, rows, before);
  require_contiguous(op, "dpreact", dpreact, rows, before);
  require_contiguous(op, "hidden", hidden, rows, width);
  if (rows == 0 || width == 0) return;
  bool vectors = true;
  for (const Array* each : {&dout, &preact, &dpreact, &hidden}) {
    vectors = vectors && each->dtype == preact.dtype && suits(*each, vector_of(preact.dtype));
  }
  with_typed(preact.dtype, vectors, [&](auto typed) {
    using Type = decltype(typed);
    const Grid grid = grid_of(op, rows, width / Type::N);
    const auto kernel = before == width ? activation_gradient_kernel<false, typename Type::T, Type::N>
                                        : activation_gradient_kernel<true, typename Type::T, Type::N>;
    launch(device, kernel, grid.blocks, grid.threads, 0, matrix(dout), matrix(preact), matrix(dpreact), matrix(hidden),
           act, rows, static_cast<int>(width), grid.lanes);
  });
}

void finish_weight_gradient(
    const Device& device, const Array& g, const Array& sums, const Array& weight, const Array& bias, const Array& gamma,
    const Array& dweight, const Array& dgamma) {
  const char* op = "finish_weight_gradient";
  const int64_t rows = dweight.size[0], width = dweight.size[1];
  require_contiguous(op, "dweight", dweight, rows, width);
  require_contiguous(op, "g", g, rows, width);
  require(g.dtype == DType::float32, op, ": g is ", name(g.dtype), "; accepted: float32");
  require_vector(op, "gamma", gamma, rows);
  require_vector(op, "bias", bias, rows);
  require(!dgamma || gamma, op, ": dgamma without a gamma");
  require(!dgamma || weight, op, ": the gradient of gamma needs the weight");
  require(!dgamma || !bias || sums, op, ": the gradient of gamma needs the sums where there is a bias");
  require(rows < (int64_t{1} << 31) && width < (int64_t{1} << 31), op, ": (", rows, ", ", width,
          "); accepted: fewer than 2^31 each");
  if (weight) require_contiguous(op, "weight", weight, rows, width);
  if (rows == 0) return;

  const bool vectors =
      suits(g, 4) && suits(dweight, 4) && suits(weight, 4) && (!weight || weight.dtype == dweight.dtype);
  with_typed(dweight.dtype, vectors, [&](auto typed) {
    using Type = decltype(typed);
    constexpr int N = Type::N == 1 ? 1 : 4;  // 16 bytes of g
    const int threads = static_cast<int>(std::clamp<int64_t>(ceil_div(width, 32 * N) * 32, 32, kThreads));
    launch(device, finish_weight_gradient_kernel<typename Type::T, N>, dim3(static_cast<unsigned>(rows)), threads,
           threads / 32 * sizeof(float), matrix(g), sums.as<float>(), matrix(weight), matrix(bias), matrix(gamma),
           matrix(dweight), dgamma.as<float>(), static_cast<int>(width));
  });
}

void fold_norm(
    const Device& device, const Array& weight, const Array& bias, const Array& norm_weight, const Array& norm_bias,
    const Array& folded, const Array& sums, const Array& offsets) {
  const char* op = "fold_norm";
  constexpr int N = 8;  // 16 bytes of the weight
  const int64_t rows = weight.size[0], width = weight.size[1];
  require_contiguous(op, "weight", weight, rows, width);
  require_contiguous(op, "folded", folded, rows, width);
  require(weight.dtype != DType::float32 && folded.dtype == weight.dtype, op, ": weight is ", name(weight.dtype),
          ", folded ", name(folded.dtype), "; accepted: float16 or bfloat16, both the same");
  require_vector(op, "bias", bias, rows);
  require_vector(op, "norm_weight", norm_weight, width);
  require_vector(op, "norm_bias", norm_bias, width);
  for (const Array* each : {&sums, &offsets}) {
    require(*each && each->dtype == DType::float32, op, ": sums and offsets; accepted: float32");
    require_vector(op, "sums and offsets", *each, rows);
  }
  for (const Array* each : {&weight, &folded, &norm_weight, &norm_bias}) {
    require(suits(*each, N), op, ": a width of ", width, "; accepted: multiples of 8 at 16-byte aligned addresses");
  }
  require(rows < (int64_t{1} << 31) && width < (int64_t{1} << 31), op, ": (", rows, ", ", width,
          "); accepted: fewer than 2^31 each");
  if (rows == 0) return;
  const int threads = static_cast<int>(std::clamp<int64_t>(ceil_div(width, 32 * N) * 32, 32, kThreads));
  const auto run = [&](auto type) {
    launch(device, fold_norm_kernel<decltype(type), N>, dim3(static_cast<unsigned>(rows)), threads,
           2 * threads / 32 * sizeof(float), matrix(weight), matrix(bias), matrix(norm_weight), matrix(norm_bias),
           matrix(folded), sums.as<float>(), offsets.as<float>(), static_cast<int>(width));
  };
  if (weight.dtype == DType::float16) {
    run(half());
  } else {
    run(bfloat16());
  }
}

}  // namespace fastvit
