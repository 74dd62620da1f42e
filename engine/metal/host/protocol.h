// The page that caller and worker share: one launch's request and its results. worker.py mirrors it field by field.
#pragma once
#include "runtime.h"

namespace rt {

constexpr uint32_t kProtocol = 2;
constexpr unsigned kMostFaults = 256;                         // before Python makes one of those that a line has several of
constexpr size_t kControlBytes = 192 * 1024;                  // the data follows it in the shared file
constexpr size_t kGapBytes = 8 * 1024;                        // before and after a buffer, full of kCanary: or a page, if that is more
constexpr unsigned kMostThreadgroupBytes = 32 * 1024;         // of a threadgroup, on every Apple GPU (Metal feature set tables)
// Read as float, half or bfloat this is NaN, so that what is read past a buffer's end shows in the result.
constexpr uint32_t kCanary = 0xFFA5FFA5;

enum LaunchFlags : uint32_t { flag_poison = 1, flag_seeded = 2, flag_fresh_layout = 4 };

struct Binding {
  uint64_t offset, size, room;                                // in the shared file, and behind it as guard gap; a buffer that isn't
                                                              // bound has no bytes
  uint32_t owner;                                             // the buffer whose piece of the file it lies in, itself if that is
  uint32_t present, writable, initialised, constant;          // present; the rest is said of the whole piece
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
  Binding buffers[kMaxBuffers];
  uint32_t threadgroup_memory[kMaxBuffers];
  uint32_t fault_count;
  Counts counts;
  Fault faults[kMostFaults];
};
static_assert(sizeof(Control) <= kControlBytes, "the control page holds one launch");

}  // namespace rt
