// Attention, backward, for compute capability 8.0 and later: two kernels, no atomics, so the same inputs give the same
// bits (FlashAttention-2, Dao 2023, algorithm 2). With p = exp(q k^T * scale - lse), recomputed from the saved
// log-sum-exp, and delta = rowsum(dout * out) - dlse,
//
//     ds = p * (dout v^T - delta)        dq = scale ds k        dk = scale ds^T q        dv = p^T dout
//
// The query gradient owns rows of queries and goes through the keys; the key and value gradient owns rows of keys and
// goes through the queries with scores and probabilities transposed. Either way a warp owns 16 rows of a pair of tiles
// (q and dout, or k and v), goes through blocks of the other pair, and has two products to make of each block,
//
//     s = owned[0] block[0]^T        dp = owned[1] block[1]^T
//
// whose results p and ds are, rounded, the left operands of what is summed over the blocks: they never leave registers.
// The kernels are one skeleton (Walk), with the rows of the block that do not fill one taken first, exactly.
//
// Shared memory: the owned pair of tiles, read again for every block (the registers are full of accumulators), and two
// stages of the other pair: a block is copied while the one before it is computed, with one barrier a block. All of it
// is swizzled (swizzle.cuh): no read or write has a bank conflict. Blocks are 64 rows up to a head dim of 64 and 32
// above, so that the accumulators and both blocks of scores fit registers, two or three times over in a multiprocessor.
//
// With options (attention_options.h) the same kernels take a block in parts of a few pairs of slices, so that scores
// and what belongs to them fit registers, and every part takes the same path: scores that are absent or masked are -inf,
// their p and ds 0. Under dropout dp is 0 where a weight was taken, and p too in dv.
//
// Bytes: the query gradient reads q and out once and dout twice (the second time from L2) and writes dq; k and v come
// once from memory and once more from L2 for every further block of rows. The other kernel likewise. One kernel for
// everything makes 5 products a pair of blocks, these make 3 + 4: the price of sums that need no atomics and no float32
// dq in memory.
#include <type_traits>

#include "attention_options.h"

namespace fastvit::sm80 {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kOwnedRows = kWarps * 16;
constexpr int kStages = 2;
template <int DIM>
constexpr int kBlockPairs = DIM <= 64 ? 4 : 2;
template <int DIM>
constexpr int kBlockRows = kBlockPairs<DIM> * kPair;
// Pairs of slices whose scores are in registers at a time.
template <int DIM, class M>
constexpr int kPairs = M::kScoreMod ? 1 : kBlockPairs<DIM>;
template <int DIM, class M>
constexpr int kQueryBlocks = DIM <= 64 && !M::kScoreMod ? kMostBlocks : 2;

template <class T, class M>
struct Problem : M {
  Heads<const T> q, k, v, dout;  // (B, Tq, H, d), (B, Tk, H, d) twice, (B, Tq, H, d)
  int queries, keys;
  float scale;
  int64_t first_image = 0;
};

template <class T, class M>
struct QueryProblem : Problem<T, M> {
  Heads<const T> out;  // (B, Tq, H, d)
  Heads<T> dq;         // (B, Tq, H, d)
  const float* lse;    // (B, H, Tq)
  const float* dlse;   // (B, H, Tq), or null
  float* delta;        // (B, H, Tq)
};

template <class T, class M>
struct KeyValueProblem : Problem<T, M> {
  Heads<T> dk, dv;     // (B, Tk, H, d)
  const float* lse;    // (B, H, Tq)
  const float* delta;  // (B, H, Tq)
};

// One head's rows of a tensor.
template <class T>
struct Matrix {
  const T* data;
  int64_t stride;

