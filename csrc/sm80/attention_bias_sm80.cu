// The gradients of attention's bias and of its table of relative positions, for compute capability 8.0 and later, in one
// launch, with no atomics and nothing of the size of the scores in memory. The gradient of a score is
//
//     ds = p * (dp - delta)        p = exp(x - lse)        dp = dout v^T, dropped out as the weights were
//
// with x as attention_options.h has it, recomputed as in attention_backward_sm80.cu. A warp takes it in squares of 16
// queries by 16 keys: it copies 16 rows of q, dout, k and v to shared memory of its own, has two products to make and
// adds ds to the 8 registers in which it sums. What is summed, in which order, depends on the shapes alone.
//
// Bias: a warp owns a square of the gradient and goes through all that the bias is broadcast over: images, heads, and,
// where the bias has one row or column, the squares of the scores above or beside each other. Where there are fewer
// squares than warps that a GPU wants, the four warps of a block share one and add up at the end.
//
// Table: entries of one difference of lines, dy, belong to the pairs of lines (yi, yi - dy) of the window, whose w x w
// scores have one difference of columns on each diagonal. A block owns dy of a head; its warps share all images and
// pairs, sum squares of that w x w tile, and at the end diagonals of the squares. Three more blocks a head own the entries
// of the class token: a row, a column and a corner of the scores, each summed to one entry.
//
// Bytes: 4 x 16 rows for 256 scores, from L2 (a head's operands are read once from memory where its blocks run together);
// latency is hidden by other warps, not by stages.
#include "attention_options.h"

namespace fastvit::sm80 {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kSide = 16;                  // of a square
constexpr int kSquare = kSide * kSide;
constexpr int kDiagonals = 2 * kSide - 1;  // of a square
constexpr int kClassEntries = 3;

template <class T>
struct Problem : ScoreMod {
  Heads<const T> q, k, v, dout;  // (B, Tq, H, d), (B, Tk, H, d) twice, (B, Tq, H, d)
  const float *lse, *delta;      // (B, H, Tq)
  int images, heads, queries, keys;
  int lines;  // h
  float* gradient;
  int own[4];   // the sizes of the bias, 1 where it is broadcast
  int sharers;  // warps that share a square of it: 1 or kWarps
};

// Rows and columns of the scores of a head, from (query, key) on and below the ends.
struct Square {
  int64_t image;
  int head, query, query_end, key, key_end;
};

// Shared memory: four tiles a warp, then a square a warp, then what the kernel adds.
template <int DIM>
constexpr size_t kTileBytes = 4 * kSide * DIM * sizeof(uint16_t);
template <int DIM>
constexpr size_t kSharedBytes = kWarps * (kTileBytes<DIM> + kSquare * sizeof(float));

template <int DIM>
__device__ __forceinline__ float* squares() {
  return reinterpret_cast<float*>(shared_memory() + kWarps * kTileBytes<DIM>);
}

__device__ __forceinline__ void clear(float (&acc)[2][4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[h][i] = 0.0f;
  }
}

// acc += ds of a square, as mma lays it out: acc[h][i] is row l / 4 + i / 2 * 8, column 8 h + l % 4 * 2 + i % 2.
template <class T, int DIM>
__device__ __forceinline__ void add_square(
    float (&acc)[2][4], const Problem<T>& problem, const Square& at, const float* table) {
  T* tiles = reinterpret_cast<T*>(shared_memory() + threadIdx.x / kLanes * kTileBytes<DIM>);  // (q, dout, k, v; 16, DIM)
  constexpr int kTile = kSide * DIM;
  const auto copy = [&](int which, const Heads<const T>& x, int first, int end) {
    copy_rows_async<DIM>(
        tiles + which * kTile, kSide, x.rows(at.image, at.head), x.token, first, end, lane_id(), kLanes);
  };
  __syncwarp();  // everyone is done with the square before
  copy(0, problem.q, at.query, at.query_end);
  copy(1, problem.dout, at.query, at.query_end);
  copy(2, problem.k, at.key, at.key_end);
  copy(3, problem.v, at.key, at.key_end);
  ptx::copy_async_commit();

  const ScoreMod& options = problem;
  const ScoreMod::Warp<false> around(
      options, at.image, at.head, problem.heads, at.query_end, at.key_end, table, at.query);
  float lse[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = at.query + lane_id() / 4 + 8 * i;
    const bool inside = row < at.query_end;
    const int64_t where = (at.image * problem.heads + at.head) * problem.queries + row;
    lse[i] = inside ? in_log2<ScoreMod>(problem.lse[where]) : INFINITY;
    delta[i] = inside ? problem.delta[where] : 0.0f;
  }
  ptx::copy_async_wait<0>();
  __syncwarp();

  float s[1][2][4], dp[1][2][4];
  products<T, DIM, 1>(s, SharedRows<T, DIM>{tiles}, tiles + 2 * kTile, 2);
  products<T, DIM, 1>(dp, SharedRows<T, DIM>{tiles + kTile}, tiles + 3 * kTile, 2);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    around.scores(s[0][h], at.key + 8 * h);
    if (around.dropping()) {
      bool kept[4];
      around.keep(kept, at.key + 8 * h);
#pragma unroll
      for (int i = 0; i < 4; ++i) dp[0][h][i] = kept[i] ? dp[0][h][i] * around.kept_scale() : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc[h][i] += ptx::exp2(fmaf(s[0][h][i], kLog2e, -lse[i / 2])) * (dp[0][h][i] - delta[i / 2]);
    }
  }
}

