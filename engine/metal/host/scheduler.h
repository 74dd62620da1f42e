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

// The matrix operations that a simdgroup's lanes have reached since they last met. Lanes don't wait for each other there
// (simdgroup_matrix.h), so whoever comes first writes down the site, and the others are held against it.
struct MatrixOps {
  static constexpr uint32_t kMost = 512;                      // sites kept; later operations are only counted
  uint32_t count;
  bool reported;                                              // that they differ: what follows from it isn't
  uint32_t reached[kSimdWidth];
  uint64_t sites[kMost];
  uint8_t first[kMost];                                       // the lane that came first
  bool later(uint64_t site, uint32_t op) const;               // whether somebody reached it as operation `op` or after
};

struct Simdgroup {
  uint32_t live, waiting;                                     // one bit a lane
  uint32_t counting;                                          // loops that count turns and that its lanes are in
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
  LayoutOf layout;                                            // of what it holds; null: not known
  bool fresh;                                                 // not yet used by the running threadgroup
};

// One per host thread. Large: lives on the heap.
class Scheduler {
 public:
  bool create();
  void begin_launch(const Launch& launch);
  void run(uint32_t linear_threadgroup);

  void note_barrier(unsigned flags) { flags_[line.current->thread_index] = flags; }
  Turn step();
  Turn exchange(const void* value, unsigned size, unsigned op, unsigned flags, uint64_t site);
  void enter(Loop& loop);
  void leave(const Loop& loop);
  void matrix_op(uint64_t site);
  void* local(const Site& site, size_t size, size_t align, LayoutOf layout);
  void fiber_main();
  const Fiber* running_fiber() const;
  void describe_waiting(Fault& what) const;                   // the thread whose turn is next, or one that lives
  bool find_region(uintptr_t address, Fault& what, bool* guess) const;  // whether threadgroup memory was meant, and which
  uint32_t threadgroup_bytes() const { return used_bytes_; }

  Counts counts;

 private:
  void shape(Vec3 threads);
  void start_order();
  void push(Thread& thread) {
    line.ready[line.tail] = &thread;
    line.tail = (line.tail + 1) % Line::kPlaces;
    line.ready[line.tail] = &host_;
    in_order_ = false;
  }
  void push_lanes(unsigned simdgroup, uint32_t lanes);
  void host_turns();
  Thread& begin(Fiber* fiber);
  void exited(const Thread& thread);
  bool lives(const Thread& thread) const { return simdgroups_[thread.simdgroup].live >> thread.lane & 1; }
  bool any_lane_waits() const;
  uint32_t lanes_of(unsigned simdgroup) const;                // one bit for each that the threadgroup has
  void describe(Fault& what, const Thread& thread, bool other) const;
  void release_barrier();
  bool sites_differ() const;
  void look_at_barrier();
  bool in_step(unsigned simdgroup, unsigned lane, unsigned other) const;  // in the same turns of all loops
  bool together(unsigned simdgroup, unsigned lane, unsigned other) const;  // in step, and at one site
  bool before(unsigned simdgroup, unsigned lane, unsigned other) const;
  void complete(unsigned simdgroup);
  void check_participation(const Simdgroup& simdgroup, unsigned index, uint32_t group);
  void compare_matrix_ops(unsigned simdgroup);                // all its lanes have met, or ended
  void report_matrix_op(unsigned simdgroup, uint32_t op, unsigned lane);
  void unstall();
  Fiber* take_fiber();
  uint64_t random();
  StoredRegion& allocate(int32_t buffer, uint32_t size, size_t align, const Site* site, LayoutOf layout);
  void begin_use(StoredRegion& region);
  void check_canaries();

  const Launch* launch_ = nullptr;
  GroupInfo info_;
  Fiber* pool_ = nullptr;
  unsigned fibers_made_ = 0;
  Thread host_ = {.group = &info_};                           // the host thread itself, where it takes turns with threads
  uint32_t live_ = 0, started_ = 0;
  bool in_order_ = false;                                     // the line begins with all threads, as they are numbered
  uint64_t random_ = 0;
  Thread threads_[kMaxThreads];
  Fiber* fibers_[kMaxThreads] = {};                           // null before a thread begins and when it has ended
  uint16_t order_[kMaxThreads];                               // in which they begin
  const Loop* loops_[kMaxThreads] = {};                       // the innermost that each is in
  uint32_t flags_[kMaxThreads];                               // of the barrier that each waits at, in checked builds
  Simdgroup simdgroups_[kMaxThreads / kSimdWidth];
  MatrixOps matrix_ops_[kMaxThreads / kSimdWidth] = {};       // in checked builds
  char* arena_ = nullptr;
  size_t arena_room_ = 0;                                     // below it nothing is mapped in so many bytes, above it in twice as many
  char* arena_next_ = nullptr;
  StoredRegion regions_[kMaxRegions];
  unsigned region_count_ = 0, argument_regions_ = 0;
  uint32_t used_bytes_ = 0;
  void* addresses_[96];
};

extern __attribute__((tls_model("initial-exec"))) __thread Scheduler* scheduler;  // of this host thread
char* reserve_around(size_t bytes, size_t* room);             // memory far from all other; null: there is none
void set_modules(uintptr_t base, uintptr_t end);              // where the running kernel's code lies
void begin_recording(Control* control);
[[noreturn]] void fail(const char* message);                  // ends the worker with a crash that says so
bool record_unlocked(const Fault& fault);                     // for signal handlers

}  // namespace rt
