// The functions of hopper.cuh on a CPU; hopper.cuh says what they do, hopper.cpp how.
#pragma once

#include "host.h"

namespace fastvit::ptx {

struct TensorMap {
  char* data;
  int rank;
  int element;  // bytes
  int64_t size[5];
  int64_t stride[5];  // bytes
  int box[5];
  SwizzleMode swizzle;
};

TensorMap make_tensor_map(
    DType dtype, const void* data, int rank, const int64_t* size, const int64_t* stride, const int* box,
    SwizzleMode swizzle);

template <int RANK>
TensorMap make_tensor_map(
    DType dtype, const void* data, const int64_t (&size)[RANK], const int64_t (&stride)[RANK], const int (&box)[RANK],
    SwizzleMode swizzle) {
  return make_tensor_map(dtype, data, RANK, size, stride, box, swizzle);
}

void mbarrier_init(uint64_t* barrier, uint32_t count);
void mbarrier_init_fence();
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);

inline void tma_prefetch(const TensorMap*) {}

void tma_load(void* tile, const TensorMap* map, uint64_t* barrier, int c0, int c1);
void tma_load(void* tile, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2);
void tma_load(void* tile, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3);
void tma_load(void* tile, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4);

void tma_store(const TensorMap* map, const void* tile, int c0, int c1);
void tma_store(const TensorMap* map, const void* tile, int c0, int c1, int c2);
void tma_store(const TensorMap* map, const void* tile, int c0, int c1, int c2, int c3);
void tma_store(const TensorMap* map, const void* tile, int c0, int c1, int c2, int c3, int c4);

void bulk_commit();
void bulk_wait(int pending, bool read);
template <int pending> void bulk_wait_read() { bulk_wait(pending, true); }
template <int pending> void bulk_wait() { bulk_wait(pending, false); }

void fence_async_proxy();

inline void named_barrier(int id, int threads) { host::barrier(id, threads); }
inline void named_barrier_arrive(int id, int threads) { host::barrier(id, threads, false); }

void set_registers(int registers);
template <int registers> void registers_raise() { set_registers(registers); }
template <int registers> void registers_lower() { set_registers(registers); }

bool elect_one();

template <class R, int COUNT> void keep(R (&)[COUNT]) {}

void wgmma_fence_registers();
void wgmma_commit();
void wgmma_wait(int pending);
template <class... R> void wgmma_fence(R&...) { wgmma_fence_registers(); }
template <int pending, class... R> void wgmma_wait(R&...) { wgmma_wait(pending); }

// One thread's part of a wgmma.
struct WgmmaCall {
  DType dtype;
  int n;
  Major a_major, b_major;
  uint64_t a, b;                // descriptors
  const uint32_t* a_registers;  // in place of a, or null
  float* d;
  bool accumulate;
};

void wgmma(const WgmmaCall& call);

template <class T, int N, Major A = Major::k, Major B = Major::k>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  wgmma({dtype_of<T>, N, A, B, a, b, nullptr, d, accumulate});
}

template <class T, int N, Major B = Major::k>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  wgmma({dtype_of<T>, N, Major::k, B, 0, b, a, d, accumulate});
}

}  // namespace fastvit::ptx
