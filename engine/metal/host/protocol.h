// The page that caller and worker share: one launch's request and its results. worker.py mirrors it field by field.
#pragma once
#include "runtime.h"

namespace rt {

constexpr uint32_t kProtocol = 1;
constexpr unsigned kMostFaults = 64;
constexpr size_t kControlBytes = 64 * 1024;                   // the data follows it in the shared file
constexpr size_t kGapBytes = 16 * 1024;                       // before, between and after buffers, full of kCanary
constexpr unsigned kMostThreadgroupBytes = 32 * 1024;         // of a threadgroup, on every Apple GPU (Metal feature set tables)
// Read as float, half or bfloat this is NaN, so that what is read past a buffer's end shows in the result.
constexpr uint32_t kCanary = 0xFFA5FFA5;

enum LaunchFlags : uint32_t { flag_poison = 1, flag_seeded = 2, flag_fresh_canaries = 4 };

struct Binding {
  uint64_t offset, size;                                      // in the shared file; buffers that aren't bound have no bytes
  uint32_t present, writable, initialised, constant;
};

struct Counts {
  uint64_t threadgroups, barriers, matrix_ops, threadgroup_bytes;
  uint64_t loads[3], stores[3];                               // by AddressSpace; checked mode only
  uint64_t nanoseconds;
};

struct Control {
  uint32_t protocol, kernel;
  Vec3 threadgroups, threads, grid;
  uint32_t flags, host_threads;
  uint64_t seed;
  uint64_t timeout_microseconds;
  uint64_t arena_begin, arena_end;                            // offsets in the shared file
  Binding buffers[kMaxBuffers];
  uint32_t threadgroup_memory[kMaxBuffers];
  uint32_t fault_count;
  Counts counts;
  Fault faults[kMostFaults];
};
static_assert(sizeof(Control) <= kControlBytes, "the control page holds one launch");

}  // namespace rt
