// The functions of ptx.cuh on a CPU; ptx.cuh says what they do, ptx.cpp how.
#pragma once

#include "host.h"

namespace fastvit::ptx {

// An offset into the block's shared memory.
uint32_t shared_address(const void* pointer);

// half or bfloat16.
template <class T> void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <class T> void mma_k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t& b);

void ldmatrix(uint32_t (&r)[4], const void* row);
void ldmatrix(uint32_t (&r)[2], const void* row);
void ldmatrix_transposed(uint32_t (&r)[4], const void* row);
void ldmatrix_transposed(uint32_t (&r)[2], const void* row);

void copy_async(void* shared, const void* global, bool inside = true);
void copy_async_commit();
void copy_async_wait(int pending);
template <int pending> void copy_async_wait() { copy_async_wait(pending); }

float exp2(float x);
float reciprocal(float x);

}  // namespace fastvit::ptx