  __device__ __forceinline__ Matrix(const Heads<const T>& x, const Place& place, const Rows& rows)
      : data(x.rows(place.image, place.head, rows.first)), stride(x.token) {}
};

// How a thread block goes from its owned rows of one pair of matrices through all rows of another pair.
template <class T, int DIM>
struct Walk {
  Matrix<T> owned[2], through[2];
  int owned_rows, through_rows;  // of the matrices
  int first;                     // the block's first owned row
  int full, rest;                // blocks of `through` besides the rows taken first, and how many those are
  T* owned_tiles;                // (2, kOwnedRows, DIM)
  T* stages;                     // (kStages, 2, kBlockRows, DIM)

  __device__ __forceinline__ Walk(
      const Matrix<T>& a, const Matrix<T>& b, int owned_rows, const Matrix<T>& c, const Matrix<T>& d, int through_rows,
      int first)
      : owned{a, b}, through{c, d}, owned_rows(owned_rows), through_rows(through_rows), first(first) {
    full = (through_rows - 1) / kBlockRows<DIM>;  // 0 where there is nothing to go through
    rest = through_rows - full * kBlockRows<DIM>;
    owned_tiles = reinterpret_cast<T*>(shared_memory());
    stages = owned_tiles + 2 * kOwnedRows * DIM;
  }

  // Where the rows of a step begin: step 0 takes the last ones, step n > 0 block n - 1.
  __device__ __forceinline__ int start(int step) const { return (step == 0 ? full : step - 1) * kBlockRows<DIM>; }

  __device__ __forceinline__ T* tile(int step, int which) const {
    return stages + (step % kStages * 2 + which) * kBlockRows<DIM> * DIM;
  }

  __device__ __forceinline__ T* owned_tile(int which) const {
    return owned_tiles + (which * kOwnedRows + threadIdx.x / kLanes * 16) * DIM;
  }

  __device__ __forceinline__ void load_owned() const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      copy_rows_async<DIM>(owned_tiles + i * kOwnedRows * DIM, kOwnedRows, owned[i].data, owned[i].stride, first,
                           owned_rows, threadIdx.x, kThreads);
    }
    ptx::copy_async_commit();
  }

  __device__ __forceinline__ void load_rest() const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      copy_rows_async<DIM>(tile(0, i), (rest + kPair - 1) / kPair * kPair, through[i].data, through[i].stride, start(0),
                           through_rows, threadIdx.x, kThreads);
    }
    ptx::copy_async_commit();
  }

  __device__ __forceinline__ void load(int step) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      copy_tile_async<DIM, kBlockRows<DIM>, kThreads>(
          tile(step, i), through[i].data + start(step) * through[i].stride, through[i].stride, threadIdx.x);
    }
    ptx::copy_async_commit();
  }

  // s and dp of a step for the warp's 16 rows and those of the block from `part` on: all of them, or `rows` (at least 1).
  template <bool FULL, int SLICES>
  __device__ __forceinline__ void scores(
      float (&s)[1][SLICES][4], float (&dp)[1][SLICES][4], int step, int part, int rows) const {
    constexpr int kSure = FULL ? SLICES / 2 : 1;
    const int slices = FULL ? SLICES : (rows + 7) / 8;
    products<T, DIM, kSure>(s, SharedRows<T, DIM>{owned_tile(0)}, tile(step, 0) + part * DIM, slices);
    products<T, DIM, kSure>(dp, SharedRows<T, DIM>{owned_tile(1)}, tile(step, 1) + part * DIM, slices);
  }

  // Goes through all rows: add(step, part, rows, FULL) for each part of at most PART rows of each block. One barrier a
  // step: behind it the step's rows have arrived, and everyone is done with what the next one overwrites. before(step)
  // runs ahead of that barrier, ahead(step + 1) behind it.
  template <int PART, class Add, class Before, class Ahead>
  __device__ __forceinline__ void go(bool active, const Add& add, const Before& before, const Ahead& ahead) const {
    const auto arrive = [&](int step) {
      if (step > 0) before(step);
      ptx::copy_async_wait<0>();
      __syncthreads();
      if (step < full) {
        load(step + 1);
        ahead(step + 1);
      }
    };
    if constexpr (PART == kBlockRows<DIM>) {
      arrive(0);
      if (active) add(0, 0, rest, std::false_type());
      for (int step = 1; step <= full; ++step) {
        arrive(step);
        if (active) add(step, 0, PART, std::true_type());
      }
    } else {
      for (int step = 0; step <= full; ++step) {
        arrive(step);
        const int rows = !active ? 0 : step == 0 ? rest : kBlockRows<DIM>;
#pragma unroll 1
        for (int part = 0; part < rows; part += PART) add(step, part, min(rows - part, PART), std::false_type());
      }
    }
  }
};

