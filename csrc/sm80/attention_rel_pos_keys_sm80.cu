// The gradient of attention's relative position keys R, for compute capability 8.0 and later, in one launch, with no atomics
// and nothing of the size of the scores in memory:
//
//     dR(r) = scale * sum of ds(i, j) q(i) over all i - j + T - 1 = r, over images, and over heads that share R
//     ds = p * (dp - delta)        p = exp(x - lse)        dp = dout v^T, dropped out as the weights were
//
// A thread block owns 16 rows of R of a head, and its four warps share the images (and heads) and the tiles of 16 queries
// that have those distances: for row r and query i, key j = i - r + T - 1. The 16 x 16 scores of 16 rows and 16 queries
// are diagonals of 32 keys times the queries (attention_diagonals.h), and dp of 32 values times dout. With ds in that
// order dR is a product as it stands, ds q, summed in registers; the warps add up at the end, in a fixed order.
//
// Bytes: 96 rows for 256 scores, from L2: latency is hidden by other warps, not by stages.
#include "attention_options.h"

namespace fastvit::sm80 {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;

template <class T>
struct Problem : RelPosKeys {
  Heads<const T> q, k, v, dout;  // (B, T, H, d)
  const float *lse, *delta;      // (B, H, T)
  int images, heads, tokens;
  int sharing;      // heads that share R: H or 1
  float* gradient;  // (H / sharing, 2T - 1, d)
};

// The block's rows of R, and for each warp 16 rows of q and of dout and a window of keys, then of values.
constexpr int kWarpRows = 2 * kPair + kWindow;
template <int DIM>
constexpr size_t kSharedBytes = (kPair + kWarps * kWarpRows) * DIM * sizeof(uint16_t);

template <class T, int DIM>
__global__ void __launch_bounds__(kThreads, 2) rel_pos_keys_gradient_kernel(const Problem<T> problem) {
  const int warp = threadIdx.x / kLanes, g = lane_id() / 4, column = lane_id() % 4 * 2;
  const int tokens = problem.tokens, count = 2 * tokens - 1, first = blockIdx.x * kPair, own_head = blockIdx.y;
  T* own = reinterpret_cast<T*>(shared_memory());      // (16, DIM) of R
  T* q = own + (kPair + warp * kWarpRows) * DIM;  // (16, DIM)
  T* dout = q + kPair * DIM;                           // (16, DIM)
  T* window = dout + kPair * DIM;                      // (kWindow, DIM)
  if (warp == 0) {
    const T* matrix = static_cast<const T*>(problem.rel_pos_keys) + own_head * problem.rel_pos_keys_head;
    load_rows<kPair, DIM>(own, matrix, DIM, first, count);
  }
  __syncthreads();

  // Rows first .. + 16 have the queries from first - T + 1 to first + 15, as far as there are any.
  const int lowest = max(first - tokens + 1, 0), tiles = (min(first + kPair, tokens) - lowest + kPair - 1) / kPair;
  const uint64_t seed = problem.seed ? static_cast<uint64_t>(*problem.seed) : 0;
  float acc[1][DIM / 8][4] = {};
  for (int64_t step = warp; step < static_cast<int64_t>(problem.images) * problem.sharing * tiles; step += kWarps) {
    const int query = lowest + static_cast<int>(step % tiles) * kPair;
    const int head = own_head + static_cast<int>(step / tiles % problem.sharing);
    const int64_t image = step / tiles / problem.sharing, plane = image * problem.heads + head;
    const int centre = query - first + tokens - 1;  // the key of the tile's first row and first query
    const auto bring = [&]<int ROWS>(T* tile, const Heads<const T>& x, int from, std::integral_constant<int, ROWS>) {
      load_rows<ROWS, DIM>(tile, x.rows(image, head), x.token, from, tokens);
    };
    constexpr std::integral_constant<int, kPair> side;
    constexpr std::integral_constant<int, kWindow> around;
    bring(q, problem.q, query, side);
    bring(dout, problem.dout, query, side);
    bring(window, problem.k, centre - kPair, around);
    float s[1][2][4], dp[2][4] = {};
    products<T, DIM, 1>(s, SharedRows<T, DIM>{own}, q, 2);
    add_transposed_diagonals<T, DIM>(s[0][0], s[0][1], q, window);
    bring(window, problem.v, centre - kPair, around);
    add_transposed_diagonals<T, DIM>(dp[0], dp[1], dout, window);

    uint32_t ds[1][4];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      uint32_t words[4], keys[4], queries[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int b = 8 * u + column + i % 2;
        queries[i] = query + b;
        keys[i] = centre + b - (g + i / 2 * 8);
      }
      if (problem.seed) philox(words, keys, queries, static_cast<uint32_t>(plane), seed);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = static_cast<int>(queries[i]), key = static_cast<int>(keys[i]);
        bool present = row < tokens && key >= 0 && key < tokens;
        if (present && problem.mask) present = problem.mask[image * problem.mask_image + key * problem.mask_key] != 0;
        float value = 0.0f;
        if (present) {
          if (problem.seed) dp[u][i] = words[i] >= problem.threshold ? dp[u][i] * problem.kept_scale : 0.0f;
          const int64_t at = plane * tokens + row;
          const float p = ptx::exp2(fmaf(s[0][u][i], problem.scale * kLog2e, -in_log2<ScoreMod>(problem.lse[at])));
          value = p * (dp[u][i] - problem.delta[at]);
        }
        dp[u][i] = value;
      }
    }
    pack_pair<T>(ds[0], dp[0], dp[1]);
    add_products<T, DIM, 1>(acc, ds, q, 0);
  }

  __syncthreads();  // sums (kWarps, 16, DIM) take the tiles' place
  float* sums = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int c = 0; c < DIM / 8; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[(warp * kPair + g + i / 2 * 8) * DIM + 8 * c + column + i % 2] = acc[0][c][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < min(kPair, count - first) * DIM; i += kThreads) {
    float sum = 0.0f;
    for (int other = 0; other < kWarps; ++other) sum += sums[other * kPair * DIM + i];
    problem.gradient[(static_cast<int64_t>(own_head) * count + first) * DIM + i] = sum * problem.scale;
  }
}

}  // namespace

