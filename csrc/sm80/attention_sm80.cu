// Attention, forward, for compute capability 8.0 and later: softmax(q k^T * scale) v for every head, with mma.sync.
//
// A thread block owns a few warps' rows of queries of one head. Two kernels:
//
// Single pass, for 113 to 208 keys (197 and its neighbours): all keys and values of the head lie in shared memory, all
// scores of a row in registers (104 a thread for its two rows). One maximum, one exponential each, one sum; nothing is
// ever rescaled. The keys are taken exactly, 8 at a time for q k^T and 16 for p v: 200 and 208 for 197, not 256. The
// first 128 are straight-line code; from there on every pair of slices is behind a branch that all threads take alike,
// so one kernel serves every count. Registers peak in the scores, which are gone (rounded, in half as many registers)
// by the time the output is summed: up to 6 warps of at most 168 registers, two blocks to a multiprocessor, one loading
// while the other computes. Values arrive while scores are computed.
//
// Online softmax (Milakov and Gimelshein 2018; Dao 2023, algorithm 1), for every other count: blocks of 64 keys, the
// keys that do not fill a block first (again exactly, in slices), each later block rescaling what was summed before it.
// Two stages in shared memory: a block is copied while the one before it is computed, with one barrier a block. The
// queries wait in what becomes the second stage until they are in registers. Up to a head dim of 64 a warp owns 32
// rows, so that what it reads from shared memory serves twice the products.
//
// With options (attention_options.h) online softmax serves every count, 16 rows a warp: the registers that a second
// instance of the single pass or more rows would need go to what belongs to a score. Every block of keys then takes the
// same path, scores in natural units, absent keys and masked ones -inf; dropout follows the sum of exponentials.
//
// Bytes: q and out once; k and v once from memory, and once more from L2 for every further block of rows. Shared memory
// is swizzled (swizzle.cuh): no read or write of it has a bank conflict.
#include "attention_options.h"

namespace fastvit::sm80 {

namespace {

constexpr int kSinglePairs = 13;     // up to 208 keys
constexpr int kSingleSurePairs = 8;  // and at least 113
constexpr int kSingleWarps = 6;  // two blocks' are 3 for each quarter of a multiprocessor: 168 registers a thread
constexpr int kOnlinePairs = 4;  // blocks of 64 keys
constexpr int kOnlineKeys = kOnlinePairs * kPair;
constexpr int kOnlineWarps = 4;
constexpr int kOnlineStages = 2;

template <int DIM, class M>
constexpr int kOnlineRowTiles = DIM <= 64 && !M::kScoreMod ? 2 : 1;
template <int DIM, class M>
constexpr int kOnlineBlocks = DIM > 64 && DIM <= 88 && !M::kScoreMod ? kMostBlocks : 2;
template <int DIM>
constexpr size_t kOnlineBytes = kOnlineStages * 2 * kOnlineKeys * DIM * sizeof(uint16_t);

template <class T, class M>
struct Problem : M {
  Heads<const T> q, k, v;  // (B, Tq, H, d), (B, Tk, H, d), (B, Tk, H, d)
  Heads<T> out;            // (B, Tq, H, d)
  float* lse;              // (B, H, Tq)
  int queries, keys;
  float scale_log2;  // |scale| / ln 2, and not 0: the score of an absent key, -inf, stays -inf; 1 / ln 2 when ScoreMod
  uint32_t flip;     // the scale's sign, given to q, exactly: the highest score is then the highest scaled score
  int64_t first_image = 0;
};

// What a warp knows of its rows: for each of M tiles, of a lane's rows l / 4 and l / 4 + 8.
template <int DIM, int M>
struct State {
  float top[M][2];    // the highest score
  float total[M][2];  // this lane's part of the sum of exponentials
  float out[M][DIM / 8][4];

  __device__ __forceinline__ explicit State(float lowest = -INFINITY) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        top[m][i] = lowest;
        total[m][i] = 0.0f;
      }
#pragma unroll
      for (int c = 0; c < DIM / 8; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][c][i] = 0.0f;
      }
    }
  }
};

