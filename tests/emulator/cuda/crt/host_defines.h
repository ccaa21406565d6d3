// What CUDA's headers include under this name, for g++ alone: the words of the language, as nothing. (The real one comes
// with the compiler, which a machine that only runs the emulation need not have.)
#pragma once

#define __global__
#define __device__
#define __host__
#define __shared__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __specialization_static
#define __inline_hint__
#define CUDARTAPI