struct Nothing {
  __device__ __forceinline__ void operator()(int) const {}
};

template <int DIM>
__device__ __forceinline__ void clear(float (&acc)[1][DIM / 8][4]) {
#pragma unroll
  for (int c = 0; c < DIM / 8; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[0][c][i] = 0.0f;
  }
}

// The part of rowsum(a * b) that one lane of a row's four adds up: 16 bytes of each at a time.
template <class T, int DIM>
__device__ __forceinline__ float part_of_dot(const T* a, const T* b) {
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < DIM / 8; c += 4) {
    const int chunk = c + lane_id() % 4;
    if (DIM / 8 % 4 != 0 && chunk >= DIM / 8) break;
    const Vector<T, 8> x = *reinterpret_cast<const Vector<T, 8>*>(a + 8 * chunk);
    const Vector<T, 8> y = *reinterpret_cast<const Vector<T, 8>*>(b + 8 * chunk);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(to_float(x.at[i]), to_float(y.at[i]), sum);
  }
  return sum;
}

// The owned tiles, both stages and the statistics beside each of them.
template <int DIM>
constexpr size_t kSharedBytes = (2 * kOwnedRows + kStages * 2 * kBlockRows<DIM>) * DIM * sizeof(uint16_t) +
                                kStages * 2 * kBlockRows<DIM> * sizeof(float);

template <int DIM>
__device__ __forceinline__ float* staged_table() {
  return reinterpret_cast<float*>(shared_memory() + kSharedBytes<DIM>);
}

// The warp's window of relative position keys, which lies in the table's place.
template <class T, int DIM>
__device__ __forceinline__ T* window() {
  return reinterpret_cast<T*>(staged_table<DIM>()) + threadIdx.x / kLanes * kWindow * DIM;
}