// Puts a warp's sums where the block finds them: (16, 16) by rows.
template <int DIM>
__device__ __forceinline__ void put_square(const float (&acc)[2][4]) {
  float* to = squares<DIM>() + threadIdx.x / kLanes * kSquare;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[(lane_id() / 4 + i / 2 * 8) * kSide + 8 * h + lane_id() % 4 * 2 + i % 2] = acc[h][i];
    }
  }
}

// One value of all warps' squares.
template <int DIM>
__device__ __forceinline__ float sum_of_squares(int index) {
  float sum = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) sum += squares<DIM>()[warp * kSquare + index];
  return sum;
}

template <class T, int DIM>
__global__ void __launch_bounds__(kThreads, 3) bias_gradient_kernel(const Problem<T> problem) {
  const int warp = threadIdx.x / kLanes, sharers = problem.sharers;
  const int all[4] = {problem.images, problem.heads, problem.queries, problem.keys};
  // Squares in each dimension (of images and heads, single ones): those of the bias, and those that each is summed over.
  int64_t own[4], others[4], owned = 1, steps = 1;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int side = i < 2 ? 1 : kSide;
    const int mine = (problem.own[i] + side - 1) / side, whole = (all[i] + side - 1) / side;
    own[i] = mine;
    others[i] = problem.own[i] == all[i] ? 1 : whole;
    owned *= own[i];
    steps *= others[i];
  }
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * (kWarps / sharers) + warp / sharers;
  const auto split = [](int64_t index, const int64_t (&sizes)[4], int64_t (&to)[4]) {
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      to[i] = index % sizes[i];
      index /= sizes[i];
    }
  };
  int64_t place[4], other[4];
  split(mine, own, place);
  float acc[2][4];
  clear(acc);
  if (mine < owned) {
    for (int64_t step = warp % sharers; step < steps; step += sharers) {
      split(step, others, other);
      const int query = static_cast<int>(place[2] + other[2]) * kSide, key = static_cast<int>(place[3] + other[3]) * kSide;
      add_square<T, DIM>(acc, problem, {place[0] + other[0], static_cast<int>(place[1] + other[1]), query,
                                        min(query + kSide, problem.queries), key, min(key + kSide, problem.keys)},
                         nullptr);
    }
  }
  put_square<DIM>(acc);
  __syncthreads();
  if (mine >= owned || warp % sharers != 0) return;

  // Each lane adds up what it writes: a value of the square, or of its only row, its only column, or its corner.
  const int rows = problem.own[2] == problem.queries ? kSide : 1, columns = problem.own[3] == problem.keys ? kSide : 1;
  const float* square = squares<DIM>() + warp * kSquare;
  for (int i = lane_id(); i < rows * columns; i += kLanes) {
    const int row = i / columns, column = i % columns;
    const int64_t at[4] = {place[0], place[1], place[2] * kSide + row, place[3] * kSide + column};
    if (at[2] >= problem.own[2] || at[3] >= problem.own[3]) continue;
    float sum = 0.0f;
    for (int w = 0; w < sharers; ++w) {
      for (int r = row; r < kSide; r += rows) {
        for (int c = column; c < kSide; c += columns) sum += square[w * kSquare + r * kSide + c];
      }
    }
    problem.gradient[((at[0] * problem.own[1] + at[1]) * problem.own[2] + at[2]) * problem.own[3] + at[3]] = sum;
  }
}