// Takes the highest scores into the state and, unless these are the first keys, shrinks the sums to fit. `keys` are
// there; scores of the last pair beyond them become -inf.
template <bool FIRST, int SURE, int DIM, int M, int SLICES>
__device__ __forceinline__ void find_highest(
    State<DIM, M>& state, float (&s)[M][SLICES][4], int keys, float scale_log2) {
  const int column = lane_id() % 4 * 2;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float top[2] = {state.top[m][0], state.top[m][1]};
#pragma unroll
    for (int j = 0; j < SLICES / 2; ++j) {
      if (j >= SURE && kPair * j >= keys) break;
      if (j >= SURE - 1 && kPair * (j + 1) > keys) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (kPair * j + 8 * h + column + i % 2 >= keys) s[m][2 * j + h][i] = -INFINITY;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], fmaxf(s[m][2 * j][i], s[m][2 * j + 1][i]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = row_max(top[i]);
      if constexpr (!FIRST) {
        const float shrink = ptx::exp2((state.top[m][i] - top[i]) * scale_log2);
        state.total[m][i] *= shrink;
#pragma unroll
        for (int c = 0; c < DIM / 8; ++c) {
          state.out[m][c][2 * i] *= shrink;
          state.out[m][c][2 * i + 1] *= shrink;
        }
      }
      state.top[m][i] = top[i];
    }
  }
}

struct KeepAll {
  __device__ __forceinline__ void operator()(float (&)[4], int, int) const {}
};

// p = exp2((s - top) * scale_log2), rounded, as left operands; total += their sum before rounding, and before drop(p of a
// slice, m, slice) takes some.
template <class T, int SURE, int DIM, int M, int SLICES, class Drop = KeepAll>
__device__ __forceinline__ void exponentials(
    State<DIM, M>& state, uint32_t (&p)[SLICES / 2][M][4], const float (&s)[M][SLICES][4], int keys, float scale_log2,
    const Drop& drop = {}) {
#pragma unroll
  for (int j = 0; j < SLICES / 2; ++j) {
    if (j >= SURE && kPair * j >= keys) break;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float e[2][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          e[h][i] = ptx::exp2(fmaf(s[m][2 * j + h][i], scale_log2, -state.top[m][i / 2] * scale_log2));
          state.total[m][i / 2] += e[h][i];
        }
        drop(e[h], m, 2 * j + h);
      }
      pack_pair<T>(p[j][m], e[0], e[1]);
    }
  }
}

// out += p v.
template <class T, int SURE, int DIM, int M, int PAIRS>
__device__ __forceinline__ void add_values(
    State<DIM, M>& state, const uint32_t (&p)[PAIRS][M][4], const T* v, int keys) {
#pragma unroll
  for (int j = 0; j < PAIRS; ++j) {
    if (j >= SURE && kPair * j >= keys) break;
    add_products<T, DIM, M>(state.out, p[j], v, kPair * j);
  }
}

// out / total, and the log of the softmax's denominator; scratch: 16 M rows of shared memory that are this warp's.
template <class T, int DIM, int M, class Mod>
__device__ __forceinline__ void finish(
    const Problem<T, Mod>& problem, const State<DIM, M>& state, const Place& place, const Rows& queries, int first,
    T* scratch) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float total = row_sum(state.total[m][i]);
      const int row = first + 16 * m + 8 * i + lane_id() / 4;
      if constexpr (Mod::kScoreMod) {
        factor[i] = total > 0.0f ? problem.kept_scale / total : 0.0f;
      } else {
        factor[i] = 1.0f / total;
      }
      if (lane_id() % 4 == 0 && row < queries.count) {
        problem.lse[queries.vector + row] = fmaf(state.top[m][i], problem.scale_log2, log2f(total)) / kLog2e;
      }
    }
    store_rows<T, DIM>(
        state.out[m], factor, scratch + 16 * m * DIM, problem.out.rows(place.image, place.head, queries.first),
        problem.out.token, first + 16 * m, queries.count);
  }
}