template <class T, int DIM, class M>
__global__ void __launch_bounds__(kThreads, (kQueryBlocks<DIM, M>)) query_gradient_kernel(
    const QueryProblem<T, M> problem) {
  constexpr int kPairs = sm80::kPairs<DIM, M>;
  const Place place(problem.first_image, kOwnedRows);
  const M& options = problem;
  const Rows queries = options.queries(place, problem.queries), keys = options.keys(place, problem.keys);
  if (M::kScoreMod && place.first >= queries.count) return;
  const Walk<T, DIM> walk(
      Matrix<T>(problem.q, place, queries), Matrix<T>(problem.dout, place, queries), queries.count,
      Matrix<T>(problem.k, place, keys), Matrix<T>(problem.v, place, keys), keys.count, place.first);
  walk.load_owned();
  walk.load_rest();
  options.stage(staged_table<DIM>(), place.head);

  // While they are on their way: delta, and the log-sum-exp in units of log2, of the lane's two rows.
  const int first = place.first + threadIdx.x / kLanes * 16;
  const bool active = first < queries.count;
  float lse[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first + lane_id() / 4 + 8 * i;
    const int64_t at = queries.vector + row;
    lse[i] = delta[i] = 0.0f;
    if (row < queries.count) {
      delta[i] = part_of_dot<T, DIM>(
          problem.out.rows(place.image, place.head, queries.first) + row * problem.out.token,
          problem.dout.rows(place.image, place.head, queries.first) + row * problem.dout.token);
      lse[i] = in_log2<M>(problem.lse[at]);
    }
    delta[i] = row_sum(delta[i]);
    if (row < queries.count) {
      if (problem.dlse) delta[i] -= problem.dlse[at];
      if (lane_id() % 4 == 0) problem.delta[at] = delta[i];
    }
  }

  const typename M::template Warp<false> around(
      options, place.image, place.head, gridDim.y, queries.count, keys.count, staged_table<DIM>(), first);
  const float scale_log2 = M::kScoreMod ? kLog2e : problem.scale * kLog2e;
  float dq[1][DIM / 8][4];
  clear<DIM>(dq);
  const auto add = [&]<bool FULL>(int step, int part, int count, std::bool_constant<FULL>) {
    constexpr int kSure = FULL ? kPairs : 1;
    float s[1][2 * kPairs][4], dp[1][2 * kPairs][4];
    uint32_t ds[kPairs][1][4];
    walk.template scores<FULL>(s, dp, step, part, count);
    if constexpr (M::kRelPosKeys) {
      static_assert(kPairs == 1, "one window at a time");
      around.template load_window<DIM>(window<T, DIM>(), walk.start(step) + part);
      add_diagonals<T, DIM>(s[0][0], s[0][1], SharedRows<T, DIM>{walk.owned_tile(0)}, window<T, DIM>());
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (j >= kSure && kPair * j >= count) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float (&x)[4] = s[0][2 * j + h], (&y)[4] = dp[0][2 * j + h];
        const int slice = walk.start(step) + part + kPair * j + 8 * h;
        around.scores(x, slice);
        if (around.dropping()) {
          bool kept[4];
          around.keep(kept, slice);
#pragma unroll
          for (int i = 0; i < 4; ++i) y[i] = kept[i] ? y[i] * around.kept_scale() : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          y[i] = ptx::exp2(fmaf(x[i], scale_log2, -lse[i / 2])) * (y[i] - delta[i / 2]);
          // A key that is not there is 0, but what multiplies it may be infinite.
          if (!M::kScoreMod && !FULL && kPair * j + 8 * h + lane_id() % 4 * 2 + i % 2 >= count) y[i] = 0.0f;
        }
      }
      pack_pair<T>(ds[j][0], dp[0][2 * j], dp[0][2 * j + 1]);
    }
    if constexpr (M::kRelPosKeys) add_spread<T, DIM>(dq, dp[0][0], dp[0][1], window<T, DIM>());
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (j >= kSure && kPair * j >= count) break;
      add_products<T, DIM, 1>(dq, ds[j], walk.tile(step, 0) + part * DIM, kPair * j);
    }
  };
  walk.template go<kPairs * kPair>(active, add, Nothing(), Nothing());
  if (!active) return;
  const float factor[2] = {problem.scale, problem.scale};
  store_rows<T, DIM>(dq[0], factor, walk.owned_tile(0), problem.dq.rows(place.image, place.head, queries.first),
                     problem.dq.token, first, queries.count);
}

