// Fibers: a stack and a switch of 6-9 ns, by hand for x86-64 and aarch64 (ucontext costs 190 ns: it saves signal masks).
//
// Only what a called function must preserve is saved. Floating-point control words are not: kernels never change them.
#pragma once
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

// Saves the caller's registers on its stack and the stack pointer in *save, then continues where `load` was saved.
extern "C" void rt_switch(void** save, void* load);

namespace rt {

constexpr size_t kStackBytes = 256 * 1024;                    // touched lazily; Metal's own limit on thread-local memory is far lower
constexpr size_t kGuardBytes = 16 * 1024;                     // a page on every host (aarch64 macOS: 16 KiB)

struct Fiber {
  void* sp;
  char* stack;                                                // the guard lies at its low end
  Fiber* next;                                                // in the pool

  uintptr_t low() const { return reinterpret_cast<uintptr_t>(stack) + kGuardBytes; }
  uintptr_t high() const { return reinterpret_cast<uintptr_t>(stack) + kGuardBytes + kStackBytes; }

  // The frame pointer that a switched-out fiber saved.
  const void* frame() const {
#if defined(__x86_64__)
    return static_cast<void* const*>(sp)[5];
#else
    return static_cast<void* const*>(sp)[10];
#endif
  }

  // Where a switched-out fiber will go on. Not in a frame of its own when the switch was a tail call.
  uint64_t resumes_at() const {
#if defined(__x86_64__)
    return static_cast<uint64_t*>(sp)[6];
#else
    return static_cast<uint64_t*>(sp)[11];
#endif
  }

  // Makes a stack whose first switch enters `entry`. `colour` spreads stack tops over cache sets: at equal offsets in
  // aligned stacks, 1,024 fibers would share one set of the first-level cache.
  bool create(void (*entry)(), unsigned colour) {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (memory == MAP_FAILED) return false;
    stack = static_cast<char*>(memory);
    mprotect(stack, kGuardBytes, PROT_NONE);
    uintptr_t top = high() - 64 - (colour % 61) * 192;
    void** slots = reinterpret_cast<void**>(top & ~uintptr_t{15});
#if defined(__x86_64__)
    *--slots = nullptr;                                       // the return address of `entry`, which never returns
    *--slots = nullptr;                                       // keeps the stack 16-byte aligned at the call
    slots[0] = reinterpret_cast<void*>(entry);
    for (int i = 1; i <= 6; i++) slots[-i] = nullptr;
    sp = slots - 6;
#else
    slots -= 20;
    for (int i = 0; i < 20; i++) slots[i] = nullptr;
    slots[11] = reinterpret_cast<void*>(entry);               // x30
    sp = slots;
#endif
    return true;
  }
};

}  // namespace rt
