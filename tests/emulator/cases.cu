// Small kernels for tests/emulated/test_host.py and test_detector.py, called through ctypes. Each function returns the
// error's text, or an empty one.
#include <functional>
#include <string>

#include "ptx.cuh"

namespace fastvit {
namespace {

const char* text_of(const std::function<void()>& run) {
  static std::string text;
  try {
    text.clear();
    run();
  } catch (const std::exception& e) {
    text = e.what();
  }
  host::forget_allocations();
  return text.c_str();
}

// ---- One instruction each ------------------------------------------------------------------------------------------

// d (16, 8) += a (16, K) b (8, K)^T by one warp, fragments gathered as the figures of the PTX ISA have them.
template <class T, int K>
__global__ void mma_kernel(float* d, const T* a, const T* b) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const auto pair = [](const T* at) { return *reinterpret_cast<const uint32_t*>(at); };
  float sum[4] = {d[g * 8 + 2 * t], d[g * 8 + 2 * t + 1], d[(g + 8) * 8 + 2 * t], d[(g + 8) * 8 + 2 * t + 1]};
  if constexpr (K == 16) {
    const uint32_t left[4] = {pair(a + g * 16 + 2 * t), pair(a + (g + 8) * 16 + 2 * t), pair(a + g * 16 + 2 * t + 8),
                              pair(a + (g + 8) * 16 + 2 * t + 8)};
    const uint32_t right[2] = {pair(b + g * 16 + 2 * t), pair(b + g * 16 + 2 * t + 8)};
    ptx::mma<T>(sum, left, right);
  } else {
    const uint32_t left[2] = {pair(a + g * 8 + 2 * t), pair(a + (g + 8) * 8 + 2 * t)};
    ptx::mma_k8<T>(sum, left, pair(b + g * 8 + 2 * t));
  }
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// r (32, 4): the registers of every lane, of n matrices (8, 8) of 16 bits each. Lanes past the n * 8th give no address.
__global__ void ldmatrix_kernel(uint32_t* r, const uint16_t* matrices, int n, bool transposed, int shift) {
  const int lane = static_cast<int>(threadIdx.x);
  auto* const shared = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = lane; i < n * 64; i += 32) shared[i] = matrices[i];
  __syncwarp();
  const uint16_t* const row = lane < n * 8 ? shared + lane * 8 + shift : nullptr;
  if (n == 4) {
    uint32_t four[4];
    transposed ? ptx::ldmatrix_transposed(four, row) : ptx::ldmatrix(four, row);
    for (int i = 0; i < 4; ++i) r[lane * 4 + i] = four[i];
  } else {
    uint32_t two[2];
    transposed ? ptx::ldmatrix_transposed(two, row) : ptx::ldmatrix(two, row);
    for (int i = 0; i < 2; ++i) r[lane * 4 + i] = two[i];
  }
}

__global__ void shuffle_kernel(float* out, int how, int lanes, int width, unsigned mask) {
  const int lane = static_cast<int>(threadIdx.x);
  if (!(mask >> lane & 1)) return;
  const float mine = static_cast<float>(lane);
  out[lane] = how == 0   ? __shfl_sync(mask, mine, lanes, width)
              : how == 1 ? __shfl_xor_sync(mask, mine, lanes, width)
                         : __shfl_down_sync(mask, mine, lanes, width);
}

// Not watched: what is in flight may not be read.
__attribute__((no_sanitize("thread"))) void peek(float* to, const char* from, int bytes) {
  for (int i = 0; i < bytes / 4; ++i) to[i] = reinterpret_cast<const float*>(from)[i];
}

// Two groups of copies, the second of zeros; seen (3, 8): their floats after no wait, a wait for one, a wait for both.
__global__ void copy_kernel(float* seen, const float* data) {
  if (threadIdx.x) return;
  char* const shared = shared_memory();
  ptx::copy_async(shared, data);
  ptx::copy_async_commit();
  ptx::copy_async(shared + 16, data + 4, false);
  ptx::copy_async_commit();
  peek(seen, shared, 32);
  ptx::copy_async_wait<1>();
  peek(seen + 8, shared, 32);
  ptx::copy_async_wait<0>();
  peek(seen + 16, shared, 32);
}

enum {
  kFine, kThreadsMissBarrier, kReturnBeforeBarrier, kMixed, kOwnMaskMissing, kException, kSharedTooSmall, kMisaligned,
  kPastArray
};

__global__ void barrier_kernel(int* order, int what) {
  const int i = static_cast<int>(threadIdx.x);
  auto* const shared = reinterpret_cast<int*>(shared_memory());
  if (what == kReturnBeforeBarrier && i == 5) return;
  if (what == kException && i == 40) throw error("said by a thread");
  if (what == kSharedTooSmall && i == 63) shared[64] = 0;
  shared[i] = i;
  if (what == kMisaligned) reinterpret_cast<Vector<int, 4>*>(order + i)->at[0] = 0;
  int few[4] = {i, i, i, i};
  for (int j = 0; j < (what == kPastArray ? 5 : 4); ++j) few[j] += few[3 - j];
  order[i] = few[i % 4];
  if (what == kThreadsMissBarrier && i >= 32) return;
  __syncthreads();
  if (what == kMixed && i < 16) {
    __syncwarp();
  } else if (what == kMixed && i < 32) {
    __shfl_sync(~0u, i, 0);
  }
  if (what == kOwnMaskMissing) __syncwarp(0xfffffffe);
  order[i] = shared[63 - i];
}

__global__ void exp2_kernel(float* x, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) x[i] = ptx::exp2(x[i]);
}

