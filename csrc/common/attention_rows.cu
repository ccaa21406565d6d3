// Attention's weights from its saved log-sum-exp, as kernels/triton/attention_rows.py: rows that are asked for, and how
// far the heads look. No row needs its maximum or its sum any more: a weight is one exponential of one score.
//
// Both kernels go through the keys alike. A thread block owns 64 rows of one head, 16 a warp, in registers; the keys
// come 64 at a time, copied into one half of shared memory while the products of the other are taken, with one barrier
// a step. Bytes: q once, k once and from L2 for every further block of rows, and the weights that were asked for.
#include "attention_tiles.h"
#include "vectors.cuh"

namespace fastvit::sm80 {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kRows = 16 * kWarps;
constexpr int kKeys = 64;
constexpr int kSlices = kKeys / 8;

template <class T>
struct Scores {
  Heads<const T> q, k;  // (B, Tq, H, d), (B, Tk, H, d)
  const float* lse;     // (B, H, stride of a head)
  int64_t lse_head;
  int queries, keys;
  float scale_log2;  // scale / ln 2
  int64_t first_image = 0;
};

// visit(first key, s (16, 64)) for all keys, in warps that have rows; row_of(i) is the i-th row of the block, or -1.
template <class T, int DIM, class RowOf, class Visit>
__device__ __forceinline__ void go_through(
    const Scores<T>& scores, const Place& place, bool active, const RowOf& row_of, const Visit& visit) {
  const int thread = threadIdx.x, warp = thread / kLanes;
  T* q = reinterpret_cast<T*>(shared_memory());  // (kRows, DIM)
  T* stages = q + kRows * DIM;                   // (2, kKeys, DIM)
  const T* from = scores.q.rows(place.image, place.head);
  const T* k = scores.k.rows(place.image, place.head);

  constexpr int kChunks = DIM / 8;
  for (int i = thread; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t at = row_of(row);
    ptx::copy_async(q + Swizzle<DIM>::at(row, chunk), at < 0 ? from : from + at * scores.q.token + chunk * 8, at >= 0);
  }
  const auto load = [&](int step) {
    copy_rows_async<DIM>(
        stages + step % 2 * kKeys * DIM, kKeys, k, scores.k.token, step * kKeys, scores.keys, thread, kThreads);
    ptx::copy_async_commit();
  };
  load(0);
  ptx::copy_async_wait<0>();
  __syncthreads();
  const RegisterRows<DIM, 1> rows(SharedRows<T, DIM>{q + 16 * warp * DIM});

  // Behind the barrier step n has arrived, and everyone is done with what step n + 1 overwrites.
  const int steps = (scores.keys + kKeys - 1) / kKeys;
  for (int step = 0; step < steps; ++step) {
    if (step > 0) {
      ptx::copy_async_wait<0>();
      __syncthreads();
    }
    if (step + 1 < steps) load(step + 1);
    if (active) {
      float s[1][kSlices][4];
      products<T, DIM, kSlices / 2>(s, rows, stages + step % 2 * kKeys * DIM, kSlices);
      visit(step * kKeys, s[0]);
    }
  }
}

// The log-sum-exp of a row, in units of log 2, as a weight needs it: that of a row without a key leaves nothing.
__device__ __forceinline__ float log2_of(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2e; }

template <class T>
struct RowsProblem : Scores<T> {
  const int64_t* rows;  // (R,), from the end where negative
  const float* bias;    // (B, H, R, Tk), or null
  int64_t bias_image, bias_head, bias_row, bias_key;  // its strides
  float* out;           // (B, H, R, Tk)
  int count;            // R
};

template <class T, int DIM>
__global__ void __launch_bounds__(kThreads, 4) attention_rows_kernel(const RowsProblem<T> problem) {
  const Place place(problem.first_image, kRows);
  const auto row_of = [&](int i) -> int64_t {
    if (place.first + i >= problem.count) return -1;
    const int64_t asked = problem.rows[place.first + i], row = asked < 0 ? asked + problem.queries : asked;
    return row >= 0 && row < problem.queries ? row : -1;  // no other memory is read, whatever is asked
  };
  const int own = threadIdx.x / kLanes * 16 + lane_id() / 4, column = lane_id() % 4 * 2;
  float lse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = row_of(own + 8 * i);
    lse[i] = row < 0 ? NAN : log2_of(problem.lse[place.in(problem.lse_head) + row]);
  }
  const bool active = place.first + threadIdx.x / kLanes * 16 < static_cast<unsigned>(problem.count);
  go_through<T, DIM>(problem, place, active, row_of, [&](int start, const float (&s)[kSlices][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = place.first + own + 8 * (i / 2);
      if (row >= problem.count) continue;
      float* out = problem.out + (place.in(problem.count) + row) * problem.keys;
      const float* bias = problem.bias == nullptr ? nullptr
                                                  : problem.bias + place.image * problem.bias_image +
                                                        place.head * problem.bias_head + row * problem.bias_row;
#pragma unroll
      for (int j = 0; j < kSlices; ++j) {
        const int key = start + 8 * j + column + i % 2;
        if (key >= problem.keys) continue;
        const float more = bias == nullptr ? 0.0f : bias[key * problem.bias_key] * kLog2e;
        out[key] = ptx::exp2(fmaf(s[j][i], problem.scale_log2, more - lse[i / 2]));
      }
    }
  });
}

