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

// Where a thread that waits goes on.
struct Context {
  const void *sp, *pc, *fp;
};

struct Lanes;
struct alignas(64) Thread {         // one cache line
  Context context;                  // unless it runs
  uint32_t thread_index;            // [[thread_index_in_threadgroup]]
  uint32_t lane;                    // [[thread_index_in_simdgroup]]
  uint32_t simdgroup;               // [[simdgroup_index_in_threadgroup]]
  Vec3 position;                    // [[thread_position_in_threadgroup]]
  const GroupInfo* group;
  const Lanes* lanes;               // what its simdgroup's last exchange left
};

// Who runs on this host thread, and who is ready after it. Behind the last one stands the host thread itself, so that
// whoever waits need not ask whether there is a next.
struct Line {
  static constexpr uint32_t kPlaces = 2 * kMaxThreads;        // a ring: all threads and the host thread, and a power of two
  static constexpr uint32_t kAhead = 2;
  Thread* current;                                            // null: the host thread
  uint32_t head, tail;
  Thread* ready[kPlaces + kAhead];                            // none is null; the last kAhead are there to be looked at
};
extern RT_EXPORT __attribute__((tls_model("initial-exec"))) __thread Line line;
RT_INLINE Thread& self() { return *line.current; }
RT_INLINE unsigned simd_width() { return kSimdWidth; }

// ---- switching ----------------------------------------------------------------------------------------------------
// Stops here, and goes on where `to` has stopped. Inline, with every register given up: the compiler keeps what is live
// in the frame (a function would have to save six registers on x86-64 and twenty on aarch64 for all), and there is no
// return: threads arrive from one barrier and go on behind another, which the return predictor gets wrong every time
// (8 ns). A barrier costs 2.5 ns a thread so, and 5.5 with a function that saves what callees must.
//
// The frame pointer can't be given up. Nor can a base pointer (rbx, x19), which compilers use where a frame has arrays
// of variable length: Metal has none. Floating-point control words are never changed.
RT_INLINE RT_CONVERGENT void switch_context(Context* from, const Context* to) {
#if defined(__x86_64__)
  asm volatile(
      "leaq 1f(%%rip), %%rcx\n"
      "movq %%rsp, 0(%0)\n movq %%rcx, 8(%0)\n movq %%rbp, 16(%0)\n"
      "movq 0(%1), %%rsp\n movq 16(%1), %%rbp\n jmpq *8(%1)\n"
      "1:\n"
      : "+a"(from), "+d"(to)
      :
      : "rbx", "rcx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc", "memory",
        "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
        "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#if defined(__AVX512F__)
        , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",
        "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31",
        "k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7"
#endif
#if defined(__EGPR__)
        , "r16", "r17", "r18", "r19", "r20", "r21", "r22", "r23",
        "r24", "r25", "r26", "r27", "r28", "r29", "r30", "r31"
#endif
  );
#elif defined(__aarch64__)
  register Context* x0 asm("x0") = from;
  register const Context* x1 asm("x1") = to;
  asm volatile(                                               // x30: a thread that begins has no caller
      "adr x9, 1f\n mov x10, sp\n stp x10, x9, [x0]\n str x29, [x0, #16]\n"
      "ldp x10, x9, [x1]\n ldr x29, [x1, #16]\n mov sp, x10\n mov x30, xzr\n br x9\n"
      "1:\n"
      : "+r"(x0), "+r"(x1)
      :
      : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16", "x17",
        "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x30", "cc", "memory",
        "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15",
        "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31"
#if !defined(__APPLE__)                                       // which reserves it
        , "x18"
#endif
#if defined(__ARM_FEATURE_SVE)
        , "p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7", "p8", "p9", "p10", "p11", "p12", "p13", "p14", "p15"
#endif
  );
#else
#error "the executor switches threads on x86-64 and aarch64 only"
#endif
}

// Who waits, and who goes on instead. Where a call makes one it returns, so that calls and returns stay paired, and then
// the turn is taken.
struct Turn {
  Thread *from, *to;
};
// The frames of 256 threads and more don't fit the first-level cache. Those of the thread after the next two are asked for
// now: a matmul with one output a thread takes 0.65 ns a multiply-add so, and 0.95 without (1,024 threads, Xeon).
RT_INLINE Turn next_turn() {
  Turn turn = {line.current, line.ready[line.head]};
  const char* frame = static_cast<const char*>(line.ready[line.head + Line::kAhead]->context.sp);
  __builtin_prefetch(frame);
  __builtin_prefetch(frame + 64);
  line.head = (line.head + 1) % Line::kPlaces;
  line.current = turn.to;
  return turn;
}
RT_INLINE RT_CONVERGENT void take(Turn turn) { switch_context(&turn.from->context, &turn.to->context); }

