// Stacks to switch between: about 3 ns on x86-64, by hand; ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#define FASTVIT_UCONTEXT
#endif
#ifdef FASTVIT_UCONTEXT
#include <ucontext.h>
#endif

namespace fastvit::host {

class Fiber {
 public:
  // From the first switch to it: entry(), which must not return.
  void start(char* stack, size_t bytes, void (*entry)());

  // Leaves `from`, to go on there when somebody switches to it.
  static void switch_to(Fiber& from, Fiber& to);

 private:
#ifndef FASTVIT_UCONTEXT
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace fastvit::host
