// The race and out-of-bounds detector, as the scheduler and the wrappers of instructions see it.
//
// Happens-before by vector clocks. Every access of shared memory and of the registered global memory leaves, per byte,
// who wrote last and who read since; an access that does not happen after a conflicting one is a race, whichever came
// first in this run. Order comes from __syncthreads, __syncwarp, named barriers and mbarriers, and from nothing else;
// blocks are never ordered. Asynchronous instructions are in flight from start to land(): what they write may not be
// touched meanwhile, what they read not be written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastvit::host {

// What is known, of every thread of the block, by whoever holds this: mbarriers have one. Fresh in every block.
class Clock {
 public:
  std::vector<uint32_t> known;   // of agent i: all it did before this time
  std::vector<uint32_t> fenced;  // the part of it that a fence.proxy.async has passed on to the async proxy
  int agent = -1;                // in whose name transfers land here
};

void release(Clock& clock);  // the running thread passes on what it did and knows
void acquire(const Clock& clock);

// The running thread's own accesses, by a wrapper.
void reads(const void* data, size_t bytes, const char* what);
void writes(void* data, size_t bytes, const char* what);

// Async: TMA and wgmma, which see what threads wrote to shared memory only after a fence.proxy.async.
enum class Proxy { generic, async };
void fence_async_proxy();

// An asynchronous instruction that the running thread starts. Any thread may land it, once.
class Transfer {
 public:
  Transfer(const char* what, Proxy proxy);
  void reads(const void* data, size_t bytes);
  void writes(void* data, size_t bytes);
  void land();              // the running thread has waited for it
  void land(Clock& clock);  // whoever acquires the clock from now on has

 private:
  struct Part {
    int memory;
    uint32_t event;
  };
  const char* what_;
  Proxy proxy_;
  std::vector<Part> parts_;
};

// ---- For the scheduler ---------------------------------------------------------------------------------------------

namespace detector {

void begin_launch(const char* stacks, size_t stack_bytes);  // accesses of the stacks are the threads' own business
void begin_block(size_t shared, int threads);
void end_launch();
void watch(bool on);  // on while a kernel's own code runs

// All `members` know what all of them and `passed_on` knew.
void order(const std::vector<int>& members, const Clock& passed_on);

}  // namespace detector

}  // namespace fastvit::host
