// Small kernels for tests/emulated/test_hopper.py, called through ctypes: what every wrapper of hopper.cuh does, right
// and, with `bug`, wrong in one way. Each returns the error's text, or an empty one.
#include <functional>
#include <string>

#include "hopper.cuh"

namespace fastvit {
namespace {

using namespace ptx;

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

// A box of a tensor through shared memory: its 16-bit words as they lie there and, plus 1, stored where they came from.
enum { kNoLoadWait = 1, kNoStoreWait, kNoInitFence, kTooManyBytes, kExtraArrival, kMisaligned, kNoStoreFence };

__global__ void tma_kernel(
    const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, unsigned short* words, int bytes,
    int rank, int c0, int c1, int c2, int c3, int c4, int bug) {
  char* const tile = shared_memory() + (bug == kMisaligned ? 16 : 0);
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared_memory() + 32768);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    if (bug != kNoInitFence) mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(full, bytes + (bug == kTooManyBytes ? 16 : 0));
    if (rank == 2) tma_load(tile, &from, full, c0, c1);
    if (rank == 3) tma_load(tile, &from, full, c0, c1, c2);
    if (rank == 4) tma_load(tile, &from, full, c0, c1, c2, c3);
    if (rank == 5) tma_load(tile, &from, full, c0, c1, c2, c3, c4);
    if (bug == kExtraArrival) mbarrier_arrive(full);
  }
  if (bug != kNoLoadWait) mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) {
    unsigned short* const word = reinterpret_cast<unsigned short*>(tile) + i;
    words[i] = *word;
    *word = static_cast<unsigned short>(*word + 1);
  }
  if (bug != kNoStoreFence) fence_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (rank == 2) tma_store(&to, tile, c0, c1);
    if (rank == 3) tma_store(&to, tile, c0, c1, c2);
    if (rank == 4) tma_store(&to, tile, c0, c1, c2, c3);
    if (rank == 5) tma_store(&to, tile, c0, c1, c2, c3, c4);
    bulk_commit();
    if (bug != kNoStoreWait) bulk_wait_read<0>();
  }
}

// d (64, N) = a b^T over K = 64, both operands by TMA. Where an operand is Major::k it is (rows, 64), else (64, rows).
constexpr int kK = 64;
enum { kNoWait = 1, kNoFence, kNoTileWait, kOneWarpLess, kOverwrite };

struct Tile {
  int bytes, boxes;      // of a box, which is `step` further on in k or in rows
  Major major;
  SwizzleMode mode;

  __device__ Tile(int rows, Major major, SwizzleMode mode)
      : bytes((major == Major::k ? rows : kK) * row_bytes(mode)),
        boxes(((major == Major::k ? kK : rows) + step(mode) - 1) / step(mode)),
        major(major),
        mode(mode) {}

  static __device__ int step(SwizzleMode mode) { return row_bytes(mode) / 2; }

  __device__ void load(char* tile, const TensorMap* map, uint64_t* full) const {
    for (int i = 0; i < boxes; ++i) tma_load(tile + i * bytes, map, full, i * step(mode), 0);
  }

  // Of 16 values of k.
  __device__ uint64_t descriptor(const char* tile, int k) const {
    const int row = row_bytes(mode);
    if (major == Major::k) {
      return matrix_descriptor(tile + k / step(mode) * bytes + k % step(mode) * 2, mode, 8 * row, bytes);
    }
    if (mode == SwizzleMode::none) return matrix_descriptor(tile + k * row, mode, bytes, 8 * row);
    return matrix_descriptor(tile + k * row, mode, 8 * row, bytes);
  }
};