template <class T, int DIM>
__global__ void __launch_bounds__(kSingleWarps * kLanes, 2) single_pass_kernel(const Problem<T, Plain> problem) {
  const int thread = threadIdx.x, threads = blockDim.x, warp = thread / kLanes;
  const Place place(problem.first_image, threads / 2);
  const int keys = problem.keys, padded = (keys + kPair - 1) / kPair * kPair;
  T* k = reinterpret_cast<T*>(shared_memory());  // (padded, DIM)
  T* v = k + padded * DIM;                       // (padded, DIM): absent values are 0, as their p is
  T* q = v + padded * DIM;                       // (threads / 2, DIM), later the output

  copy_rows_async<DIM>(q, threads / 2, problem.q.rows(place.image, place.head), problem.q.token, place.first,
                       problem.queries, thread, threads);
  copy_rows_async<DIM>(k, padded, problem.k.rows(place.image, place.head), problem.k.token, 0, keys, thread, threads);
  ptx::copy_async_commit();
  copy_rows_async<DIM>(v, padded, problem.v.rows(place.image, place.head), problem.v.token, 0, keys, thread, threads);
  ptx::copy_async_commit();
  ptx::copy_async_wait<1>();
  __syncthreads();

  const int first = place.first + 16 * warp;
  T* rows = q + 16 * warp * DIM;
  const bool active = first < problem.queries;
  float s[1][2 * kSinglePairs][4];
  uint32_t p[kSinglePairs][1][4];
  State<DIM, 1> state;
  if (active) {
    products<T, DIM, kSingleSurePairs>(s, SharedRows<T, DIM>{rows, problem.flip}, k, (keys + 7) / 8);
    find_highest<true, kSingleSurePairs>(state, s, keys, problem.scale_log2);
    exponentials<T, kSingleSurePairs>(state, p, s, keys, problem.scale_log2);
  }
  ptx::copy_async_wait<0>();
  __syncthreads();
  if (!active) return;
  add_values<T, kSingleSurePairs>(state, p, v, keys);
  finish(problem, state, place, problem.Plain::queries(place, problem.queries), first, rows);
}