template <class T, int DIM>
__global__ void __launch_bounds__(kThreads, 3) table_gradient_kernel(const Problem<T> problem) {
  const int thread = threadIdx.x, warp = thread / kLanes, head = blockIdx.y;
  const int w = problem.width, h = problem.lines, tokens = problem.queries;
  float* sums = reinterpret_cast<float*>(shared_memory() + kSharedBytes<DIM>);  // (2w - 1,): one for each dx
  float* table = sums + 2 * w - 1;
  const ScoreMod& options = problem;
  options.stage(table, head);
  for (int i = thread; i < 2 * w - 1; i += kThreads) sums[i] = 0.0f;
  __syncthreads();
  const auto write = [&](int entry, float sum) {
    problem.gradient[static_cast<int64_t>(entry) * problem.heads + head] = sum;
  };

  const int which = static_cast<int>(blockIdx.x) - (2 * h - 1);
  float acc[2][4];
  if (which >= 0) {  // of the class token: its row, its column, or where they meet
    const int row_end = which == 1 ? tokens : 1, column_end = which == 0 ? tokens : 1;
    const int row = which == 1, column = which == 0;
    const int down = (row_end - row + kSide - 1) / kSide, across = (column_end - column + kSide - 1) / kSide;
    clear(acc);
    for (int64_t step = warp; step < static_cast<int64_t>(problem.images) * down * across; step += kWarps) {
      const int square = static_cast<int>(step % (down * across));  // all in a row, or all in a column
      const int query = row + (which == 1 ? square * kSide : 0), key = column + (which == 0 ? square * kSide : 0);
      add_square<T, DIM>(acc, problem, {step / (down * across), head, query, min(query + kSide, row_end), key,
                                        min(key + kSide, column_end)}, table);
    }
    put_square<DIM>(acc);
    __syncthreads();
    if (warp > 0) return;
    float sum = 0.0f;
    for (int i = lane_id(); i < kSquare; i += kLanes) sum += sum_of_squares<DIM>(i);
    for (int i = 1; i < kLanes; i *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if (lane_id() == 0) write(problem.entries - kClassEntries + which, sum);
    return;
  }

  // 0, 1, -1, 2, -2, ...: those with the most pairs of lines begin first.
  const int n = blockIdx.x, dy = n % 2 == 1 ? (n + 1) / 2 : -(n / 2);
  const int pairs = h - abs(dy), squares_a_side = (w + kSide - 1) / kSide;
  for (int a = 0; a < squares_a_side; ++a) {
    for (int b = 0; b < squares_a_side; ++b) {
      clear(acc);
      for (int64_t step = warp; step < static_cast<int64_t>(problem.images) * pairs; step += kWarps) {
        const int y = max(dy, 0) + static_cast<int>(step % pairs);
        const int query = problem.prefix + y * w, key = query - dy * w;
        add_square<T, DIM>(acc, problem, {step / pairs, head, query + a * kSide, query + min(w, (a + 1) * kSide),
                                          key + b * kSide, key + min(w, (b + 1) * kSide)}, table);
      }
      put_square<DIM>(acc);
      __syncthreads();
      if (thread < kDiagonals) {
        const int along = thread - (kSide - 1), dx = (a - b) * kSide + along;  // row - column in the square, in the tile
        float sum = 0.0f;
        for (int row = max(along, 0); row < min(kSide, kSide + along); ++row) {
          sum += sum_of_squares<DIM>(row * kSide + row - along);
        }
        if (abs(dx) < w) sums[dx + w - 1] += sum;
      }
      __syncthreads();
    }
  }
  for (int i = thread; i < 2 * w - 1; i += kThreads) write((dy + h - 1) * (2 * w - 1) + i, sums[i]);
}

template <class T>
Problem<T> problem_of(
    const ScoreMod& m, const Array& dout, const Array& q, const Array& k, const Array& v, const Array& lse,
    const Array& delta, const Array& gradient) {
  return {m, heads_of<const T>(q), heads_of<const T>(k), heads_of<const T>(v), heads_of<const T>(dout),
          lse.as<const float>(), delta.as<const float>(), static_cast<int>(q.size[0]), static_cast<int>(q.size[2]),
          static_cast<int>(q.size[1]), static_cast<int>(k.size[1]), 0, gradient.as<float>()};
}

}  // namespace