template <class T, int DIM, class M>
__global__ void __launch_bounds__(kThreads, 2) key_value_gradient_kernel(const KeyValueProblem<T, M> problem) {
  constexpr int kPairs = sm80::kPairs<DIM, M>;
  constexpr int kRows = kBlockRows<DIM>;
  const int thread = threadIdx.x;
  const Place place(problem.first_image, kOwnedRows);
  const M& options = problem;
  const Rows queries = options.queries(place, problem.queries), keys = options.keys(place, problem.keys);
  if (M::kScoreMod && place.first >= keys.count) return;
  const Walk<T, DIM> walk(
      Matrix<T>(problem.k, place, keys), Matrix<T>(problem.v, place, keys), keys.count,
      Matrix<T>(problem.q, place, queries), Matrix<T>(problem.dout, place, queries), queries.count, place.first);
  float* statistics = reinterpret_cast<float*>(walk.tile(0, 0) + kStages * 2 * kRows * DIM);  // (kStages, 2, kRows)
  walk.load_owned();
  walk.load_rest();
  options.stage(staged_table<DIM>(), place.head);

  // lse in units of log2, and delta, of the queries of a step: fetched by the first threads into a register each while
  // the step before is computed, and put beside the step's tiles after it. A query that is not there has an infinite
  // lse: its probabilities are exactly 0.
  float lse = 0.0f, delta = 0.0f;
  const auto fetch = [&](int step) {
    const int row = walk.start(step) + thread;
    const bool inside = thread < kRows && row < queries.count;
    const int64_t at = queries.vector + row;
    lse = inside ? in_log2<M>(problem.lse[at]) : INFINITY;
    delta = inside ? problem.delta[at] : 0.0f;
  };
  const auto put = [&](int step) {
    if (thread >= kRows) return;
    statistics[step % kStages * 2 * kRows + thread] = lse;
    statistics[step % kStages * 2 * kRows + kRows + thread] = delta;
  };
  fetch(0);
  put(0);

  const int first = place.first + thread / kLanes * 16;
  const bool active = first < keys.count;
  const typename M::template Warp<true> around(
      options, place.image, place.head, gridDim.y, queries.count, keys.count, staged_table<DIM>(), first);
  const float scale_log2 = M::kScoreMod ? kLog2e : problem.scale * kLog2e;
  float dk[1][DIM / 8][4], dv[1][DIM / 8][4];
  clear<DIM>(dk);
  clear<DIM>(dv);
  const auto add = [&]<bool FULL>(int step, int part, int count, std::bool_constant<FULL>) {
    constexpr int kSure = FULL ? kPairs : 1;
    float s[1][2 * kPairs][4], dp[1][2 * kPairs][4];
    walk.template scores<FULL>(s, dp, step, part, count);
    if constexpr (M::kRelPosKeys) {
      static_assert(kPairs == 1, "one window at a time");
      around.template load_window<DIM>(window<T, DIM>(), walk.start(step) + part);
      add_transposed_diagonals<T, DIM>(s[0][0], s[0][1], walk.tile(step, 0) + part * DIM, window<T, DIM>());
    }
    const float* column = statistics + step % kStages * 2 * kRows + part + lane_id() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (j >= kSure && kPair * j >= count) break;
      uint32_t p[1][4], ds[1][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto column_lse = *reinterpret_cast<const Vector<float, 2>*>(column + kPair * j + 8 * h);
        const auto column_delta = *reinterpret_cast<const Vector<float, 2>*>(column + kRows + kPair * j + 8 * h);
        float (&x)[4] = s[0][2 * j + h], (&y)[4] = dp[0][2 * j + h];
        const int slice = walk.start(step) + part + kPair * j + 8 * h;
        around.scores(x, slice);
        bool kept[4];
        if (around.dropping()) {
          around.keep(kept, slice);
#pragma unroll
          for (int i = 0; i < 4; ++i) y[i] = kept[i] ? y[i] * around.kept_scale() : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[i] = ptx::exp2(fmaf(x[i], scale_log2, -column_lse.at[i % 2]));
          y[i] = x[i] * (y[i] - column_delta.at[i % 2]);
          if (around.dropping() && !kept[i]) x[i] = 0.0f;
        }
      }
      pack_pair<T>(p[0], s[0][2 * j], s[0][2 * j + 1]);
      pack_pair<T>(ds[0], dp[0][2 * j], dp[0][2 * j + 1]);
      add_products<T, DIM, 1>(dv, p, walk.tile(step, 1) + part * DIM, kPair * j);
      add_products<T, DIM, 1>(dk, ds, walk.tile(step, 0) + part * DIM, kPair * j);
    }
  };
  walk.template go<kPairs * kPair>(active, add, put, fetch);
  if (!active) return;
  const float scale[2] = {problem.scale, problem.scale}, kept[2] = {around.kept_scale(), around.kept_scale()};
  store_rows<T, DIM>(dk[0], scale, walk.owned_tile(0), problem.dk.rows(place.image, place.head, keys.first),
                     problem.dk.token, first, keys.count);
  store_rows<T, DIM>(dv[0], kept, walk.owned_tile(1), problem.dv.rows(place.image, place.head, keys.first),
                     problem.dv.token, first, keys.count);
}

