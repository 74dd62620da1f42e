// Checked mode: what the runtime tells the checkers.
//
// A kernel compiled with -fsanitize=thread calls a __tsan_* function before each load and store; check_callbacks.cpp
// holds those functions (ThreadSanitizer's own library is never linked). Each byte of a buffer or of threadgroup memory
// has a shadow: inside a region or in a gap, written or not, by whom and when, and who has read it since. "When" is a
// clock that advances at every barrier and at every new threadgroup. What is wrong goes to rt::record.
//
// Only one host thread may run checked threadgroups, one after another: the shadow is not atomic. Addresses that belong
// neither to the range of buffers nor to threadgroup memory (stacks, tables of the program) are only remembered, for the
// signal that a wild one raises.
//
// What isn't seen stands in docs/metal-executor.md. Of copies into a thread's own memory only those are reported that read
// at least as many unwritten bytes as written ones (a struct of up to 8 bytes is loaded like a number). Simdgroup matrix
// operations count as lane 0's accesses; check_matrix_ops.cpp sees that the other lanes reach them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace check {

enum class Space : uint8_t { device, constant, threadgroup };  // as rt::AddressSpace

// One buffer or one threadgroup allocation. `buffer` is the index it is bound to, or -1 - site for storage declared in
// a kernel's body. Reads of a region that is not `initialised` count as uninitialised until something is written.
struct Region {
  int32_t buffer;
  Space space;
  uintptr_t base;
  size_t size;
  bool writable;
  bool initialised;
};

struct Stats {
  uint64_t loads[3];  // accesses (not bytes), by Space
  uint64_t stores[3];
};

// The range in which device and constant regions will lie, most of it empty. False: there is no room for its shadow.
bool watch(uintptr_t begin, uintptr_t end);
// Starts a launch: forgets the last one's counts and shadow. The regions have gaps of a page at least around them.
void begin_launch(const Region* regions, size_t count);
// The range in which every threadgroup region of this launch will lie, gaps included. Follows begin_launch.
void threadgroup_storage(uintptr_t begin, uintptr_t end);
// Threadgroup memory becomes uninitialised, and all that earlier threadgroups did to device memory is unordered.
void begin_threadgroup(uint32_t linear_threadgroup);
// Arguments after begin_threadgroup; storage declared in a body when it is first used. Adding it again changes nothing.
void add_threadgroup_region(const Region& region);
// Bytes of a threadgroup region that are padding, where the repeating pattern `values` is false, count as written. Follows
// add_threadgroup_region in every threadgroup.
void padding(uintptr_t base, size_t size, const bool* values, size_t period);
// All live threads of the threadgroup have arrived. Flags as in Metal: 1 device, 2 threadgroup; others fence nothing.
void barrier(unsigned mem_flags);
// The lanes of one simdgroup have arrived: orders them among themselves only.
void simd_barrier(unsigned simdgroup, unsigned mem_flags);
// Ends the launch: nothing after it is checked.
void end_launch();

const Stats& stats();

// Whether the access at this address has been judged: it lies in the range of buffers or in threadgroup memory.
bool judged(uintptr_t address);
// The last access that wasn't, if it covers this address. Zero for one that the signal doesn't tell: no such address exists.
struct Access {
  uintptr_t address;
  unsigned size, what;  // what: 1 reads, 2 writes
};
const Access* wild_access(uintptr_t address);

}  // namespace check
