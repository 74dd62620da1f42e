// Fibers: stacks that threads run on. One is left for another by runtime.h's switch_context (ucontext would cost 190 ns:
// it saves signal masks).
#pragma once
#include <stdint.h>
#include <sys/mman.h>

#include "runtime.h"

namespace rt {

constexpr size_t kStackBytes = 256 * 1024;                    // touched lazily; Metal's own limit on thread-local memory is far lower
constexpr size_t kGuardBytes = 16 * 1024;                     // a page on every host (aarch64 macOS: 16 KiB)

struct Fiber {
  char* stack;                                                // the guard lies at its low end
  void* top;
  Fiber* next;                                                // in the pool

  uintptr_t low() const { return reinterpret_cast<uintptr_t>(stack) + kGuardBytes; }
  uintptr_t high() const { return reinterpret_cast<uintptr_t>(stack) + kGuardBytes + kStackBytes; }

  // `colour` spreads stack tops over cache sets: at equal offsets in aligned stacks, 1,024 fibers would share one set of
  // the first-level cache.
  bool create(unsigned colour) {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (memory == MAP_FAILED) return false;
    stack = static_cast<char*>(memory);
    mprotect(stack, kGuardBytes, PROT_NONE);
    top = reinterpret_cast<void*>((high() - 64 - (colour % 61) * 192) & ~uintptr_t{15});
    return true;
  }

  // As if `entry` had been called from nowhere.
  Context begin(void (*entry)()) const {
    void** sp = static_cast<void**>(top);
#if defined(__x86_64__)
    *--sp = nullptr;                                          // the return address; 16-byte aligned before the call
#endif
    return {sp, reinterpret_cast<const void*>(entry), nullptr};
  }
};

}  // namespace rt
