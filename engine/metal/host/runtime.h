// The executor's runtime as kernels, the metal_stdlib shim and the checkers see it.
//
// One fiber runs one Metal thread; a host thread runs one threadgroup at a time. A fiber never changes its host thread, so
// `rt::self()` is a thread-local pointer that the scheduler sets at every switch. Whatever waits (barriers, simdgroup
// exchanges) is `convergent`: without it the optimiser may duplicate or merge calls, and the call site is what tells
// lanes that diverged from lanes that did not.
//
// This file is part of every kernel's translation unit: it includes no C++ standard header that Metal's names could meet.
// The rewriter (source.py) has already dropped `kernel`, `device`, `thread`, `threadgroup` and [[attributes]] from the
// user's text, turned `constant` into `const`, and literals 1.0 / 1.0h / 1.0bf into 1.0f / half(1.0) / bfloat(1.0f).
#pragma once
#include <stddef.h>
#include <stdint.h>

#define RT_CONVERGENT __attribute__((convergent))
#define RT_INLINE inline __attribute__((always_inline))
#define RT_EXPORT __attribute__((visibility("default")))

namespace rt {

constexpr unsigned kSimdWidth = 32;
constexpr unsigned kDepositBytes = 64;      // the widest value a lane deposits: a 4x4 matrix of floats
constexpr unsigned kMaxThreads = 1024;      // threads of a threadgroup, on every Apple GPU (Metal feature set tables)
constexpr unsigned kMaxBuffers = 31;        // buffer(0) … buffer(30)

struct Vec3 {
  uint32_t x, y, z;
};

// What all threads of the running threadgroup share.
struct GroupInfo {
  Vec3 threadgroup;                 // [[threadgroup_position_in_grid]]
  uint32_t linear_threadgroup;
  Vec3 threadgroups;                // [[threadgroups_per_grid]]
  Vec3 grid;                        // [[threads_per_grid]]
  Vec3 threads;                     // [[threads_per_threadgroup]]: smaller at the edge of a grid given in threads
  Vec3 dispatch_threads;            // [[dispatch_threads_per_threadgroup]]
  uint32_t thread_count, simdgroup_count;
};

struct Lanes;
struct Thread {
  uint32_t thread_index;            // [[thread_index_in_threadgroup]]
  uint32_t lane;                    // [[thread_index_in_simdgroup]]
  uint32_t simdgroup;               // [[simdgroup_index_in_threadgroup]]
  Vec3 position;                    // [[thread_position_in_threadgroup]]
  const GroupInfo* group;
  const Lanes* lanes;               // what its simdgroup's last exchange left
};

extern RT_EXPORT __attribute__((tls_model("initial-exec"))) __thread Thread* current;
RT_INLINE Thread& self() { return *current; }
RT_INLINE unsigned simd_width() { return kSimdWidth; }

// ---- waiting ------------------------------------------------------------------------------------------------------
// Flags are Metal's mem_flags: none 0, device 1, threadgroup 2, texture 4.
RT_EXPORT RT_CONVERGENT void threadgroup_barrier(unsigned flags);
RT_EXPORT RT_CONVERGENT void simdgroup_barrier(unsigned flags);

// Names an operation in reports, and says whether a missing lane makes its result undefined.
enum Op : unsigned {
  op_reduce, op_scan, op_vote, op_broadcast_first,            // defined over whichever lanes are active
  op_shuffle, op_broadcast, op_quad,                          // defined as long as the lane that is read is active
  op_simdgroup_barrier, op_matrix, op_async_copy,             // every lane must take part
};

struct Lanes {
  unsigned long long active;                                  // bit n: lane n took part
  const unsigned char* data;
  unsigned char* result;                                      // kDepositBytes that all these lanes share: what one works out from
  bool* known;                                                // the deposits (*known is false then) the others need not
  RT_INLINE const unsigned char* at(unsigned lane) const { return data + lane * kDepositBytes; }
};

// Every lane that takes part deposits `size` <= 64 bytes and sees all deposits, which stay valid until its next exchange.
// Call it from always_inline functions: the address it returns to is the site that converged lanes have in common.
RT_EXPORT RT_CONVERGENT void exchange_wait(const void* value, unsigned size, unsigned op);
RT_INLINE Lanes exchange(const void* value, unsigned size, unsigned op) {
  exchange_wait(value, size, op);
  return *self().lanes;
}

// To be called when an op reads a lane that isn't in `active`: Metal leaves the value undefined. Reported in every mode.
RT_EXPORT void inactive_lane_read(unsigned op, unsigned lane);

// ---- threadgroup memory -------------------------------------------------------------------------------------------
// One per `threadgroup T x[..]` in a body and per instantiation of it: its address tells them apart, `id` names it in reports.
struct Site {
  const char* name;
  uint32_t line;
  uint32_t id;
};
RT_EXPORT void* threadgroup_local(const Site& site, size_t size, size_t align);

template <class T, size_t Align = alignof(T)>
RT_INLINE T& threadgroup_variable(const Site& site) {
  return *static_cast<T*>(threadgroup_local(site, sizeof(T), Align));
}

// ---- statistics and faults ----------------------------------------------------------------------------------------
RT_EXPORT void count_matrix_op();                             // one simdgroup_multiply_accumulate, _multiply, _load or _store: once per simdgroup

enum Kind : uint32_t {
  kind_uninitialised_read, kind_out_of_bounds_read, kind_out_of_bounds_write, kind_race, kind_barrier_divergence,
  kind_simdgroup_divergence, kind_misaligned, kind_timeout, kind_crash,
};
enum AddressSpace : uint32_t { space_device, space_constant, space_threadgroup, space_none };

constexpr unsigned kFrames = 12;
struct Fault {                                                // plain data: it lies in the memory shared with the caller
  uint32_t kind, space;
  int32_t buffer;                                             // index bound; threadgroup argument; -1-site id; INT32_MIN: none
  int32_t op;                                                 // Op of a simdgroup fault, signal number of a crash, else -1
  int64_t offset, size;                                       // bytes from the start of the buffer; bytes accessed
  int64_t bound;                                              // the buffer's size in bytes
  int32_t thread, other_thread;                               // linear index in the threadgroup, -1: none
  int32_t threadgroup, other_threadgroup;                     // linear, -1: none
  uint64_t pcs[kFrames], other_pcs[kFrames];                  // return addresses, innermost first, 0 ends; module-relative once recorded
  char message[320];                                           // empty: Python words it from the fields
};
// Puts current thread and threadgroup in. `frames` from backtrace().
RT_EXPORT Fault fault(Kind kind);
// Keeps it unless one with the same kind, buffer and innermost pcs is kept already or 64 are. Not for signal handlers only: it allocates nothing.
RT_EXPORT void record(const Fault& fault);
// Return addresses from `frame` (a frame pointer: __builtin_frame_address(0)) outwards, within the current fiber's stack.
RT_EXPORT unsigned backtrace(const void* frame, uint64_t* pcs, unsigned most);

// ---- registration (generated after the user's source) --------------------------------------------------------------
enum ParameterKind : uint8_t { param_buffer, param_threadgroup, param_builtin };
enum Builtin : uint8_t {
  thread_position_in_grid, thread_position_in_threadgroup, thread_index_in_threadgroup, thread_index_in_simdgroup,
  thread_index_in_quadgroup, threadgroup_position_in_grid, threadgroups_per_grid, threads_per_grid,
  threads_per_threadgroup, dispatch_threads_per_threadgroup, threads_per_simdgroup, simdgroup_index_in_threadgroup,
  simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup, quadgroup_index_in_threadgroup,
  quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup, grid_origin, grid_size, no_builtin,
};
struct Parameter {
  ParameterKind kind;
  Builtin builtin;
  uint8_t index;
};
struct ParameterInfo {                                        // what only C++ knows
  uint32_t size, align;                                       // of the pointee or of the scalar
  bool is_const, is_pointer, is_reference;
};
// addresses[i]: what parameter i points to.
using Invoke = void (*)(void* const* addresses, const Thread& thread);
struct Kernel {
  const char* name;
  Invoke invoke;
  const Parameter* parameters;
  const ParameterInfo* infos;
  uint32_t count;
};
RT_EXPORT void register_kernel(const Kernel& kernel);
RT_EXPORT Vec3 builtin_value(Builtin builtin, const Thread& thread);

}  // namespace rt