void attention_bias_gradient(
    const Device& device, const AttentionOptions& options, const Array& dout, const Array& q, const Array& k,
    const Array& v, const Array& lse, const Array& delta, double scale, const Array& dbias) {
  check_heads(q, k, {{"dout", &dout}}, {{"v", &v}});
  check_gradient("dbias", dbias);
  require(bool(options.bias) && dbias.dims == 4, "attention: dbias; accepted: 4 dimensions, where there is a bias");
  int64_t squares = 1;
  for (int i = 0; i < 4; ++i) {
    require(dbias.size[i] == 1 || dbias.size[i] == options.bias.size[i], "attention: dbias with ", dbias.size[i],
            " in dimension ", i, "; accepted: 1 or ", options.bias.size[i]);
    squares *= i < 2 ? dbias.size[i] : ceil_div(dbias.size[i], kSide);
  }
  if (dbias.elements() == 0) return;
  with_dtype_and_dim(q, [&]<class T, int DIM>() {
    Problem<T> problem = problem_of<T>(score_mod(options, q, k, scale), dout, q, k, v, lse, delta, dbias);
    for (int i = 0; i < 4; ++i) problem.own[i] = static_cast<int>(dbias.size[i]);
    problem.sharers = squares < 16 * device.multiprocessors ? kWarps : 1;
    launch(device, bias_gradient_kernel<T, DIM>, dim3(static_cast<unsigned>(ceil_div(squares * problem.sharers, kWarps))),
           kThreads, kSharedBytes<DIM>, problem);
  });
}

void attention_table_gradient(
    const Device& device, const AttentionOptions& options, const Array& dout, const Array& q, const Array& k,
    const Array& v, const Array& lse, const Array& delta, double scale, const Array& dtable) {
  check_heads(q, k, {{"dout", &dout}}, {{"v", &v}});
  check_gradient("dtable", dtable);
  require(bool(options.rel_pos_table) && dtable.dims == 2 && dtable.size[0] == options.rel_pos_table.size[0] &&
              dtable.size[1] == options.rel_pos_table.size[1],
          "attention: dtable; accepted: of the table's shape");
  if (dtable.elements() == 0) return;
  with_dtype_and_dim(q, [&]<class T, int DIM>() {
    Problem<T> problem = problem_of<T>(score_mod(options, q, k, scale), dout, q, k, v, lse, delta, dtable);
    problem.lines = static_cast<int>(options.window_height);
    const int blocks = 2 * problem.lines - 1 + (problem.prefix ? kClassEntries : 0);
    const size_t shared = stage_table(device, kSharedBytes<DIM> + (2 * problem.width - 1) * sizeof(float), problem);
    launch(device, table_gradient_kernel<T, DIM>, dim3(blocks, static_cast<unsigned>(q.size[2])), kThreads, shared,
           problem);
  });
}

}  // namespace fastvit::sm80
