// The functions that checked kernels call for copies, fills, atomics and misaligned addresses: rare enough to judge each.

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "check_shadow.h"

namespace check {
namespace {

void range(uintptr_t address, size_t size, unsigned access, const void* frame) {
  Window* window = window_of(address);
  if (!window) return note_elsewhere(address, size, access);
  unsigned space = window == &state.threadgroup ? 2 : 0;
  (access & reads ? state.counts.loads : state.counts.stores)[space]++;
  size_t offset = address - window->base, end = std::min(offset + size, window->span);
  for (; offset < end; offset += 16) {
    judge(*window, offset, static_cast<unsigned>(std::min<size_t>(16, end - offset)), access, frame);
    settle();
  }
}

// A copy may hold padding that nobody writes. Into checked memory its bytes stay unwritten; into a thread's own memory,
// which has no shadow, it counts as a read of what isn't there if at least half of it isn't.
void copy(uintptr_t to, uintptr_t from, size_t size, const void* frame) {
  Window *source = window_of(from), *target = window_of(to);
  range(from, size, reads | bulk, frame);
  size_t unwritten = 0, first = 0;
  for (size_t i = 0; source && i < size && from + i - source->base < source->span; i++) {
    if (written(*source, from + i - source->base)) continue;
    if (!unwritten++) first = i;
  }
  if (unwritten && !target && 2 * unwritten >= size) {
    judge_unwritten(*source, from + first - source->base, static_cast<unsigned>(unwritten), frame);
  }
}

// After the bytes have moved: forwards or backwards does not matter to bytes that were never written, except in overlaps.
void carry_unwritten(uintptr_t to, uintptr_t from, size_t size) {
  Window *source = window_of(from), *target = window_of(to);
  if (!source || !target || (to < from + size && from < to + size)) return;
  for (size_t i = 0; i < size; i++) {
    size_t at = to + i - target->base;
    if (at >= target->span || from + i - source->base >= source->span) return;
    if (target->w[at] == kGap || written(*source, from + i - source->base)) continue;
    target->w[at] = target == &state.device ? kUnwritten : 0;
  }
}

template <class T>
void atomic_access(const volatile T* pointer, unsigned access, const void* frame) {
  uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  Window* window = window_of(address);
  if (!window) return note_elsewhere(address, sizeof(T), access);
  unsigned space = window == &state.threadgroup ? 2 : 0;
  if (access & reads) state.counts.loads[space]++;
  if (access & writes) state.counts.stores[space]++;
  if (address % sizeof(T)) misaligned(address, sizeof(T), frame);
  judge(*window, address - window->base, sizeof(T), access | atomic, frame);
}

}  // namespace
}  // namespace check

using namespace check;

CALLBACK void __tsan_read_range(void* address, size_t size) {
  range(reinterpret_cast<uintptr_t>(address), size, reads, FRAME);
}
CALLBACK void __tsan_write_range(void* address, size_t size) {
  range(reinterpret_cast<uintptr_t>(address), size, writes, FRAME);
}
CALLBACK void* __tsan_memcpy(void* to, const void* from, size_t size) {
  uintptr_t target = reinterpret_cast<uintptr_t>(to), source = reinterpret_cast<uintptr_t>(from);
  copy(target, source, size, FRAME);
  range(target, size, writes, FRAME);
  memmove(to, from, size);
  carry_unwritten(target, source, size);
  return to;
}
CALLBACK void* __tsan_memmove(void* to, const void* from, size_t size) {
  uintptr_t target = reinterpret_cast<uintptr_t>(to), source = reinterpret_cast<uintptr_t>(from);
  copy(target, source, size, FRAME);
  range(target, size, writes, FRAME);
  memmove(to, from, size);
  carry_unwritten(target, source, size);
  return to;
}
CALLBACK void* __tsan_memset(void* to, int value, size_t size) {
  range(reinterpret_cast<uintptr_t>(to), size, writes, FRAME);
  return memset(to, value, size);
}

CALLBACK void __tsan_atomic_thread_fence(int) { device_fence(); }
CALLBACK void __tsan_atomic_signal_fence(int) {}

// Metal's atomics are relaxed; one host thread runs them all, so any order does.
#define FETCH(BITS, T, NAME, EXPRESSION)                                                        \
  CALLBACK T __tsan_atomic##BITS##_##NAME(volatile T* at, T value, int) {                       \
    atomic_access(at, reads | writes, FRAME);                                                   \
    T old = *at;                                                                                \
    *at = static_cast<T>(EXPRESSION);                                                           \
    return old;                                                                                 \
  }
#define EXCHANGE(BITS, T, NAME)                                                                 \
  CALLBACK int __tsan_atomic##BITS##_compare_exchange_##NAME(volatile T* at, T* expected, T desired, int, int) { \
    atomic_access(at, reads | writes, FRAME);                                                   \
    T old = *at;                                                                                \
    bool equal = old == *expected;                                                              \
    if (equal) *at = desired;                                                                   \
    else *expected = old;                                                                       \
    return equal;                                                                               \
  }
#define ATOMICS(BITS, T)                                                                        \
  CALLBACK T __tsan_atomic##BITS##_load(const volatile T* at, int) {                            \
    atomic_access(at, reads, FRAME);                                                            \
    return *at;                                                                                 \
  }                                                                                             \
  CALLBACK void __tsan_atomic##BITS##_store(volatile T* at, T value, int) {                     \
    atomic_access(at, writes, FRAME);                                                           \
    *at = value;                                                                                \
  }                                                                                             \
  FETCH(BITS, T, exchange, value)                                                               \
  FETCH(BITS, T, fetch_add, old + value)                                                        \
  FETCH(BITS, T, fetch_sub, old - value)                                                        \
  FETCH(BITS, T, fetch_and, old & value)                                                        \
  FETCH(BITS, T, fetch_or, old | value)                                                         \
  FETCH(BITS, T, fetch_xor, old ^ value)                                                        \
  FETCH(BITS, T, fetch_nand, ~(old & value))                                                    \
  EXCHANGE(BITS, T, strong)                                                                     \
  EXCHANGE(BITS, T, weak)                                                                       \
  CALLBACK T __tsan_atomic##BITS##_compare_exchange_val(volatile T* at, T expected, T desired, int, int) { \
    atomic_access(at, reads | writes, FRAME);                                                   \
    T old = *at;                                                                                \
    if (old == expected) *at = desired;                                                         \
    return old;                                                                                 \
  }

ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

// clang's description of a check (lib/CodeGen/CGExpr.cpp, EmitTypeCheck): only the alignment of the type is used here.
struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  uint8_t log_alignment, check;
};
CALLBACK void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
  uintptr_t alignment = uintptr_t{1} << data->log_alignment;
  if (address & (alignment - 1)) misaligned(address, static_cast<unsigned>(alignment), FRAME);
}