// What both gradients begin with.
template <class T, class M>
Problem<T, M> problem_of(
    const M& m, const Array& q, const Array& k, const Array& v, const Array& dout, double scale, bool packed) {
  return {m, heads_of<const T>(q, packed), heads_of<const T>(k, packed), heads_of<const T>(v, packed),
          heads_of<const T>(dout, packed), static_cast<int>(q.size[1]), static_cast<int>(k.size[1]),
          static_cast<float>(scale)};
}

// f.template operator()<T, DIM>(Plain, ScoreMod or RelPosKeys, bytes of shared memory).
template <class F>
void with_options(
    const Device& device, const AttentionOptions& options, const Array& q, const Array& k, double scale, const F& f) {
  with_dtype_and_dim(q, [&]<class T, int DIM>() {
    with_kind(options, q, k, scale, [&](auto m) {
      const size_t shared = stage<DIM>(device, kSharedBytes<DIM>, kWarps, m);
      f.template operator()<T, DIM>(m, shared);
    });
  });
}

}  // namespace

void attention_query_gradient(
    const Device& device, const AttentionOptions& options, const Array& dout, const Array& dlse, const Array& q,
    const Array& k, const Array& v, const Array& out, const Array& lse, double scale, const Array& dq,
    const Array& delta) {
  check_heads(q, k, {{"out", &out}, {"dout", &dout}, {"dq", &dq}}, {{"v", &v}});
  if (q.elements() == 0) return;
  if (k.size[1] == 0) throw error("attention: no keys; accepted: at least 1");
  const Extent all = extent(options, q, k);
  const bool packed = bool(options.cu_q);
  with_options(device, options, q, k, scale, [&]<class T, int DIM, class M>(const M& m, size_t shared) {
    const QueryProblem<T, M> problem{
        problem_of<T>(m, q, k, v, dout, scale, packed), heads_of<const T>(out, packed), heads_of<T>(dq, packed),
        lse.as<const float>(), dlse.as<const float>(), delta.as<float>()};
    launch_blocks(device, query_gradient_kernel<T, DIM, M>, all.images, q.size[2], ceil_div(all.queries, kOwnedRows),
                  kThreads, shared, problem);
  });
}

void attention_key_value_gradient(
    const Device& device, const AttentionOptions& options, const Array& dout, const Array& q, const Array& k,
    const Array& v, const Array& lse, const Array& delta, double scale, const Array& dk, const Array& dv) {
  check_heads(q, k, {{"dout", &dout}}, {{"v", &v}, {"dk", &dk}, {"dv", &dv}});
  if (k.elements() == 0) return;
  if (q.size[1] == 0) throw error("attention: no queries; accepted: at least 1");
  const Extent all = extent(options, q, k);
  const bool packed = bool(options.cu_q);
  with_options(device, options, q, k, scale, [&]<class T, int DIM, class M>(const M& m, size_t shared) {
    const KeyValueProblem<T, M> problem{
        problem_of<T>(m, q, k, v, dout, scale, packed), heads_of<T>(dk, packed), heads_of<T>(dv, packed),
        lse.as<const float>(), delta.as<const float>()};
    launch_blocks(device, key_value_gradient_kernel<T, DIM, M>, all.images, q.size[2], ceil_div(all.keys, kOwnedRows),
                  kThreads, shared, problem);
  });
}

}  // namespace fastvit::sm80