template <class T, int N, Major A, Major B>
__global__ void wgmma_kernel(
    const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, float* out, SwizzleMode mode,
    int bug) {
  const Tile a(64, A, mode), b(N, B, mode);
  char* const a_tile = shared_memory();
  char* const b_tile = a_tile + 16384;
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared_memory() + 65536);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(full, a.boxes * a.bytes + b.boxes * b.bytes);
    a.load(a_tile, &a_map, full);
    b.load(b_tile, &b_map, full);
  }
  if (bug != kNoTileWait) mbarrier_wait(full, 0);
  if (bug == kOneWarpLess && threadIdx.x >= 96) return;
  float d[N / 2];
  if (bug != kNoFence) wgmma_fence();
  for (int k = 0; k < kK; k += 16) {
    wgmma<T, N, A, B>(d, a.descriptor(a_tile, k), b.descriptor(b_tile, k), k > 0);
    wgmma_commit();
    if (bug == kOverwrite) d[0] = 0;
  }
  if (bug != kNoWait) wgmma_wait<0>(d);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  for (int i = 0; i < N / 2; ++i) out[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// d (64, 64) = 2 * a b with a (64, 32) from registers and b (32, 64) written to a swizzled tile by threads.
enum { kNoProxyFence = 1, kNoBarrier };

template <class T>
__global__ void registers_kernel(const T* a, const T* b, float* out, int bug) {
  char* const tile = shared_memory();
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  for (int i = threadIdx.x; i < 32 * 64; i += 128) {
    const int k = i / 64, column = i % 64;
    *reinterpret_cast<T*>(tile + k * 128 + ((column / 8 ^ k % 8) * 16) + column % 8 * 2) = b[i];
  }
  if (bug != kNoProxyFence) fence_async_proxy();
  if (bug != kNoBarrier) named_barrier(3, 128);
  float d[32];
  for (int round = 0; round < 2; ++round) {
    for (int k = 0; k < 32; k += 16) {
      uint32_t fragment[4];
      for (int i = 0; i < 4; ++i) {
        const T* const at = a + (row + i % 2 * 8) * 32 + k + lane % 4 * 2 + i / 2 * 8;
        fragment[i] = pack<T>(to_float(at[0]), to_float(at[1]));
      }
      wgmma_fence(fragment, d);
      const uint64_t b_tile = matrix_descriptor(tile + k * 128, SwizzleMode::b128, 1024);
      wgmma<T, 64, Major::mn>(d, fragment, b_tile, round > 0 || k > 0);
      wgmma_commit();
      wgmma_wait<0>(d);
    }
  }
  for (int i = 0; i < 32; ++i) out[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// `rounds` tiles of 128 bytes through a ring of two: a producer warp, and a warpgroup that writes them doubled.
enum { kNoEmptyWait = 1, kNoArrival, kWrongParity };

__global__ void ring_kernel(const __grid_constant__ TensorMap map, float* out, int rounds, int bug) {
  char* const tiles = shared_memory();
  uint64_t* const full = reinterpret_cast<uint64_t*>(tiles + 2048);
  uint64_t* const empty = full + 2;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(full + i, 1), mbarrier_init(empty + i, 4);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    registers_lower<40>();
    if (threadIdx.x >= 160 || !elect_one()) return;
    for (int i = 0; i < rounds; ++i) {
      if (bug != kNoEmptyWait) mbarrier_wait(empty + i % 2, i / 2 % 2 ^ (bug == kWrongParity ? 0 : 1));
      mbarrier_arrive_expect_tx(full + i % 2, 128);
      tma_load(tiles + i % 2 * 1024, &map, full + i % 2, 0, i);
    }
    return;
  }
  registers_raise<232>();
  for (int i = 0; i < rounds; ++i) {
    mbarrier_wait(full + i % 2, i / 2 % 2);
    if (threadIdx.x < 32) out[i * 32 + threadIdx.x] = 2 * reinterpret_cast<float*>(tiles + i % 2 * 1024)[threadIdx.x];
    __syncwarp();
    if (threadIdx.x % 32 == 0 && bug != kNoArrival) mbarrier_arrive(empty + i % 2);
  }
}

template <class T, int N, Major A, Major B>
void run_wgmma(const void* a, const void* b, float* d, SwizzleMode mode, int bug) {
  const auto map = [&](const void* x, int rows, Major major) {
    const int64_t inner = major == Major::k ? kK : rows, outer = major == Major::k ? rows : kK;
    const int64_t size[] = {inner, outer}, stride[] = {1, inner};
    const int box[] = {row_bytes(mode) / 2, static_cast<int>(outer)};
    return make_tensor_map<2>(dtype_of<T>, x, size, stride, box, mode);
  };
  host::allocation(a, 2 * 64 * kK);
  host::allocation(b, 2 * N * kK);
  host::allocation(d, 4 * 64 * N);
  host::run(wgmma_kernel<T, N, A, B>, dim3(1), 128, 65536 + 8, map(a, 64, A), map(b, N, B), d, mode, bug);
}

}  // namespace

#define FASTVIT_CASE extern "C" __attribute__((visibility("default"))) const char*

FASTVIT_CASE hopper_tma(
    int rank, int mode, const void* data, void* stored, int64_t elements, const int64_t* size, const int64_t* stride,
    const int* box, const int* at, unsigned short* words, int bug) {
  return text_of([=] {
    int bytes = 2;
    for (int i = 0; i < rank; ++i) bytes *= box[i];
    const auto map = [&](const void* x) {
      return make_tensor_map(DType::bfloat16, x, rank, size, stride, box, static_cast<SwizzleMode>(mode));
    };
    host::allocation(data, 2 * elements);
    host::allocation(stored, 2 * elements);
    host::allocation(words, bytes);
    host::run(tma_kernel, dim3(1), 64, 32768 + 8, map(data), map(stored), words, bytes, rank, at[0], at[1],
              rank > 2 ? at[2] : 0, rank > 3 ? at[3] : 0, rank > 4 ? at[4] : 0, bug);
  });
}

// d (64, n) for n = 136, float16 or bfloat16, all majors; n = 8 and 256 for bfloat16 and K-major operands.
FASTVIT_CASE hopper_wgmma(
    int is_half, int n, int a_major, int b_major, int mode, const void* a, const void* b, float* d, int bug) {
  return text_of([=] {
    const auto chosen = static_cast<SwizzleMode>(mode);
    const auto run = [&]<class T>(T) {
      if (a_major == 0 && b_major == 0) return run_wgmma<T, 136, Major::k, Major::k>(a, b, d, chosen, bug);
      if (a_major == 0 && b_major == 1) return run_wgmma<T, 136, Major::k, Major::mn>(a, b, d, chosen, bug);
      if (a_major == 1 && b_major == 0) return run_wgmma<T, 136, Major::mn, Major::k>(a, b, d, chosen, bug);
      return run_wgmma<T, 136, Major::mn, Major::mn>(a, b, d, chosen, bug);
    };
    if (n == 8) return run_wgmma<bfloat16, 8, Major::k, Major::k>(a, b, d, chosen, bug);
    if (n == 256) return run_wgmma<bfloat16, 256, Major::k, Major::k>(a, b, d, chosen, bug);
    return is_half ? run(half()) : run(bfloat16());
  });
}

FASTVIT_CASE hopper_registers(const void* a, const void* b, float* d, int bug) {
  return text_of([=] {
    host::allocation(a, 2 * 64 * 32);
    host::allocation(b, 2 * 32 * 64);
    host::allocation(d, 4 * 64 * 64);
    host::run(
        registers_kernel<half>, dim3(1), 128, 4096, static_cast<const half*>(a), static_cast<const half*>(b), d, bug);
  });
}

FASTVIT_CASE hopper_ring(const float* in, float* out, int rounds, int bug) {
  return text_of([=] {
    host::allocation(in, rounds * 128);
    host::allocation(out, rounds * 128);
    const TensorMap map =
        make_tensor_map<2>(DType::float32, in, {32, rounds}, {1, 32}, {32, 1}, SwizzleMode::b128);
    host::run(ring_kernel, dim3(1), 256, 2048 + 32, map, out, rounds, bug);
  });
}

FASTVIT_CASE hopper_map(int64_t stride, int box, int mode) {
  return text_of([=] {
    alignas(16) static char data[16];
    make_tensor_map<2>(DType::float16, data, {64, 64}, {1, stride}, {64, box}, static_cast<SwizzleMode>(mode));
  });
}

// The descriptor's bits for a tile `offset` bytes into shared memory.
extern "C" __attribute__((visibility("default"))) uint64_t hopper_descriptor(
    int64_t offset, int mode, uint32_t stride, uint32_t leading) {
  return matrix_descriptor(host::shared_memory() + offset, static_cast<SwizzleMode>(mode), stride, leading);
}

}  // namespace fastvit
