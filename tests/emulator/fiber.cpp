#include "fiber.h"

#ifndef FASTVIT_UCONTEXT

// System V: a call keeps rbx, rbp, r12 to r15 and the stack; all else is the caller's to save.
asm(R"(
.text
.local fastvit_switch
.type fastvit_switch, @function
fastvit_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastvit_switch, . - fastvit_switch
)");

extern "C" void fastvit_switch(void** from, void* to);

namespace fastvit::host {

void Fiber::start(char* stack, size_t bytes, void (*entry)()) {
  // What fastvit_switch pops: six registers and where to go; above them a return address that is never used. The ABI
  // wants the stack pointer 8 past a multiple of 16 when a function begins.
  auto* top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::switch_to(Fiber& from, Fiber& to) { fastvit_switch(&from.stack_pointer_, to.stack_pointer_); }

}  // namespace fastvit::host

#else

namespace fastvit::host {

void Fiber::start(char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack = {.ss_sp = stack, .ss_flags = 0, .ss_size = bytes};
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::switch_to(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }

}  // namespace fastvit::host

#endif
