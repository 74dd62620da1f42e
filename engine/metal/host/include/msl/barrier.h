// Barriers and memory flags, handed on to the runtime.
#pragma once

#include "runtime.h"

#include "scalars.h"

#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST __attribute__((const))
#define METAL_PURE __attribute__((pure))

namespace metal {

// Values as the runtime takes them.
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_device_and_threadgroup = 3,  // an older spelling of both
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16,
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
constexpr mem_flags operator&(mem_flags a, mem_flags b) { return mem_flags(uint(a) & uint(b)); }
constexpr mem_flags& operator|=(mem_flags& a, mem_flags b) { return a = a | b; }

enum thread_scope {
  thread_scope_thread, thread_scope_threadgroup, thread_scope_device,
  thread_scope_system,  // __METAL_MEMORY_SCOPE_SYSTEM__, which compiler.py defines
  thread_scope_simdgroup
};
enum memory_scope { memory_scope_simdgroup, memory_scope_threadgroup, memory_scope_device };

METAL_FUNC void threadgroup_barrier(mem_flags flags) { rt::threadgroup_barrier(uint(flags)); }
METAL_FUNC void threadgroup_barrier(mem_flags flags, memory_scope) { rt::threadgroup_barrier(uint(flags)); }
METAL_FUNC void threadgroup_barrier(mem_flags flags, thread_scope) { rt::threadgroup_barrier(uint(flags)); }
METAL_FUNC void simdgroup_barrier(mem_flags flags) { rt::simdgroup_barrier(uint(flags)); }
METAL_FUNC void simdgroup_barrier(mem_flags flags, memory_scope) { rt::simdgroup_barrier(uint(flags)); }
METAL_FUNC void simdgroup_barrier(mem_flags flags, thread_scope) { rt::simdgroup_barrier(uint(flags)); }

}  // namespace metal
