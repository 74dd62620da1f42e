// What becomes of a signal that a kernel raises, or of its time running out: a fault in the control page, and the end.
// After an access in the gaps around buffers and threadgroup memory the kernel goes on instead: the fault is known.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <initializer_list>

#include "worker.h"

#ifdef ASSAY_CHECKED
#include "check.h"
#endif

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

enum class Way { read, write, unknown };

Way way(void* context) {
  [[maybe_unused]] auto* state = static_cast<ucontext_t*>(context);
#if defined(__APPLE__) && defined(__aarch64__)
  return state->uc_mcontext->__es.__esr >> 6 & 1 ? Way::write : Way::read;
#elif defined(__APPLE__)
  return state->uc_mcontext->__es.__err >> 1 & 1 ? Way::write : Way::read;
#elif defined(__aarch64__)
  // Records of a size each, one of them the syndrome register, whose bit 6 is WnR (Arm Architecture Reference Manual).
  const unsigned char* at = reinterpret_cast<const unsigned char*>(state->uc_mcontext.__reserved);
  for (const unsigned char* end = at + sizeof state->uc_mcontext.__reserved; at + 16 <= end;) {
    uint32_t head[2];
    uint64_t syndrome;
    memcpy(head, at, 8), memcpy(&syndrome, at + 8, 8);
    if (head[0] == 0x45535201) return syndrome >> 6 & 1 ? Way::write : Way::read;  // ESR_MAGIC (Linux, asm/sigcontext.h)
    if (head[1] < 16) break;
    at += head[1];
  }
  return Way::unknown;
#else
  return state->uc_mcontext.gregs[19] >> 1 & 1 ? Way::write : Way::read;  // REG_ERR: bit 1 of a page fault's code
#endif
}

// False: it came while threads took turns, and shows none.
bool trace(void* context, Fault& what) {
  uintptr_t pc, frame, caller;
  machine_state(context, &pc, &frame, &caller);
  what.pcs[0] = pc + 1;                                       // others are return addresses: behind the call
  const Fiber* fiber = scheduler ? scheduler->running_fiber() : nullptr;
  unsigned count = 1;
  bool inside = fiber && frame >= fiber->low() && frame < fiber->high();
  if (inside)
    count += backtrace(reinterpret_cast<void*>(frame), what.pcs + 1, kFrames - 3);
#if defined(__x86_64__)
  if (fiber && caller >= fiber->low() && caller + 16 < fiber->high()) memcpy(&what.pcs[count], reinterpret_cast<void*>(caller), 16);
#else
  what.pcs[count] = caller;
#endif                                                        // last, and dropped if they lie outside the kernel's module
  return inside;
}

[[noreturn]] void end_with(const Fault& what) {
  keep_checker_counts();
  if (!record_unlocked(what)) control().faults[kMostFaults - 1] = what;
  _exit(kReported);
}

constexpr uintptr_t kNull = 1u << 20;                         // nearer to zero than this, a null pointer was meant

// An address that no buffer has. True: the kernel may go on, on a page of its own.
bool outside(uintptr_t address, Way how, Fault& what) {
  bool guess = false, seen = false;
#ifdef ASSAY_CHECKED
  seen = check::judged(address);
  if (const check::Access* access = check::wild_access(address)) {
    address = access->address, how = access->what & 2 ? Way::write : Way::read;
    what.size = access->size;
  }
#endif
  bool near_null = address + kNull < 2 * kNull;
  bool ours = scheduler && scheduler->find_region(address, what, &guess);
  if (near_null || !(ours || find_buffer(address, how == Way::write, what, &guess))) {
    what.offset = int64_t(address);
    return false;
  }
  what.kind = how == Way::write ? kind_out_of_bounds_write : kind_out_of_bounds_read;
  what.op = guess ? kGuessed : kSeen;
  if (guess && !ours) return false;
  if (!seen) record(what);
  if (lend_page(address, how != Way::read)) return true;
  what.kind = kind_crash;
  what.op = 0;
  snprintf(what.message, sizeof what.message, "ended: it uses more memory outside its buffers than is looked at");
  return false;
}

void on_signal(int number, siginfo_t* info, void* context) {
  if (number == SIGALRM && !late()) return;
  if (number == SIGFPE && skip_division(context)) return;
  Fault what = fault(number == SIGALRM ? kind_timeout : kind_crash);
  what.op = number;
  bool traced = trace(context, what);
  if (number == SIGALRM && !traced && scheduler) scheduler->describe_waiting(what);
  if (number == SIGSEGV || number == SIGBUS) {
    uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
    const Fiber* fiber = scheduler ? scheduler->running_fiber() : nullptr;
    if (fiber && address < fiber->low() && address + kGuardBytes >= fiber->low())
      snprintf(what.message, sizeof what.message, "the thread's stack of %zu KiB overflowed", kStackBytes / 1024);
    else if (outside(address, way(context), what))
      return;
  }
  end_with(what);
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
