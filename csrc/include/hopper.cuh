// PTX of compute capability 9.0a: mbarriers, the Tensor Memory Accelerator (TMA), warpgroup matrix products (wgmma) and
// what keeps them in order. Each wrapper is one instruction, named with its chapter of the PTX ISA (9.0);
// tests/emulator/host_hopper.h holds the same functions for a CPU. Only files named *_sm90.cu include this.
//
// Who sees what, when (chapters "Async proxy" and "Asynchronous warpgroup level matrix instructions"):
//   TMA writes a tile       -> visible to threads (and to their wgmma) that saw the phase of its mbarrier complete
//   threads write a tile    -> fence_async_proxy() by each writer, a barrier, then the TMA store or wgmma is started
//   TMA store reads a tile  -> may be overwritten after bulk_wait_read<0>() by the thread that stored it, and a barrier
//   wgmma reads tiles       -> may be overwritten after wgmma_wait, and an arrival on the mbarrier that says so
//   wgmma writes registers  -> wgmma_fence() before the first, not read or written until wgmma_wait
#pragma once

#include <utility>

#include "ptx.cuh"

namespace fastvit::ptx {

// How 16-byte chunks of a tile in shared memory are permuted: chunk index (address bits 4 and up) XOR bits 7 and up, as
// many bits as the mode has chunks in a row: b128: bits 4-6 ^= 7-9, b64: bits 4-5 ^= 7-8, b32: bit 4 ^= bit 7. The mode
// is of addresses, not of tiles: a tile begins on 1024, 512 or 256 bytes (128 without), so that its rows agree with it.
// The inner length of a TMA box is the mode's row: 128, 64 or 32 bytes (none: any multiple of 16 bytes).
enum class SwizzleMode { none, b32, b64, b128 };

constexpr int row_bytes(SwizzleMode mode) { return 16 << static_cast<int>(mode); }

// Which dimension of an operand is contiguous in shared memory: the contraction (k), or its rows (mn): m of A, n of B.
enum class Major { k, mn };

}  // namespace fastvit::ptx

#ifdef FASTVIT_HOST
#include "host_hopper.h"
#else

#include <cuda.h>  // types of the driver; nothing of it is linked

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "hopper.cuh is for sm_90a only"
#endif

namespace fastvit::ptx {

// ---- Tensor maps (host) --------------------------------------------------------------------------------------------

// What TMA knows of a tensor; a kernel takes it as `const __grid_constant__ TensorMap`.
using TensorMap = CUtensorMap;

// A tensor of 1 to 5 dimensions, innermost first, and the box of it that one instruction moves. Elements outside the
// tensor are read as 0 and never written. stride[0] is 1; the others are positive multiples of 16 bytes, and data is
// 16-byte aligned. (Dimensions of size 1 may have any stride.) box entries are at most 256.
template <int RANK>
inline TensorMap make_tensor_map(
    DType dtype, const void* data, const int64_t (&size)[RANK], const int64_t (&stride)[RANK], const int (&box)[RANK],
    SwizzleMode swizzle) {
  static_assert(RANK >= 1 && RANK <= 5);
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) throw error("the CUDA driver has no cuTensorMapEncodeTiled (needs 12.0)");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  constexpr CUtensorMapDataType types[] = {
      CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      CU_TENSOR_MAP_DATA_TYPE_UINT8};  // in the order of DType
  constexpr CUtensorMapSwizzle swizzles[] = {
      CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  cuuint64_t sizes[RANK], strides[RANK];
  cuuint32_t boxes[RANK], steps[RANK];
  for (int i = 0; i < RANK; ++i) {
    sizes[i] = static_cast<cuuint64_t>(size[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
    if (i > 0) strides[i - 1] = size[i] == 1 ? 16 : static_cast<cuuint64_t>(stride[i] * bytes(dtype));
  }
  TensorMap map;
  const CUresult status = encode(
      &map, types[static_cast<int>(dtype)], RANK, const_cast<void*>(data), sizes, strides, boxes, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<int>(swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw error("cuTensorMapEncodeTiled refused a tensor: CUDA driver error ", int(status));
  return map;
}

// ---- mbarriers ("mbarrier") ----------------------------------------------------------------------------------------
//
// A phase completes when `count` arrivals have come and all bytes that were expected have landed; the next begins at
// once. wait(parity) returns when the phase of that parity is complete: 0 for the first one, 1 for the second, 0 ...
// A fresh barrier counts as one whose phase before the first, of parity 1, is complete.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(count) : "memory");
}

// By the thread that initialised them, before the __syncthreads() after which others, and TMA, use them.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}

// One arrival, and `bytes` more to land in this phase: before the loads that bring them.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;"
               :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n"
      :: "r"(shared_address(barrier)), "r"(parity) : "memory");
}

// ---- TMA ("cp.async.bulk.tensor") ----------------------------------------------------------------------------------
//
// Moves the box at `coordinates` (elements, innermost first, may be outside on any side) between a tensor and a tile in
// shared memory, dense in box order and swizzled by the map's mode. By one thread.

// Brings the descriptor into its cache ("prefetch.tensormap").
__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" :: "l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// Reports its bytes, a whole box whatever lies outside, to the mbarrier.
__device__ __forceinline__ void tma_load(void* tile, const TensorMap* map, uint64_t* barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
      :: "r"(shared_address(tile)), "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)),
         "r"(c0), "r"(c1) : "memory");
}

__device__ __forceinline__ void tma_load(void* tile, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
      :: "r"(shared_address(tile)), "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)),
         "r"(c0), "r"(c1), "r"(c2) : "memory");
}

