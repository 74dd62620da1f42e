// Runs one threadgroup at a time on one host thread: its fibers, its barriers, its simdgroups, its threadgroup memory.
#pragma once
#include "fiber.h"
#include "protocol.h"

namespace rt {

// What every threadgroup of a launch has in common. `addresses` are those of parameters that aren't threadgroup memory.
struct Launch {
  const Kernel* kernel;
  Vec3 threadgroups, threads, grid;
  bool poison, seeded;
  uint64_t seed;
  void* addresses[96];
  uint32_t threadgroup_memory[kMaxBuffers];
};

constexpr size_t kArenaBytes = 1024 * 1024;
constexpr size_t kArenaGap = 4096 + 64;                       // not a multiple of a page: neighbours must not share cache sets
constexpr unsigned kMaxRegions = 128;

enum class Wait : uint8_t { none, barrier, exchange };

struct ThreadState : Thread {
  Fiber* fiber;                                               // null before the first run and after the last
  Wait wait;
  bool exited;
  uint32_t flags;
};

struct Simdgroup {
  uint32_t live, waiting;                                     // one bit a lane
  bool uniform;                                               // all that wait came to the same site
  uint64_t sites[kSimdWidth];
  uint8_t ops[kSimdWidth];
  uint8_t flags[kSimdWidth];
  const void* values[kSimdWidth];
  uint32_t sizes[kSimdWidth];
  Lanes lanes;                                                // of the exchange that was completed last
  bool known;
  alignas(64) unsigned char result[kDepositBytes];
  alignas(64) unsigned char data[kSimdWidth * kDepositBytes];
};

struct StoredRegion {
  int32_t buffer;                                             // argument index, or -1 - site id
  uint32_t size;
  char* base;
  const Site* site;                                           // null: an argument
  bool fresh;                                                 // not yet used by the running threadgroup
};

// One per host thread. Large: lives on the heap.
class Scheduler {
 public:
  bool create();
  void begin_launch(const Launch& launch);
  void run(uint32_t linear_threadgroup);

  void barrier(unsigned flags, uint64_t site);
  void exchange(const void* value, unsigned size, unsigned op, unsigned flags, uint64_t site);
  void* local(const Site& site, size_t size, size_t align);
  void fiber_main();
  const Fiber* running_fiber() const;
  const char* find_region(uintptr_t address, int32_t* buffer, int64_t* offset, int64_t* bound) const;
  uint32_t threadgroup_bytes() const { return used_bytes_; }

  Counts counts;

 private:
  ThreadState& running() { return static_cast<ThreadState&>(*current); }
  void shape(Vec3 threads);
  void start_order();
  void push(uint32_t thread) { ready_[tail_++ & (kMaxThreads - 1)] = uint16_t(thread); }
  void push_lanes(unsigned simdgroup, uint32_t lanes);
  void next(Fiber* from, bool finished);
  void exited();
  void barrier_slowly();
  void release_barrier();
  void look_at_barrier();
  void complete(unsigned simdgroup);
  void check_participation(const Simdgroup& simdgroup, unsigned index, uint32_t group);
  void unstall();
  Fiber* take_fiber();
  uint64_t random();
  StoredRegion& allocate(int32_t buffer, uint32_t size, size_t align, const Site* site);
  void begin_use(StoredRegion& region);
  void check_canaries();

  const Launch* launch_ = nullptr;
  GroupInfo info_;
  Fiber* pool_ = nullptr;
  unsigned fibers_made_ = 0;
  void* host_sp_ = nullptr;
  uint32_t head_ = 0, tail_ = 0;
  uint32_t live_ = 0, arrived_ = 0;
  uint64_t first_site_ = 0, other_sites_ = 0;                 // of a barrier: the first to arrive, bits in which others differ
  uint32_t exited_ = 0;
  uint64_t random_ = 0;
  uint16_t ready_[kMaxThreads];
  uint64_t barrier_sites_[kMaxThreads];
  ThreadState threads_[kMaxThreads];
  Simdgroup simdgroups_[kMaxThreads / kSimdWidth];
  char* arena_ = nullptr;
  char* arena_next_ = nullptr;
  StoredRegion regions_[kMaxRegions];
  unsigned region_count_ = 0, argument_regions_ = 0;
  uint32_t used_bytes_ = 0;
  void* addresses_[96];
};

extern __thread Scheduler* scheduler;                         // of this host thread
void set_modules(uintptr_t base, uintptr_t end);              // where the running kernel's code lies
void begin_recording(Control* control);
[[noreturn]] void fail(const char* message);                  // ends the worker with a crash that says so
bool record_unlocked(const Fault& fault);                     // for signal handlers

}  // namespace rt