template <class T>
struct DistanceProblem : Scores<T> {
  float* partials;  // (blocks, B, H)
  int64_t rows;     // B H
  float width, across_width;             // of the grid, in patches, and 1 / that
  float step_down, step_across, share;  // height and width of a patch; 1 / patches
};

template <class T, int DIM>
__global__ void __launch_bounds__(kThreads) attention_distance_kernel(const DistanceProblem<T> problem) {
  const Place place(problem.first_image, kRows);
  const auto row_of = [&](int i) -> int64_t { return place.first + i < problem.queries ? place.first + i : -1; };
  // Where a patch is: exact below 2^22, where a quotient's error is less than half a patch's share of a line.
  const auto down_across = [&](int patch, float& down, float& across) {
    const float line = floorf((static_cast<float>(patch) + 0.5f) * problem.across_width);
    down = line * problem.step_down;
    across = (static_cast<float>(patch) - line * problem.width) * problem.step_across;
  };
  const int warp = threadIdx.x / kLanes, own = warp * 16 + lane_id() / 4, column = lane_id() % 4 * 2;
  float lse[2], down[2], across[2], total = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = row_of(own + 8 * i);
    lse[i] = row < 0 ? INFINITY : log2_of(problem.lse[place.in(problem.lse_head) + row]);
    down_across(place.first + own + 8 * i, down[i], across[i]);
  }
  const bool active = place.first + warp * 16 < problem.queries;
  go_through<T, DIM>(problem, place, active, row_of, [&](int start, const float (&s)[kSlices][4]) {
#pragma unroll
    for (int j = 0; j < kSlices; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int key = start + 8 * j + column + h;
        if (key >= problem.keys) continue;
        float y, x;
        down_across(key, y, x);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float p = ptx::exp2(fmaf(s[j][2 * i + h], problem.scale_log2, -lse[i]));
          const float dy = down[i] - y, dx = across[i] - x;
          total = fmaf(p, sqrtf(fmaf(dy, dy, dx * dx)), total);
        }
      }
    }
  });
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
  float* of_warps = reinterpret_cast<float*>(shared_memory());  // (kWarps,), where the queries were
  __syncthreads();
  if (lane_id() == 0) of_warps[warp] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int other = 1; other < kWarps; ++other) total += of_warps[other];
  problem.partials[blockIdx.x * problem.rows + place.in(1)] = total * problem.share;
}

void check_lse(const Array& q, const Array& lse) {
  const bool fits = lse.dims == 3 && lse.dtype == DType::float32 && lse.size[0] == q.size[0] &&
                    lse.size[1] == q.size[2] && lse.size[2] == q.size[1] && lse.stride[2] == 1 &&
                    lse.stride[1] == lse.size[2] && lse.stride[0] == lse.size[1] * lse.size[2];
  require(fits || lse.elements() == 0, "attention: lse; accepted: (", q.size[0], ", ", q.size[2], ", ", q.size[1],
          ") float32, contiguous");
}