template <class T, int DIM, class Mod>
__global__ void __launch_bounds__(kOnlineWarps * kLanes, kOnlineBlocks<DIM, Mod>) online_kernel(
    const Problem<T, Mod> problem) {
  constexpr int M = kOnlineRowTiles<DIM, Mod>;
  constexpr int kStage = 2 * kOnlineKeys * DIM;
  constexpr int kThreads = kOnlineWarps * kLanes, kBlockRows = kOnlineWarps * 16 * M;
  static_assert(kBlockRows <= 2 * kOnlineKeys, "the queries wait in one stage");
  const int thread = threadIdx.x, warp = thread / kLanes;
  const Place place(problem.first_image, kBlockRows);
  const Mod& options = problem;
  const Rows queries = options.queries(place, problem.queries), keys = options.keys(place, problem.keys);
  if (Mod::kScoreMod && place.first >= queries.count) return;
  const int full = (keys.count - 1) / kOnlineKeys, rest = keys.count - full * kOnlineKeys;
  T* stages = reinterpret_cast<T*>(shared_memory());  // (kOnlineStages, {k, v}, kOnlineKeys, DIM)
  float* table = reinterpret_cast<float*>(stages + kOnlineStages * kStage);
  const T* k = problem.k.rows(place.image, place.head, keys.first);
  const T* v = problem.v.rows(place.image, place.head, keys.first);

  // Step 0 takes the rest, the last keys; step n > 0 block n - 1.
  const auto load_rest = [&] {
    const int padded = (rest + kPair - 1) / kPair * kPair, start = full * kOnlineKeys;
    copy_rows_async<DIM>(stages, padded, k, problem.k.token, start, keys.count, thread, kThreads);
    copy_rows_async<DIM>(
        stages + kOnlineKeys * DIM, padded, v, problem.v.token, start, keys.count, thread, kThreads);
    ptx::copy_async_commit();
  };
  const auto load = [&](int step) {
    const int64_t start = (step - 1) * kOnlineKeys;
    T* stage = stages + step % kOnlineStages * kStage;
    copy_tile_async<DIM, kOnlineKeys, kThreads>(stage, k + start * problem.k.token, problem.k.token, thread);
    copy_tile_async<DIM, kOnlineKeys, kThreads>(
        stage + kOnlineKeys * DIM, v + start * problem.v.token, problem.v.token, thread);
    ptx::copy_async_commit();
  };

  T* q = stages + kStage;  // (kBlockRows, DIM)
  copy_rows_async<DIM>(q, kBlockRows, problem.q.rows(place.image, place.head, queries.first), problem.q.token,
                       place.first, queries.count, thread, kThreads);
  ptx::copy_async_commit();
  load_rest();
  options.stage(table, place.head);
  ptx::copy_async_wait<1>();
  __syncthreads();
  const int first = place.first + 16 * M * warp;
  const bool active = first < queries.count;
  const RegisterRows<DIM, M> rows(SharedRows<T, DIM>{q + 16 * M * warp * DIM, problem.flip});

  // One barrier a step: behind it step n has arrived, and everyone is done with what step n + 1 overwrites.
  float s[M][2 * kOnlinePairs][4];
  uint32_t p[kOnlinePairs][M][4];
  const auto end = [&](const State<DIM, M>& state) {
    // The stage that the last step did not read is free.
    if (active) {
      finish(problem, state, place, queries, first, stages + (full + 1) % kOnlineStages * kStage + 16 * M * warp * DIM);
    }
  };
  if constexpr (Mod::kScoreMod) {
    State<DIM, M> state(kNoScore);
    const typename Mod::template Warp<false> around(
        options, place.image, place.head, gridDim.y, queries.count, keys.count, table, first);
    for (int step = 0; step <= full && keys.count > 0; ++step) {
      ptx::copy_async_wait<0>();
      __syncthreads();
      if (step < full) load(step + 1);
      if (!active) continue;
      const T* stage = stages + step % kOnlineStages * kStage;
      const int start = (step == 0 ? full : step - 1) * kOnlineKeys, count = step == 0 ? rest : kOnlineKeys;
      products<T, DIM, 1>(s, rows, stage, (count + 7) / 8);
      if constexpr (Mod::kRelPosKeys) {
        T* window = reinterpret_cast<T*>(table) + warp * kWindow * DIM;
#pragma unroll
        for (int j = 0; j < kOnlinePairs; ++j) {
          if (kPair * j >= count) break;
          around.template load_window<DIM>(window, start + kPair * j);
          add_diagonals<T, DIM>(s[0][2 * j], s[0][2 * j + 1], rows, window);
        }
      }
#pragma unroll
      for (int j = 0; j < 2 * kOnlinePairs; ++j) around.scores(s[0][j], start + 8 * j);
      find_highest<false, kOnlinePairs>(state, s, kOnlineKeys, problem.scale_log2);
      exponentials<T, kOnlinePairs>(state, p, s, kOnlineKeys, problem.scale_log2, [&](float (&e)[4], int, int slice) {
        if (!around.dropping()) return;
        bool kept[4];
        around.keep(kept, start + 8 * slice);
#pragma unroll
        for (int i = 0; i < 4; ++i) e[i] = kept[i] ? e[i] : 0.0f;
      });
      add_values<T, 1>(state, p, stage + kOnlineKeys * DIM, count);
    }
    end(state);
  } else {
    State<DIM, M> state;
    ptx::copy_async_wait<0>();
    __syncthreads();
    if (full > 0) load(1);
    if (active) {
      products<T, DIM, 1>(s, rows, stages, (rest + 7) / 8);
      find_highest<true, 1>(state, s, rest, problem.scale_log2);
      exponentials<T, 1>(state, p, s, rest, problem.scale_log2);
      add_values<T, 1>(state, p, stages + kOnlineKeys * DIM, rest);
    }
    for (int step = 1; step <= full; ++step) {
      ptx::copy_async_wait<0>();
      __syncthreads();
      if (step < full) load(step + 1);
      if (active) {
        const T* stage = stages + step % kOnlineStages * kStage;
        products<T, DIM, kOnlinePairs>(s, rows, stage, 2 * kOnlinePairs);
        find_highest<false, kOnlinePairs>(state, s, kOnlineKeys, problem.scale_log2);
        exponentials<T, kOnlinePairs>(state, p, s, kOnlineKeys, problem.scale_log2);
        add_values<T, kOnlinePairs>(state, p, stage + kOnlineKeys * DIM, kOnlineKeys);
      }
    }
    end(state);
  }
}