__device__ __forceinline__ void tma_load(
    void* tile, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];"
      :: "r"(shared_address(tile)), "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)),
         "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

__device__ __forceinline__ void tma_load(
    void* tile, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
      :: "r"(shared_address(tile)), "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)),
         "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

// Part of the thread's current bulk group.
__device__ __forceinline__ void tma_store(const TensorMap* map, const void* tile, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
               :: "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(tile)), "r"(c0), "r"(c1) : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap* map, const void* tile, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];"
               :: "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(tile)),
                  "r"(c0), "r"(c1), "r"(c2) : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap* map, const void* tile, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               :: "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(tile)),
                  "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

__device__ __forceinline__ void tma_store(
    const TensorMap* map, const void* tile, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
               :: "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(tile)),
                  "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

// Ends the thread's bulk group ("cp.async.bulk.commit_group").
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most `pending` of this thread's groups have still to read shared memory.
template <int pending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(pending) : "memory");
}

// Until at most `pending` of this thread's groups have still to write global memory. (The end of the kernel does too.)
template <int pending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" :: "n"(pending) : "memory");
}

// This thread's writes of shared memory before it come before what TMA and wgmma do after it ("membar/fence").
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Roles ---------------------------------------------------------------------------------------------------------

// __syncthreads() for `threads` threads, whole warps, that name the same id (0 to 15; 0 is __syncthreads' own) ("bar").
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// Is counted by that barrier without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// Registers per thread from here on, 24 to 256 in steps of 8, by all warps of a warpgroup ("setmaxnreg").
template <int registers>
__device__ __forceinline__ void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(registers));
}

template <int registers>
__device__ __forceinline__ void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(registers));
}

// True in one thread of a converged warp ("elect.sync").
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred leader;\n"
      "elect.sync _|leader, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, leader;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// ---- wgmma ("Asynchronous warpgroup level matrix instructions") ----------------------------------------------------

// Ends the warpgroup's group of wgmma.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// No instruction: keeps the compiler from moving accesses of these registers over it.
template <class R, int COUNT>
__device__ __forceinline__ void keep(R (&registers)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if constexpr (std::is_array_v<R>) {
      keep(registers[i]);
    } else if constexpr (std::is_same_v<R, float>) {
      asm volatile("" : "+f"(registers[i]) :: "memory");
    } else {
      asm volatile("" : "+r"(registers[i]) :: "memory");
    }
  }
}

// Orders the warpgroup's accesses of registers before its wgmma ("wgmma.fence"). Before every run of wgmma, but for one
// that only adds to the accumulators of the run before. Name the accumulators and operands A that were written since
// the last wait, or the compiler may write them after it.
template <class... R>
__device__ __forceinline__ void wgmma_fence(R&... registers) {
  (keep(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Until at most `pending` of the warpgroup's committed groups are under way; name the accumulators that are awaited, or
// the compiler may read them too early.
template <int pending, class... R>
__device__ __forceinline__ void wgmma_wait(R&... accumulators) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(pending) : "memory");
  (keep(accumulators), ...);
}

}  // namespace fastvit::ptx

#include "wgmma_operands.h"

namespace fastvit::ptx {

template <int N> struct Wgmma;  // one specialisation for every N, 8 to 256 in steps of 8

// d (64, N) += a (64, 16) b (16, N), or d = where not `accumulate`, by the 128 threads of a warpgroup. Thread t holds
// of d, with row = 16 (t / 32) + t % 32 / 4 and column = 2 (t % 4):
//   d[4 i + 0, 1] = D[row][8 i + column, + 1], d[4 i + 2, 3] = D[row + 8][8 i + column, + 1]
// and of an A in registers, for T pairs, what mma of ptx.cuh holds of the 16 rows of its warp: the accumulators of a
// product, rounded and packed in order, are the A operand of the next:
//   a[0..3] = pack(d[8 j + 0, 1], d[8 j + 2, 3], d[8 j + 4, 5], d[8 j + 6, 7])
#define FASTVIT_WGMMA(N, TYPE, D, I0, I1, I2, I3, I4, I5, I6, ...)                                                  \
  asm volatile(                                                                                                    \
      "{\n"                                                                                                        \
      ".reg .pred accumulate;\n"                                                                                   \
      "setp.ne.b32 accumulate, " I2 ", 0;\n"                                                                       \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" D "}, " I0 ", " I1                       \
      ", accumulate, 1, 1, " I3 ", " I4 ";\n"                                                                      \
      "}\n"                                                                                                        \
      : __VA_ARGS__                                                                                                \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(int(A)), "n"(int(B)))

