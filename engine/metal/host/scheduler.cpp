// The scheduler of one threadgroup. A thread runs until it waits or ends; then the next one in the ready queue runs,
// without a detour over the host thread. What nobody can complete any more is completed by those that wait for it: lanes
// of a simdgroup that diverged proceed in the order of their call sites, which brings them together again where their
// paths meet, and a threadgroup barrier needs live threads only. Both are reported where Metal leaves them undefined.
#include "scheduler.h"

#include <string.h>

#ifdef ASSAY_CHECKED
#include "check.h"
#endif

namespace rt {

__attribute__((tls_model("initial-exec"))) __thread Thread* current = nullptr;
__thread Scheduler* scheduler = nullptr;

static void enter_fiber() { scheduler->fiber_main(); }

// ---- a launch, a threadgroup --------------------------------------------------------------------------------------

uint64_t Scheduler::random() {                                // splitmix64 (Steele, Lea, Flood 2014)
  uint64_t z = (random_ += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

void Scheduler::begin_launch(const Launch& launch) {
  launch_ = &launch;
  memset(&counts, 0, sizeof counts);
  arena_next_ = arena_;
  region_count_ = used_bytes_ = 0;
  info_ = {};
  memcpy(addresses_, launch.addresses, sizeof addresses_);
  for (unsigned i = 0; i < launch.kernel->count; i++) {
    const Parameter& parameter = launch.kernel->parameters[i];
    if (parameter.kind != param_threadgroup) continue;
    addresses_[i] = allocate(parameter.index, launch.threadgroup_memory[parameter.index], 64, nullptr).base;
  }
  argument_regions_ = region_count_;
#ifdef ASSAY_CHECKED
  check::threadgroup_storage(reinterpret_cast<uintptr_t>(arena_), reinterpret_cast<uintptr_t>(arena_) + kArenaBytes);
#endif
}

// Positions and lanes of every thread; they change only when the threadgroup's shape does.
void Scheduler::shape(Vec3 threads) {
  if (info_.threads.x == threads.x && info_.threads.y == threads.y && info_.threads.z == threads.z) return;
  info_.threads = threads;
  info_.thread_count = threads.x * threads.y * threads.z;
  info_.simdgroup_count = (info_.thread_count + kSimdWidth - 1) / kSimdWidth;
  for (uint32_t i = 0; i < info_.thread_count; i++) {
    ThreadState& thread = threads_[i];
    thread.thread_index = i;
    thread.lane = i % kSimdWidth;
    thread.simdgroup = i / kSimdWidth;
    thread.lanes = &simdgroups_[i / kSimdWidth].lanes;
    thread.position = {i % threads.x, i / threads.x % threads.y, i / (threads.x * threads.y)};
    thread.group = &info_;
  }
}

static uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

void Scheduler::run(uint32_t linear) {
  const Launch& launch = *launch_;
  Vec3 groups = launch.threadgroups;
  info_.threadgroup = {linear % groups.x, linear / groups.x % groups.y, linear / (groups.x * groups.y)};
  info_.linear_threadgroup = linear;
  info_.threadgroups = groups;
  info_.grid = launch.grid;
  info_.dispatch_threads = launch.threads;
  shape({least(launch.threads.x, launch.grid.x - info_.threadgroup.x * launch.threads.x),
         least(launch.threads.y, launch.grid.y - info_.threadgroup.y * launch.threads.y),
         least(launch.threads.z, launch.grid.z - info_.threadgroup.z * launch.threads.z)});
#ifdef ASSAY_CHECKED
  check::begin_threadgroup(linear);
#endif
  for (unsigned i = 0; i < region_count_; i++) regions_[i].fresh = true;
  for (unsigned i = 0; i < argument_regions_; i++) begin_use(regions_[i]);
  start_order();
  next(nullptr, false);
  current = nullptr;
  counts.threadgroups++;
  check_canaries();
}

void Scheduler::start_order() {
  uint32_t count = info_.thread_count;
  live_ = count;
  arrived_ = exited_ = 0;
  head_ = tail_ = 0;
  random_ = launch_->seed * 0xD1342543DE82EF95u + info_.linear_threadgroup;
  for (uint32_t i = 0; i < count; i++) threads_[i].fiber = nullptr, threads_[i].wait = Wait::none, threads_[i].exited = false;
  for (unsigned s = 0; s < info_.simdgroup_count; s++) {
    uint32_t lanes = least(kSimdWidth, count - s * kSimdWidth);
    simdgroups_[s].live = lanes == 32 ? 0xFFFFFFFFu : (1u << lanes) - 1;
    simdgroups_[s].waiting = 0;
  }
  uint16_t order[kMaxThreads / kSimdWidth];
  for (unsigned s = 0; s < info_.simdgroup_count; s++) order[s] = uint16_t(s);
  if (launch_->seeded)
    for (unsigned s = info_.simdgroup_count; s > 1; s--) {
      unsigned other = unsigned(random() % s);
      uint16_t kept = order[s - 1];
      order[s - 1] = order[other], order[other] = kept;
    }
  for (unsigned s = 0; s < info_.simdgroup_count; s++) push_lanes(order[s], simdgroups_[order[s]].live);
}

// Makes lanes ready: in order, or in an order drawn from the seed (an affine map of the lanes: cheap, and it reverses,
// rotates and scatters them).
void Scheduler::push_lanes(unsigned simdgroup, uint32_t lanes) {
  uint32_t first = simdgroup * kSimdWidth;
  if (!launch_->seeded) {
    for (; lanes; lanes &= lanes - 1) push(first + unsigned(__builtin_ctz(lanes)));
    return;
  }
  uint64_t draw = random();
  unsigned step = unsigned(draw & 31) | 1, shift = unsigned(draw >> 8) & 31;
  for (unsigned i = 0; i < kSimdWidth; i++) {
    unsigned lane = (i * step + shift) & 31;
    if (lanes >> lane & 1) push(first + lane);
  }
}

// ---- fibers -------------------------------------------------------------------------------------------------------

Fiber* Scheduler::take_fiber() {
  if (Fiber* fiber = pool_) {
    pool_ = fiber->next;
    return fiber;
  }
  Fiber* fiber = new Fiber{};
  if (!fiber->create(enter_fiber, fibers_made_++)) {
    fail("no memory for another thread's stack");
  }
  return fiber;
}

const Fiber* Scheduler::running_fiber() const { return current ? static_cast<const ThreadState*>(current)->fiber : nullptr; }

// Hands over to the next ready thread. `from` is the fiber that stops here; a finished one takes a thread that hasn't
// begun yet without any switch, and goes back to the pool otherwise.
void Scheduler::next(Fiber* from, bool finished) {
  if (head_ == tail_ && live_) unstall();
  void** save = from ? &from->sp : &host_sp_;
  if (head_ == tail_) {                                       // all threads have ended
    from->next = pool_, pool_ = from;
    rt_switch(save, host_sp_);
    return;
  }
  ThreadState& thread = threads_[ready_[head_++ & (kMaxThreads - 1)]];
  current = &thread;
  if (thread.fiber && thread.fiber == from) return;
  if (!thread.fiber) {
    if (finished) {
      thread.fiber = from;
      return;
    }
    thread.fiber = take_fiber();
  } else if (finished) {
    from->next = pool_, pool_ = from;
  }
  rt_switch(save, thread.fiber->sp);
}

void Scheduler::fiber_main() {
  for (;;) {
    ThreadState& thread = running();
    launch_->kernel->invoke(addresses_, thread);
    Fiber* fiber = thread.fiber;
    exited();
    next(fiber, true);
  }
}

void Scheduler::exited() {
  ThreadState& thread = running();
  thread.exited = true;
  thread.fiber = nullptr;
  live_--;
  exited_++;
  Simdgroup& simdgroup = simdgroups_[thread.simdgroup];
  simdgroup.live &= ~(1u << thread.lane);
  if (simdgroup.waiting && simdgroup.waiting == simdgroup.live) complete(thread.simdgroup);
  if (arrived_ && arrived_ == live_) release_barrier();
}

// ---- threadgroup barriers -----------------------------------------------------------------------------------------

static void describe(Fault& what, const ThreadState& thread, bool other) {
  (other ? what.other_thread : what.thread) = int32_t(thread.thread_index);
  if (thread.exited || !thread.fiber) return;
  uint64_t* pcs = other ? what.other_pcs : what.pcs;
  if (&thread == current) {                                   // not switched out: walk from here
    backtrace(__builtin_frame_address(0), pcs, kFrames);
    return;
  }
  pcs[0] = thread.fiber->resumes_at();
  backtrace(thread.fiber->frame(), pcs + 1, kFrames - 1);
}

__attribute__((noinline)) void Scheduler::barrier_slowly() {
  Fiber* fiber = running().fiber;
  if (arrived_ == live_) release_barrier();
  next(fiber, false);
}

// Usually the next thread in the queue is switched to right here, without a frame of its own and by a jump: a return
// would be predicted to come from the barrier that this thread has called, and it goes on behind the last one.
inline __attribute__((always_inline)) void Scheduler::barrier(unsigned flags, uint64_t site) {
  ThreadState& thread = running();
  thread.wait = Wait::barrier;
  thread.flags = flags;
  barrier_sites_[thread.thread_index] = site;
  if (!arrived_) first_site_ = site, other_sites_ = 0;
  other_sites_ |= site ^ first_site_;
  if (__builtin_expect(++arrived_ != live_ && head_ != tail_, 1)) {
    ThreadState& then = threads_[ready_[head_ & (kMaxThreads - 1)]];
    if (Fiber* to = then.fiber) {
      head_++;
      current = &then;
      return rt_switch(&thread.fiber->sp, to->sp);
    }
  }
  barrier_slowly();
}

void threadgroup_barrier(unsigned flags) {
  scheduler->barrier(flags, reinterpret_cast<uint64_t>(__builtin_return_address(0)));
}

void Scheduler::release_barrier() {
  counts.barriers++;
  bool look = other_sites_ != 0;
#ifdef ASSAY_CHECKED
  look = true;
#endif
  if (look) look_at_barrier();
  arrived_ = 0;
  if (launch_->seeded) {
    for (uint32_t i = 0; i < info_.thread_count; i++) threads_[i].wait = Wait::none;
    unsigned count = info_.simdgroup_count, start = unsigned(random() % count);
    for (unsigned s = 0; s < count; s++) push_lanes((start + s) % count, simdgroups_[(start + s) % count].live);
    return;
  }
  for (uint32_t i = 0; i < info_.thread_count; i++) {
    threads_[i].wait = Wait::none;
    if (!threads_[i].exited) push(i);
  }
}

// Who came to the barrier, and from where: divergence, and in checked mode which memory it orders.
void Scheduler::look_at_barrier() {
  ThreadState* first = nullptr;
  ThreadState* different = nullptr;
  [[maybe_unused]] unsigned flags = ~0u;
  for (uint32_t i = 0; i < info_.thread_count; i++) {
    ThreadState& thread = threads_[i];
    if (thread.wait != Wait::barrier) continue;
    if (!first) first = &thread;
    if (!different && barrier_sites_[i] != barrier_sites_[first->thread_index]) different = &thread;
    flags &= thread.flags;
  }
#ifdef ASSAY_CHECKED
  if (!different && exited_)
    for (uint32_t i = 0; i < info_.thread_count && !different; i++)
      if (threads_[i].exited) different = &threads_[i];
#endif
  if (different) {
    Fault what = fault(kind_barrier_divergence);
    what.threadgroup = int32_t(info_.linear_threadgroup);
    describe(what, *first, false);
    describe(what, *different, true);
    record(what);
  }
#ifdef ASSAY_CHECKED
  check::barrier(flags);
#endif
}

// ---- simdgroup exchanges ------------------------------------------------------------------------------------------

void Scheduler::exchange(const void* value, unsigned size, unsigned op, unsigned flags, uint64_t site) {
  ThreadState& thread = running();
  Simdgroup& simdgroup = simdgroups_[thread.simdgroup];
  unsigned lane = thread.lane;
  simdgroup.uniform = !simdgroup.waiting || (simdgroup.uniform && simdgroup.sites[__builtin_ctz(simdgroup.waiting)] == site);
  simdgroup.sites[lane] = site;
  simdgroup.values[lane] = value;
  simdgroup.sizes[lane] = size;
  simdgroup.ops[lane] = uint8_t(op);
  simdgroup.flags[lane] = uint8_t(flags);
  simdgroup.waiting |= 1u << lane;
  thread.wait = Wait::exchange;
  Fiber* fiber = thread.fiber;
  if (simdgroup.waiting == simdgroup.live) complete(thread.simdgroup);
  next(fiber, false);
}

// Completes the exchange of all that wait at one site. Of several sites the lowest address goes first, so that lanes in
// a loop run it to its end before those that wait behind it (minimal-PC reconvergence: Collange, HAL-00622654).
void Scheduler::complete(unsigned index) {
  Simdgroup& simdgroup = simdgroups_[index];
  uint32_t group = simdgroup.waiting;
  if (!simdgroup.uniform) {
    uint64_t lowest = UINT64_MAX;
    for (uint32_t left = simdgroup.waiting; left; left &= left - 1) {
      uint64_t site = simdgroup.sites[__builtin_ctz(left)];
      if (site < lowest) lowest = site;
    }
    for (uint32_t left = simdgroup.waiting; left; left &= left - 1) {
      unsigned lane = unsigned(__builtin_ctz(left));
      if (simdgroup.sites[lane] != lowest) group &= ~(1u << lane);
    }
  }
  check_participation(simdgroup, index, group);
  [[maybe_unused]] unsigned flags = ~0u;
  [[maybe_unused]] bool barrier = false;
  for (uint32_t left = group; left; left &= left - 1) {
    unsigned lane = unsigned(__builtin_ctz(left));
    unsigned char* to = simdgroup.data + lane * kDepositBytes;
    switch (simdgroup.sizes[lane]) {                          // constant sizes become one move
      case 4: memcpy(to, simdgroup.values[lane], 4); break;
      case 2: memcpy(to, simdgroup.values[lane], 2); break;
      case 8: memcpy(to, simdgroup.values[lane], 8); break;
      default: memcpy(to, simdgroup.values[lane], simdgroup.sizes[lane]);
    }
    flags &= simdgroup.flags[lane];
    barrier |= simdgroup.ops[lane] == op_simdgroup_barrier;
    threads_[index * kSimdWidth + lane].wait = Wait::none;
  }
#ifdef ASSAY_CHECKED
  if (barrier) check::simd_barrier(index, flags);
#endif
  simdgroup.lanes = {group, simdgroup.data, simdgroup.result, &simdgroup.known};
  simdgroup.known = false;
  simdgroup.waiting &= ~group;
  simdgroup.uniform = true;                                   // of those left: looked at again when the next one arrives
  if (simdgroup.waiting)
    for (uint32_t left = simdgroup.waiting; left; left &= left - 1)
      simdgroup.uniform &= simdgroup.sites[__builtin_ctz(left)] == simdgroup.sites[__builtin_ctz(simdgroup.waiting)];
  push_lanes(index, group);
}

// An operation that needs every lane, short of some: undefined in Metal, so reported.
void Scheduler::check_participation(const Simdgroup& simdgroup, unsigned index, uint32_t group) {
  uint32_t lanes = least(kSimdWidth, info_.thread_count - index * kSimdWidth);
  uint32_t all = lanes == 32 ? 0xFFFFFFFFu : (1u << lanes) - 1;
  if (group == all) return;
  unsigned lane = unsigned(__builtin_ctz(group)), missing = unsigned(__builtin_ctz(all & ~group));
  if (simdgroup.ops[lane] < op_simdgroup_barrier) return;
  Fault what = fault(kind_simdgroup_divergence);
  what.threadgroup = int32_t(info_.linear_threadgroup);
  what.op = simdgroup.ops[lane];
  describe(what, threads_[index * kSimdWidth + lane], false);
  describe(what, threads_[index * kSimdWidth + missing], true);
  record(what);
}

// Nothing can run, and some threads live: a simdgroup has lanes at an exchange and others at a threadgroup barrier.
void Scheduler::unstall() {
  for (unsigned s = 0; s < info_.simdgroup_count; s++)
    if (simdgroups_[s].waiting) complete(s);
}

}  // namespace rt
