// CUDA for a CPU: what a kernel's source needs to compile with g++ and run, one block at a time, its threads as fibers
// (fiber.h) that hand over to each other where a GPU's threads may wait (block.cpp). What a GPU leaves undefined ends
// in an error that says where: threads that miss a barrier, races, accesses out of bounds or misaligned (detector.cpp).
// Kernels see the first two parts of this file; the wrappers of instructions (host_ptx.h, host_hopper.h) are made of
// the rest.
#pragma once

#include <math.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "array.h"
#include "detector.h"

// ---- The language --------------------------------------------------------------------------------------------------

#define __launch_bounds__(...)  // vector_types.h brings the other words, as nothing

// Constant to a kernel; block.cpp, which sets them, says otherwise.
#ifndef FASTVIT_SCHEDULER
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
#endif

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }

#if !defined(__GLIBC__) || __GLIBC__ == 2 && __GLIBC_MINOR__ < 42
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
#endif

namespace fastvit::host {
enum class Shuffle { from, with, down };
uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle how, int lane, int width);

template <class T>
T shuffled(uint32_t mask, T value, Shuffle how, int lane, int width) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, how, lane, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace fastvit::host

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return fastvit::host::shuffled(mask, value, fastvit::host::Shuffle::from, lane, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return fastvit::host::shuffled(mask, value, fastvit::host::Shuffle::with, lanes, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  return fastvit::host::shuffled(mask, value, fastvit::host::Shuffle::down, static_cast<int>(lanes), width);
}

namespace fastvit::host {

// ---- Launching -----------------------------------------------------------------------------------------------------

// The dynamic shared memory of the block: 0xff everywhere (NaN in every floating type) when the block begins.
char* shared_memory();
constexpr size_t kSharedBytes = 227 * 1024;

// Runs every block; an error of the kernel is thrown from here as a std::runtime_error.
void run_blocks(const void* kernel, dim3 grid, int threads, size_t shared, void (*call)(void*), void* argument);

template <class... P>
void run(void (*kernel)(P...), dim3 grid, int threads, size_t shared, std::type_identity_t<P>... arguments) {
  auto call = [&] { kernel(arguments...); };
  const auto body = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
  run_blocks(reinterpret_cast<const void*>(kernel), grid, threads, shared, body, &call);
}

// The global memory that the next launches may touch: what is added until it is forgotten. With none added, accesses of
// global memory are not checked.
void allocation(const void* data, size_t bytes);
void forget_allocations();

// ---- For the wrappers of instructions: threads that wait and meet --------------------------------------------------

constexpr int kMaxThreads = 1024;

int thread();   // the running thread's index in its block
int threads();  // of the block

// Runs when every block begins: state that a file keeps by thread or by barrier starts afresh. At namespace scope:
// const bool registered = host::each_block([] { ... });
bool each_block(void (*begin)());

// Ends the launch: run() throws with this text, the kernel, the block, the thread and the line. Does not return.
[[noreturn]] void fail(const std::string& what);

// Where the wrapper was called from, for messages: first thing in a wrapper that is no template and not inlined:
// host::called_from(__builtin_return_address(0)).
void called_from(const void* address);

// Lets other threads run until ready(); `what` names it for the message when none of them can. No thread holds on to
// data of a predicate after it returned true.
void wait(const char* what, bool (*ready)(void*), void* argument);

template <class F>
void wait_until(const char* what, F ready) {
  if (!ready()) wait(what, [](void* f) -> bool { return (*static_cast<F*>(f))(); }, &ready);
}

// A place where a fixed number of threads come together: the last to come runs together(arguments), where arguments[i]
// is what the thread of place i brought (nullptr where no thread of that place came), and then all go on. Reusable.
struct Meeting {
  using Together = void (*)(void* const* arguments);

  // orders: memory accesses before it, by all who came, happen before those after it.
  void come(const char* what, int count, int place, void* mine, Together together, bool orders, bool stay = true);

  const char* what = nullptr;
  int arrived = 0, expected = 0;
  uint64_t generation = 0;
  std::vector<void*> arguments;
  std::vector<int> members;
  Clock passed_on;  // by those who did not stay
};

// The lanes of `mask` of the running thread's warp; place = lane, arguments has 32 entries. As the PTX ISA has it,
// shuffles, ldmatrix and mma wait for each other but order no memory; only bar.warp.sync (__syncwarp) does.
void meet_warp(const char* what, uint32_t mask, void* mine, Meeting::Together together, bool orders = false);

// The 128 threads of the running thread's warpgroup; place = thread % 128. No memory is ordered.
void meet_warpgroup(const char* what, void* mine, Meeting::Together together);

// bar.sync / bar.arrive: barrier `id` (0 is __syncthreads) of `count` threads; these are ordered.
void barrier(int id, int count, bool stay = true);

}  // namespace fastvit::host