#define FASTVIT_WGMMA_REGISTERS(N, TYPE, D, I0, I1, I2, I3, I4, I5, I6, ...)                                        \
  asm volatile(                                                                                                    \
      "{\n"                                                                                                        \
      ".reg .pred accumulate;\n"                                                                                   \
      "setp.ne.b32 accumulate, " I5 ", 0;\n"                                                                       \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" D "}, "                            \
      "{" I0 ", " I1 ", " I2 ", " I3 "}, " I4                                                                      \
      ", accumulate, 1, 1, " I6 ";\n"                                                                              \
      "}\n"                                                                                                        \
      : __VA_ARGS__                                                                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(int(B)))

#define FASTVIT_WGMMA_DEFINE(N, ...)                                                                                \
  template <> struct Wgmma<N> {                                                                                     \
    template <class T, Major A, Major B>                                                                            \
    __device__ __forceinline__ static void shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {     \
      if constexpr (std::is_same_v<T, half>) {                                                                      \
        FASTVIT_WGMMA(N, "f16", __VA_ARGS__);                                                                       \
      } else {                                                                                                      \
        FASTVIT_WGMMA(N, "bf16", __VA_ARGS__);                                                                      \
      }                                                                                                             \
    }                                                                                                               \
    template <class T, Major B>                                                                                     \
    __device__ __forceinline__ static void registers(                                                               \
        float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {                                   \
      if constexpr (std::is_same_v<T, half>) {                                                                      \
        FASTVIT_WGMMA_REGISTERS(N, "f16", __VA_ARGS__);                                                             \
      } else {                                                                                                      \
        FASTVIT_WGMMA_REGISTERS(N, "bf16", __VA_ARGS__);                                                            \
      }                                                                                                             \
    }                                                                                                               \
  };

FASTVIT_WGMMA_EACH(FASTVIT_WGMMA_DEFINE)

// A and B by descriptors: matrix_descriptor below.
template <class T, int N, Major A = Major::k, Major B = Major::k>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
  static_assert(std::is_same_v<T, half> || std::is_same_v<T, bfloat16>);
  Wgmma<N>::template shared<T, A, B>(d, a, b, accumulate);
}

// A from registers.
template <class T, int N, Major B = Major::k>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
  static_assert(std::is_same_v<T, half> || std::is_same_v<T, bfloat16>);
  Wgmma<N>::template registers<T, B>(d, a, b, accumulate);
}

}  // namespace fastvit::ptx

#endif

namespace fastvit::ptx {

// Where wgmma finds an operand of 16-bit values: "Matrix descriptor", bits 0-13 the tile's address / 16, 16-29 the
// leading and 32-45 the stride byte offset / 16, 62-63 the swizzle mode (1: 128 bytes, 2: 64, 3: 32).
//
// With w the bytes of the mode's row (128, 64, 32, or 16 without swizzle), rows being m of A or n of B:
//   Major::k   tile[row][k], one TMA box of w / 2 values of k: w bytes from row to row, 8 rows are a group.
//              stride: from one group of 8 rows to the next, 8 w where dense. leading: only without swizzle, from 8
//              values of k to the next 8. A step of 16 in k is 32 bytes added to the tile's address, within w.
//   Major::mn  tile[k][row], one TMA box of w / 2 rows: w bytes from k to k + 1, 8 values of k are a group.
//              stride: from one group of 8 values of k to the next, 8 w where dense. leading: from w / 2 rows to the
//              next w / 2 rows (the next box). Without swizzle the two change places. A step of 16 in k is 16 w bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(
    const void* tile, SwizzleMode mode, uint32_t stride_bytes, uint32_t leading_bytes = 16) {
  const uint64_t swizzle = mode == SwizzleMode::none ? 0 : 4 - static_cast<int>(mode);
  return swizzle << 62 | static_cast<uint64_t>(stride_bytes >> 4 & 0x3fff) << 32 |
         static_cast<uint64_t>(leading_bytes >> 4 & 0x3fff) << 16 | (shared_address(tile) >> 4 & 0x3fff);
}

// The descriptor of the tile `bytes` further on (a multiple of 16).
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

}  // namespace fastvit::ptx