// ---- waiting ------------------------------------------------------------------------------------------------------
// Flags are Metal's mem_flags: none 0, device 1, threadgroup 2, texture 4.
RT_EXPORT RT_CONVERGENT Turn arrive_at_barrier(unsigned flags);   // in checked builds, which note the flags
RT_INLINE RT_CONVERGENT void threadgroup_barrier([[maybe_unused]] unsigned flags) {
#if __has_feature(thread_sanitizer)
  take(arrive_at_barrier(flags));
#else
  take(next_turn());
#endif
}

// Lets every thread that is ready come as far as it can before this one goes on: lanes reach one place together, where all
// come there. Not where a seed gives their order.
RT_EXPORT RT_CONVERGENT Turn arrive_in_step();
RT_INLINE RT_CONVERGENT void keep_step() { take(arrive_in_step()); }

// A loop that has simd functions in it, for as long as the thread is in it (loops.py): the scheduler lets lanes that are in
// a loop go before those that are behind it and, where lanes may be in different turns of it, those in the earlier turn.
struct Loop;
RT_EXPORT RT_CONVERGENT void enter_loop(Loop& loop);
RT_EXPORT RT_CONVERGENT void leave_loop(const Loop& loop);
struct Loop {
  const Loop* outer;
  uint64_t site;                                              // where it was entered: tells apart what inlining has made two of
  uint64_t turn = 0;
  bool counts;                                                // its turns; else all that are in it are in the same
  RT_INLINE RT_CONVERGENT explicit Loop(bool that_counts) : counts(that_counts) { enter_loop(*this); }
  RT_INLINE RT_CONVERGENT ~Loop() { leave_loop(*this); }
  Loop(const Loop&) = delete;
};

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
RT_EXPORT RT_CONVERGENT Turn arrive_at_exchange(const void* value, unsigned size, unsigned op, unsigned flags);
RT_INLINE RT_CONVERGENT Lanes exchange(const void* value, unsigned size, unsigned op) {
  take(arrive_at_exchange(value, size, op, 0));
  return *self().lanes;
}
RT_INLINE RT_CONVERGENT void simdgroup_barrier(unsigned flags) {
  take(arrive_at_exchange(nullptr, 0, op_simdgroup_barrier, flags));
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

// Which bytes of a type hold values; the others are padding, which nobody writes and copies may read. The pattern repeats
// every `period` bytes. Null: all do, or it isn't known.
struct Layout {
  const bool* values;
  uint32_t period;
};
template <class T> Layout layout_of();                        // layout.h
using LayoutOf = Layout (*)();
#if __has_feature(thread_sanitizer)
template <class T> inline constexpr LayoutOf checked_layout = layout_of<T>;
#else
template <class T> inline constexpr LayoutOf checked_layout = nullptr;
#endif

RT_EXPORT void* threadgroup_local(const Site& site, size_t size, size_t align, LayoutOf layout);

template <class T, size_t Align = alignof(T)>
RT_INLINE T& threadgroup_variable(const Site& site) {
  return *static_cast<T*>(threadgroup_local(site, sizeof(T), Align, checked_layout<T>));
}

// An element of a thread's own array. Outside is a place of its own, gone with the expression (own_arrays.py says why).
template <class T, size_t N, class I>
  requires __is_constructible(T)
RT_INLINE T& element(T (&array)[N], I index, T&& outside = T{}) {
  return index >= I(0) && static_cast<unsigned long long>(index) < N ? array[index] : outside;
}
template <class A, class I>
RT_INLINE auto element(A& array, I index) -> decltype((array[index])) { return array[index]; }

// ---- statistics and faults ----------------------------------------------------------------------------------------
RT_EXPORT RT_CONVERGENT void matrix_op_reached();             // by each lane, in checked builds: the lanes are compared when they next meet
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
  char element;                                               // numbers that it points to: f(loat), b(float), i(nteger); r(aw): bytes, a struct
  uint8_t element_size;
  LayoutOf layout;                                            // of the pointee, in checked builds
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