template <class T, int DIM, class Mod>
void online(
    const Device& device, const Problem<T, Mod>& problem, int64_t images, int64_t heads, int64_t queries,
    size_t shared) {
  constexpr int kBlockRows = kOnlineWarps * 16 * kOnlineRowTiles<DIM, Mod>;
  launch_blocks(device, online_kernel<T, DIM, Mod>, images, heads, ceil_div(queries, kBlockRows),
                kOnlineWarps * kLanes, shared, problem);
}

template <class T, int DIM>
void forward(const Device& device, const Problem<T, Plain>& problem, const Array& q) {
  constexpr int64_t kRowBytes = DIM * sizeof(T);
  const int64_t pairs = ceil_div(problem.keys, kPair);
  if (pairs >= kSingleSurePairs && pairs <= kSinglePairs) {
    // Evenly: 13 x 16 rows are 5 + 5 + 3 warps, not 6 + 6 + 1, and no block is larger than it need be.
    const int64_t all = ceil_div(problem.queries, 16), blocks = ceil_div(all, kSingleWarps);
    const int64_t warps = ceil_div(all, blocks);
    const int64_t shared = (2 * pairs * kPair + 16 * warps) * kRowBytes;
    // Two blocks share a multiprocessor, or nothing computes while keys arrive; each takes 1 KB for itself.
    if (2 * (shared + 1024) <= device.shared_bytes + 1024) {
      const int threads = static_cast<int>(warps) * kLanes;
      return launch_blocks(device, single_pass_kernel<T, DIM>, q.size[0], q.size[2], blocks, threads, shared, problem);
    }
  }
  online<T, DIM>(device, problem, q.size[0], q.size[2], problem.queries, kOnlineBytes<DIM>);
}

}  // namespace

void attention_forward(
    const Device& device, const AttentionOptions& options, const Array& q, const Array& k, const Array& v,
    double scale, const Array& out, const Array& lse) {
  check_heads(q, k, {{"out", &out}}, {{"v", &v}});
  const bool packed = bool(options.cu_q);
  if (out.elements() == 0) return;
  if (k.size[1] == 0) throw error("attention: no keys; accepted: at least 1");
  with_dtype_and_dim(q, [&]<class T, int DIM>() {
    const auto problem = [&]<class M>(const M& m, float scale_log2, uint32_t flip) -> Problem<T, M> {
      return {m, heads_of<const T>(q, packed), heads_of<const T>(k, packed), heads_of<const T>(v, packed),
              heads_of<T>(out, packed), lse.as<float>(), static_cast<int>(q.size[1]), static_cast<int>(k.size[1]),
              scale_log2, flip};
    };
    with_kind(options, q, k, scale, [&](auto m) {
      using M = decltype(m);
      if constexpr (M::kScoreMod) {
        const Extent all = extent(options, q, k);
        const size_t shared = stage<DIM>(device, kOnlineBytes<DIM>, kOnlineWarps, m);
        online<T, DIM>(device, problem(m, kLog2e, 0), all.images, q.size[2], all.queries, shared);
      } else {
        const float scale_log2 = std::fmax(static_cast<float>(std::fabs(scale)) * kLog2e, 1e-37f);
        forward<T, DIM>(device, problem(m, scale_log2, scale < 0 ? 0x80008000u : 0u), q);
      }
    });
  });
}

}  // namespace fastvit::sm80