template <class T>
Scores<T> scores_of(const Array& q, const Array& k, const Array& lse, double scale, int64_t skipped) {
  const auto tail = [&](const Array& x) {
    Heads<const T> heads = heads_of<const T>(x);
    heads.data += skipped * heads.token;
    return heads;
  };
  return {tail(q), tail(k), lse.as<float>() + skipped, q.size[1], static_cast<int>(q.size[1] - skipped),
          static_cast<int>(k.size[1] - skipped), static_cast<float>(scale) * kLog2e};
}

template <int DIM>
constexpr size_t kShared = (kRows + 2 * kKeys) * DIM * sizeof(half);

}  // namespace
}  // namespace fastvit::sm80

namespace fastvit {

using namespace sm80;

void attention_rows(
    const Device& device, const Array& q, const Array& k, const Array& lse, const Array& rows, const Array& bias,
    double scale, const Array& out) {
  check_heads(q, k, {}, {});
  check_lse(q, lse);
  require(rows.dims == 1 && rows.dtype == DType::int64 && (rows.stride[0] == 1 || rows.size[0] < 2),
          "attention: rows; accepted: (R,) int64, contiguous");
  const int64_t shape[] = {q.size[0], q.size[2], rows.size[0], k.size[1]};
  for (const Array* each : {&out, &bias}) {
    require(!*each || (each->dims == 4 && each->dtype == DType::float32 && std::equal(shape, shape + 4, each->size)),
            "attention: ", each == &out ? "out" : "bias", "; accepted: (", shape[0], ", ", shape[1], ", ", shape[2], ", ",
            shape[3], ") float32");
  }
  if (out.elements() == 0) return;
  with_dtype_and_dim(q, [&]<class T, int DIM>() {
    const RowsProblem<T> problem{scores_of<T>(q, k, lse, scale, 0), rows.as<int64_t>(), bias.as<float>(), bias.stride[0],
                                 bias.stride[1], bias.stride[2], bias.stride[3], out.as<float>(),
                                 static_cast<int>(shape[2])};
    launch_blocks(device, attention_rows_kernel<T, DIM>, shape[0], shape[1], ceil_div(shape[2], kRows), kThreads,
                  kShared<DIM>, problem);
  });
}

int64_t attention_distance_blocks(const Device&, int64_t patches) { return ceil_div(patches, kRows); }

void attention_distance(
    const Device& device, const Array& q, const Array& k, const Array& lse, double scale, int64_t height, int64_t width,
    double patch_height, double patch_width, const Array& partials) {
  check_heads(q, k, {}, {{"q", &q}});
  check_lse(q, lse);
  const int64_t patches = height * width, blocks = attention_distance_blocks(device, patches);
  require(height > 0 && width > 0 && patches <= q.size[1] && patches < (1 << 22), "attention: a grid of ", height, "x",
          width, "; accepted: up to the ", q.size[1], " tokens, and 2^22");
  const int64_t shape[] = {blocks, q.size[0], q.size[2]};
  require(partials.dims == 3 && partials.dtype == DType::float32 && std::equal(shape, shape + 3, partials.size),
          "attention: partials; accepted: (", shape[0], ", ", shape[1], ", ", shape[2], ") float32");
  if (partials.elements() == 0) return;
  with_dtype_and_dim(q, [&]<class T, int DIM>() {
    const DistanceProblem<T> problem{
        scores_of<T>(q, k, lse, scale, q.size[1] - patches), partials.as<float>(), shape[1] * shape[2],
        static_cast<float>(width), 1.0f / static_cast<float>(width), static_cast<float>(patch_height),
        static_cast<float>(patch_width), 1.0f / static_cast<float>(patches)};
    launch_blocks(
        device, attention_distance_kernel<T, DIM>, shape[1], shape[2], blocks, kThreads, kShared<DIM>, problem);
  });
}

}  // namespace fastvit