// ---- A product with one bug at a time ------------------------------------------------------------------------------

enum { kRight, kTail, kNoBarrierBeforeOverwriting, kNoBarrierAfterWait, kWaitTooLittle, kSwizzle, kAllWriteOneTile };

// c (M, N) = a (M, K) b (N, K)^T, 32x32 tiles by 2x2 warps, K in steps of 32 through two buffers. 16-byte chunks of a
// tile's rows of 64 bytes are permuted, chunk ^= row / 2 % 4, so that ldmatrix's eight rows lie in different banks.
__global__ void __launch_bounds__(128)
    product_kernel(float* c, const half* a, const half* b, int M, int N, int K, int bug) {
  constexpr int kTile = 32, kRowBytes = 64, kTileBytes = kTile * kRowBytes;
  char* const shared = shared_memory();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int m0 = static_cast<int>(blockIdx.y) * kTile, n0 = static_cast<int>(blockIdx.x) * kTile;

  const auto place = [](char* tile, int row, int chunk, int odd) {
    return tile + row * kRowBytes + (chunk ^ (row / 2 % 4) ^ odd) * 16;
  };
  const auto load = [&](int step) {
    char* const buffer = shared + step % 2 * 2 * kTileBytes;
    const int row = thread / 4, chunk = thread % 4, k = step * kTile + chunk * 8;
    const int odd = bug == kSwizzle && row == 17;
    ptx::copy_async(place(buffer, row, chunk, 0), a + (m0 + row) * K + k, m0 + row < M && k < K);
    ptx::copy_async(place(buffer + kTileBytes, row, chunk, odd), b + (n0 + row) * K + k, n0 + row < N && k < K);
    ptx::copy_async_commit();
  };

  float sum[2][4] = {};
  const int steps = (K + kTile - 1) / kTile;
  load(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load(step + 1);
    if (step + 1 < steps || bug == kWaitTooLittle) {
      ptx::copy_async_wait<1>();
    } else {
      ptx::copy_async_wait<0>();
    }
    if (bug != kNoBarrierAfterWait) __syncthreads();
    char* const buffer = shared + step % 2 * 2 * kTileBytes;
    for (int k = 0; k < kTile; k += 16) {
      uint32_t left[4], right[4];
      ptx::ldmatrix(left, place(buffer, warp / 2 * 16 + lane % 16, k / 8 + lane / 16, 0));
      const int right_row = warp % 2 * 16 + lane % 8 + lane / 16 * 8;
      ptx::ldmatrix(right, place(buffer + kTileBytes, right_row, k / 8 + lane / 8 % 2, 0));
      const uint32_t low[2] = {right[0], right[1]}, high[2] = {right[2], right[3]};
      ptx::mma<half>(sum[0], left, low);
      ptx::mma<half>(sum[1], left, high);
    }
    if (bug != kNoBarrierBeforeOverwriting) __syncthreads();
  }
  const int first = bug == kAllWriteOneTile ? 0 : n0;
  for (int i = 0; i < 8; ++i) {
    const int row = m0 + warp / 2 * 16 + lane / 4 + i / 2 % 2 * 8;
    const int column = first + warp % 2 * 16 + i / 4 * 8 + 2 * (lane % 4) + i % 2;
    if (row < M + (bug == kTail) && column < N) c[row * N + column] = sum[i / 4][i % 4];
  }
}

