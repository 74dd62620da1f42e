// What becomes of a signal that a kernel raises, or of its time running out: a fault in the control page, and the end.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <initializer_list>

#include "worker.h"

namespace rt {
namespace {

// `caller`: where the return address is while a function has no frame of its own yet, the link register or (top of) the
// stack. Checked kernels spend much of their time in callbacks that short.
void machine_state(void* context, uintptr_t* pc, uintptr_t* frame, uintptr_t* caller) {
  auto* state = static_cast<ucontext_t*>(context);
#if defined(__APPLE__) && defined(__aarch64__)
  *pc = uintptr_t(state->uc_mcontext->__ss.__pc), *frame = uintptr_t(state->uc_mcontext->__ss.__fp);
  *caller = uintptr_t(state->uc_mcontext->__ss.__lr);
#elif defined(__APPLE__)
  *pc = state->uc_mcontext->__ss.__rip, *frame = state->uc_mcontext->__ss.__rbp;
  *caller = state->uc_mcontext->__ss.__rsp;
#elif defined(__aarch64__)
  *pc = state->uc_mcontext.pc, *frame = state->uc_mcontext.regs[29];
  *caller = state->uc_mcontext.regs[30];
#else
  *pc = uintptr_t(state->uc_mcontext.gregs[16]), *frame = uintptr_t(state->uc_mcontext.gregs[10]);  // REG_RIP, REG_RBP
  *caller = uintptr_t(state->uc_mcontext.gregs[15]);                                              // REG_RSP
#endif
}

void locate(uintptr_t address, Fault& what) {
  what.offset = int64_t(address);
  if (scheduler && scheduler->find_region(address, &what.buffer, &what.offset, &what.bound)) {
    what.space = space_threadgroup;
    return;
  }
  uintptr_t base = reinterpret_cast<uintptr_t>(shared);
  if (address + (1u << 20) < base || address > base + shared_bytes + (16u << 20)) return;
  for (int i = 0; i < int(kMaxBuffers); i++) {
    const Binding& buffer = control().buffers[i];
    if (!buffer.present || (what.buffer >= 0 && address < base + buffer.offset)) continue;
    what.buffer = i;
    what.space = space_device;
    what.offset = int64_t(address) - int64_t(base + buffer.offset);
    what.bound = int64_t(buffer.size);
  }
}

void on_signal(int number, siginfo_t* info, void* context) {
  uintptr_t pc, frame, caller, address = reinterpret_cast<uintptr_t>(info->si_addr);
  machine_state(context, &pc, &frame, &caller);
  Fault what = fault(number == SIGALRM ? kind_timeout : kind_crash);
  what.op = number;
  what.pcs[0] = pc + 1;                                       // others are return addresses: behind the call
  const Fiber* fiber = scheduler ? scheduler->running_fiber() : nullptr;
  unsigned count = 1;
  if (fiber && frame >= fiber->low() && frame < fiber->high())
    count += backtrace(reinterpret_cast<void*>(frame), what.pcs + 1, kFrames - 3);
#if defined(__x86_64__)
  if (fiber && caller >= fiber->low() && caller + 16 < fiber->high()) memcpy(&what.pcs[count], reinterpret_cast<void*>(caller), 16);
#else
  what.pcs[count] = caller;
#endif                                                        // last, and dropped if they lie outside the kernel's module
  if (number == SIGSEGV || number == SIGBUS) {
    if (fiber && address < fiber->low() && address + kGuardBytes >= fiber->low())
      snprintf(what.message, sizeof what.message, "the thread's stack of %zu KiB overflowed", kStackBytes / 1024);
    else
      locate(address, what);
  }
  keep_checker_counts();
  if (!record_unlocked(what)) control().faults[kMostFaults - 1] = what;
  _exit(70);
}

}  // namespace

void signal_stack() {
  stack_t stack{};
  stack.ss_size = 128 * 1024;
  stack.ss_sp = malloc(stack.ss_size);
  sigaltstack(&stack, nullptr);
}

void catch_signals() {
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGALRM}) sigaction(number, &action, nullptr);
}

}  // namespace rt