void attention_rel_pos_keys_gradient(
    const Device& device, const AttentionOptions& options, const Array& dout, const Array& q, const Array& k,
    const Array& v, const Array& lse, const Array& delta, double scale, const Array& drel_pos_keys) {
  check_heads(q, k, {{"dout", &dout}}, {{"v", &v}});
  check_gradient("drel_pos_keys", drel_pos_keys);
  const Array& a = options.rel_pos_keys;
  require(a && drel_pos_keys.dims == 3 && (drel_pos_keys.size[0] == 1 || drel_pos_keys.size[0] == a.size[0]) &&
              drel_pos_keys.size[1] == a.size[1] && drel_pos_keys.size[2] == a.size[2],
          "attention: drel_pos_keys; accepted: of the shape of the keys, or of one head's");
  if (drel_pos_keys.elements() == 0) return;
  with_dtype_and_dim(q, [&]<class T, int DIM>() {
    const int heads = static_cast<int>(q.size[2]), own = static_cast<int>(drel_pos_keys.size[0]);
    const Problem<T> problem{
        rel_pos_keys(options, q, k, scale), heads_of<const T>(q), heads_of<const T>(k), heads_of<const T>(v),
        heads_of<const T>(dout), lse.as<const float>(), delta.as<const float>(), static_cast<int>(q.size[0]), heads,
        static_cast<int>(q.size[1]), heads / own, drel_pos_keys.as<float>()};
    const dim3 grid(static_cast<unsigned>(ceil_div(a.size[1], kPair)), static_cast<unsigned>(own));
    launch(device, rel_pos_keys_gradient_kernel<T, DIM>, grid, kThreads, kSharedBytes<DIM>, problem);
  });
}

}  // namespace fastvit::sm80