// ---- Order, in one warp or two -------------------------------------------------------------------------------------

enum { kSyncwarp, kShuffleOnly, kHalfWarpMask, kOtherWarp, kNamedBarrier, kNamedArrive, kReadsOnly, kBytes };

__global__ void order_kernel(float* out, int what) {
  const int i = static_cast<int>(threadIdx.x), lane = i % 32;
  auto* const shared = reinterpret_cast<float*>(shared_memory());
  if (what == kReadsOnly) {  // many readers after one writer and a barrier, then a writer after another
    if (i == 0) shared[0] = 7;
    __syncthreads();
    out[i] = shared[0];
    __syncthreads();
    if (i == 63) shared[0] = 8;
    return;
  }
  if (what == kBytes) {  // neighbours in one word
    shared_memory()[i] = 1;
    out[i] = 0;
    return;
  }
  if (what == kNamedArrive) {  // the first warp hands over and goes on; the second waits
    if (i < 32) {
      shared[i] = 1;
      host::barrier(1, 64, false);
      out[i] = 0;
    } else {
      host::barrier(1, 64);
      out[i] = shared[i - 32];
    }
    return;
  }
  shared[i] = static_cast<float>(i);
  if (what == kSyncwarp || what == kOtherWarp) __syncwarp();
  if (what == kShuffleOnly) __shfl_sync(~0u, i, 0);
  if (what == kHalfWarpMask) __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
  if (what == kNamedBarrier) host::barrier(1 + i / 32, 32);
  out[i] = shared[what == kOtherWarp ? (i + 32) % 64 : i ^ 16];
}

}  // namespace
}  // namespace fastvit

using namespace fastvit;

#define CASE extern "C" __attribute__((visibility("default"))) const char*

CASE host_mma(float* d, const void* a, const void* b, int k, bool is_half) {
  return text_of([&] {
    if (is_half) {
      launch({}, k == 16 ? mma_kernel<half, 16> : mma_kernel<half, 8>, 1, 32, 0, d, static_cast<const half*>(a),
             static_cast<const half*>(b));
    } else {
      launch({}, k == 16 ? mma_kernel<bfloat16, 16> : mma_kernel<bfloat16, 8>, 1, 32, 0, d,
             static_cast<const bfloat16*>(a), static_cast<const bfloat16*>(b));
    }
  });
}

CASE host_ldmatrix(uint32_t* r, const uint16_t* matrices, int n, bool transposed, int shift) {
  return text_of([&] { launch({}, ldmatrix_kernel, 1, 32, 1024, r, matrices, n, transposed, shift); });
}

CASE host_shuffle(float* out, int how, int lanes, int width, unsigned mask) {
  return text_of([&] { launch({}, shuffle_kernel, 1, 32, 0, out, how, lanes, width, mask); });
}

CASE host_copy(float* seen, const float* data) {
  return text_of([&] { launch({}, copy_kernel, 1, 32, 32, seen, data); });
}

CASE host_barrier(int* order, int what, int threads) {
  return text_of([&] { launch({}, barrier_kernel, 1, threads, 64 * 4, order, what); });
}

CASE host_exp2(float* x, int n) {
  return text_of([&] { launch({}, exp2_kernel, 1, 32, 0, x, n); });
}

CASE host_product(float* c, const half* a, const half* b, int m, int n, int k, int bug) {
  return text_of([&] {
    host::allocation(c, sizeof(float) * m * n);
    host::allocation(a, sizeof(half) * m * k);
    host::allocation(b, sizeof(half) * n * k);
    const dim3 grid(static_cast<unsigned>(ceil_div(n, 32)), static_cast<unsigned>(ceil_div(m, 32)));
    launch({}, product_kernel, grid, 128, 8192, c, a, b, m, n, k, bug);
  });
}

CASE host_order(float* out, int what) {
  return text_of([&] { launch({}, order_kernel, 1, 64, 256, out, what); });
}
