// What every kernel file starts with: CUDA itself, or the host layer that runs the same source on a CPU; 16-bit types;
// and the launch.
//
// Kernels keep to what is here, in ptx.cuh and in hopper.cuh, and to: threadIdx, blockIdx, blockDim, gridDim,
// __syncthreads, __syncwarp, __shfl_sync, __shfl_xor_sync, __shfl_down_sync, and the float functions of <cmath>. That is
// what tests/emulator knows how to run. No atomics: results are the same bits from run to run.
#pragma once

#ifdef FASTVIT_HOST
#include "host.h"  // tests/emulator
#else
#include <cuda_runtime.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "array.h"

namespace fastvit {

using half = __half;
using bfloat16 = __nv_bfloat16;

constexpr float kLog2e = 1.4426950408889634f;

template <class T> constexpr DType dtype_of = DType::float32;
template <> constexpr DType dtype_of<half> = DType::float16;
template <> constexpr DType dtype_of<bfloat16> = DType::bfloat16;
template <> constexpr DType dtype_of<unsigned char> = DType::uint8;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(unsigned char x) { return static_cast<float>(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ half from_float<half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Two floats rounded to T, the first in the low half: what mma reads as an operand register.
template <class T> __device__ __forceinline__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <> __device__ __forceinline__ uint32_t pack<bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// N values of T that are loaded and stored as one: at most 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

inline void check_shared(const Device& device, size_t shared) {
  if (device.shared_bytes && shared > static_cast<size_t>(device.shared_bytes)) {
    throw error("launch: ", shared, " bytes of shared memory; accepted: up to ", device.shared_bytes);
  }
}

#ifdef FASTVIT_HOST

// A block's dynamic shared memory; one block runs at a time.
inline char* shared_memory() { return host::shared_memory(); }

template <class... P>
void launch(
    const Device& device, void (*kernel)(P...), dim3 grid, int threads, size_t shared, std::type_identity_t<P>... args) {
  check_shared(device, shared);
  host::run(kernel, grid, threads, shared, args...);
}

#else

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char fastvit_shared[];
  return fastvit_shared;
}

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // what is reported here is not PyTorch's to find
  throw error("CUDA: ", cudaGetErrorString(status));
}

template <class T> struct Identity { using type = T; };

// kernel<<<grid, threads, shared, device.stream>>>(args...)
template <class... P>
void launch(
    const Device& device, void (*kernel)(P...), dim3 grid, int threads, size_t shared, typename Identity<P>::type... args) {
  check_shared(device, shared);
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), pointers, shared, device.stream));
}

#endif

}  // namespace fastvit
