// The scheduler of one threadgroup. A thread runs until it waits or ends; then the next one in line runs. The host thread
// has turns of its own: it begins threads, and when nobody is ready it completes what nobody else can any more. Lanes of
// a simdgroup that diverged proceed in the order of their turns of loops and of their call sites, which brings them
// together again where their paths meet, and a threadgroup barrier needs live threads only. Both are reported where Metal
// leaves them undefined.
#include "scheduler.h"

#include <string.h>

#ifdef ASSAY_CHECKED
#include "check.h"
#endif

namespace rt {

__attribute__((tls_model("initial-exec"))) __thread Line line = {};
__attribute__((tls_model("initial-exec"))) __thread Scheduler* scheduler = nullptr;

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
  for (Thread*& place : line.ready) place = &host_;
  arena_next_ = arena_;
  region_count_ = used_bytes_ = 0;
  info_ = {};
  memcpy(addresses_, launch.addresses, sizeof addresses_);
  for (unsigned i = 0; i < launch.kernel->count; i++) {
    const Parameter& parameter = launch.kernel->parameters[i];
    if (parameter.kind != param_threadgroup) continue;
    LayoutOf layout = launch.kernel->infos[i].layout;
    addresses_[i] = allocate(parameter.index, launch.threadgroup_memory[parameter.index], 64, nullptr, layout).base;
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
    Thread& thread = threads_[i];
    thread.thread_index = i;
    thread.lane = i % kSimdWidth;
    thread.simdgroup = i / kSimdWidth;
    thread.lanes = &simdgroups_[i / kSimdWidth].lanes;
    thread.position = {i % threads.x, i / threads.x % threads.y, i / (threads.x * threads.y)};
    thread.group = &info_;
  }
}

static uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

uint32_t Scheduler::lanes_of(unsigned simdgroup) const {
  uint32_t lanes = least(kSimdWidth, info_.thread_count - simdgroup * kSimdWidth);
  return lanes == 32 ? 0xFFFFFFFFu : (1u << lanes) - 1;
}

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
  host_turns();
#ifdef ASSAY_CHECKED
  for (unsigned s = 0; s < info_.simdgroup_count; s++) compare_matrix_ops(s);
#endif
  counts.threadgroups++;
  check_canaries();
}

void Scheduler::start_order() {
  uint32_t count = info_.thread_count;
  live_ = count;
  started_ = 0;
  random_ = launch_->seed * 0xD1342543DE82EF95u + info_.linear_threadgroup;
  for (unsigned s = 0; s < info_.simdgroup_count; s++) {
    simdgroups_[s].live = lanes_of(s);
    simdgroups_[s].waiting = simdgroups_[s].counting = 0;
  }
  uint16_t order[kMaxThreads / kSimdWidth];
  for (unsigned s = 0; s < info_.simdgroup_count; s++) order[s] = uint16_t(s);
  if (launch_->seeded)
    for (unsigned s = info_.simdgroup_count; s > 1; s--) {
      unsigned other = unsigned(random() % s);
      uint16_t kept = order[s - 1];
      order[s - 1] = order[other], order[other] = kept;
    }
  line.head = line.tail = 0;
  for (unsigned s = 0; s < info_.simdgroup_count; s++) push_lanes(order[s], simdgroups_[order[s]].live);
  for (uint32_t i = 0; i < count; i++) {
    order_[i] = uint16_t(line.ready[i]->thread_index);
    line.ready[i] = &host_;                                   // which gives a thread its fiber
  }
}

// Makes lanes ready: in order, or in an order drawn from the seed (an affine map of the lanes: cheap, and it reverses,
// rotates and scatters them).
void Scheduler::push_lanes(unsigned simdgroup, uint32_t lanes) {
  uint32_t first = simdgroup * kSimdWidth;
  if (!launch_->seeded) {
    for (; lanes; lanes &= lanes - 1) push(threads_[first + unsigned(__builtin_ctz(lanes))]);
    return;
  }
  uint64_t draw = random();
  unsigned step = unsigned(draw & 31) | 1, shift = unsigned(draw >> 8) & 31;
  for (unsigned i = 0; i < kSimdWidth; i++) {
    unsigned lane = (i * step + shift) & 31;
    if (lanes >> lane & 1) push(threads_[first + lane]);
  }
}

// ---- fibers -------------------------------------------------------------------------------------------------------

Fiber* Scheduler::take_fiber() {
  if (Fiber* fiber = pool_) {
    pool_ = fiber->next;
    return fiber;
  }
  Fiber* fiber = new Fiber{};
  if (!fiber->create(fibers_made_++)) {
    fail("no memory for another thread's stack");
  }
  return fiber;
}

const Fiber* Scheduler::running_fiber() const {
  return line.current && line.current != &host_ ? fibers_[line.current->thread_index] : nullptr;
}

Thread& Scheduler::begin(Fiber* fiber) {
  Thread& thread = threads_[order_[started_++]];
  fibers_[thread.thread_index] = fiber;
  loops_[thread.thread_index] = nullptr;
  line.current = &thread;
  return thread;
}

// The host thread's turns come where a thread hasn't begun yet, and when nobody is ready.
void Scheduler::host_turns() {
  next_turn();                                                // it stands first in line
  while (live_) {
    line.current = nullptr;
    if (started_ < info_.thread_count) {
      Fiber* fiber = take_fiber();
      begin(fiber).context = fiber->begin(enter_fiber);
    } else {
      line.head = line.tail;                                  // its turn came behind the last
      any_lane_waits() ? unstall() : release_barrier();
      next_turn();
    }
    switch_context(&host_.context, &line.current->context);
  }
  line.current = nullptr;
}

// A fiber whose thread has ended takes one that hasn't begun, without any switch, and goes back to the pool otherwise.
void Scheduler::fiber_main() {
  for (;;) {
    Thread& thread = *line.current;
    launch_->kernel->invoke(addresses_, thread);
    Fiber* fiber = fibers_[thread.thread_index];
    exited(thread);
    Turn turn = next_turn();
    if (turn.to == &host_ && started_ < info_.thread_count) {
      begin(fiber);
      continue;
    }
    fiber->next = pool_, pool_ = fiber;
    take(turn);
  }
}

void Scheduler::exited(const Thread& thread) {
  fibers_[thread.thread_index] = nullptr;
  live_--;
  Simdgroup& simdgroup = simdgroups_[thread.simdgroup];
  simdgroup.live &= ~(1u << thread.lane);
  if (simdgroup.waiting && simdgroup.waiting == simdgroup.live) complete(thread.simdgroup);
}

// ---- threadgroup barriers -----------------------------------------------------------------------------------------

void Scheduler::describe(Fault& what, const Thread& thread, bool other) const {
  (other ? what.other_thread : what.thread) = int32_t(thread.thread_index);
  if (!fibers_[thread.thread_index]) return;
  uint64_t* pcs = other ? what.other_pcs : what.pcs;
  if (&thread == line.current) {                              // not switched out: walk from here
    backtrace(__builtin_frame_address(0), pcs, kFrames);
    return;
  }
  pcs[0] = reinterpret_cast<uint64_t>(thread.context.pc);
  backtrace(thread.context.fp, pcs + 1, kFrames - 1);
}

void Scheduler::describe_waiting(Fault& what) const {
  const Thread* thread = line.current && line.current != &host_ ? line.current : nullptr;
  for (uint32_t i = 0; i < started_ && !thread; i++)
    if (fibers_[order_[i]]) thread = &threads_[order_[i]];
  if (!thread || !fibers_[thread->thread_index] || !thread->context.pc) return;
  what.thread = int32_t(thread->thread_index);
  what.threadgroup = int32_t(info_.linear_threadgroup);
  what.pcs[0] = reinterpret_cast<uint64_t>(thread->context.pc);
  what.pcs[1 + backtrace(thread->context.fp, what.pcs + 1, kFrames - 2)] = 0;
}

Turn arrive_at_barrier(unsigned flags) {
  scheduler->note_barrier(flags);
  return next_turn();
}

// The running thread goes behind all others that are ready.
Turn Scheduler::step() {
  if (launch_->seeded) return {line.current, line.current};
  push(*line.current);
  return next_turn();
}

Turn arrive_in_step() { return scheduler->step(); }

bool Scheduler::any_lane_waits() const {
  uint32_t waiting = 0;
  for (unsigned s = 0; s < info_.simdgroup_count; s++) waiting |= simdgroups_[s].waiting;
  return waiting != 0;
}

// Nobody is ready and no lane waits for others: all that live are at a threadgroup barrier.
void Scheduler::release_barrier() {
  counts.barriers++;
  bool look = sites_differ();
#ifdef ASSAY_CHECKED
  look = true;
#endif
  if (look) look_at_barrier();
  line.head = line.tail = 0;
  unsigned count = info_.simdgroup_count, start = 0;
  if (launch_->seeded) {
    start = unsigned(random() % count);
  } else if (live_ == info_.thread_count) {
    if (!in_order_)
      for (uint32_t i = 0; i < live_; i++) push(threads_[i]);
    line.tail = live_;
    in_order_ = true;
    return;
  }
  for (unsigned s = 0; s < count; s++) push_lanes((start + s) % count, simdgroups_[(start + s) % count].live);
}

// Whether looking closer may find divergence. Threads that have ended count, so that this loop stays as short as it is:
// it runs for every thread at every barrier.
bool Scheduler::sites_differ() const {
  uintptr_t first = reinterpret_cast<uintptr_t>(threads_[0].context.pc), bits = 0;
  for (uint32_t i = 0; i < info_.thread_count; i++) bits |= reinterpret_cast<uintptr_t>(threads_[i].context.pc) ^ first;
  return bits != 0;
}

// Who came to the barrier, and from where: divergence, and in checked mode which memory it orders.
void Scheduler::look_at_barrier() {
  const Thread* first = nullptr;
  const Thread* different = nullptr;
  [[maybe_unused]] unsigned flags = ~0u;
  for (uint32_t i = 0; i < info_.thread_count; i++) {
    const Thread& thread = threads_[i];
    if (!lives(thread)) continue;
    if (!first) first = &thread;
    if (!different && thread.context.pc != first->context.pc) different = &thread;
#ifdef ASSAY_CHECKED
    flags &= flags_[i];
#endif
  }
#ifdef ASSAY_CHECKED
  if (!different && live_ != info_.thread_count)
    for (uint32_t i = 0; i < info_.thread_count && !different; i++)
      if (!lives(threads_[i])) different = &threads_[i];
#endif
  if (different) {
    Fault what = fault(kind_barrier_divergence);
    what.threadgroup = int32_t(info_.linear_threadgroup);
    describe(what, *first, false);
    describe(what, *different, true);
    record(what);
  }
#ifdef ASSAY_CHECKED
  for (unsigned s = 0; s < info_.simdgroup_count; s++) compare_matrix_ops(s);
  check::barrier(flags);
#endif
}

// ---- simdgroup exchanges ------------------------------------------------------------------------------------------

Turn Scheduler::exchange(const void* value, unsigned size, unsigned op, unsigned flags, uint64_t site) {
  Thread& thread = *line.current;
  Simdgroup& simdgroup = simdgroups_[thread.simdgroup];
  unsigned lane = thread.lane;
  unsigned first = simdgroup.waiting ? unsigned(__builtin_ctz(simdgroup.waiting)) : lane;
  bool joins = simdgroup.uniform && simdgroup.sites[first] == site;
  if (__builtin_expect(simdgroup.counting != 0, 0)) joins = joins && in_step(thread.simdgroup, lane, first);
  simdgroup.uniform = joins || !simdgroup.waiting;
  simdgroup.sites[lane] = site;
  simdgroup.values[lane] = value;
  simdgroup.sizes[lane] = size;
  simdgroup.ops[lane] = uint8_t(op);
  simdgroup.flags[lane] = uint8_t(flags);
  simdgroup.waiting |= 1u << lane;
  if (simdgroup.waiting == simdgroup.live) complete(thread.simdgroup);
  return next_turn();
}

Turn arrive_at_exchange(const void* value, unsigned size, unsigned op, unsigned flags) {
  return scheduler->exchange(value, size, op, flags, reinterpret_cast<uint64_t>(__builtin_return_address(0)));
}

// ---- loops --------------------------------------------------------------------------------------------------------

void enter_loop(Loop& loop) {
  loop.site = reinterpret_cast<uint64_t>(__builtin_return_address(0));
  scheduler->enter(loop);
}

void leave_loop(const Loop& loop) { scheduler->leave(loop); }

void Scheduler::enter(Loop& loop) {
  const Loop*& innermost = loops_[line.current->thread_index];
  loop.outer = innermost, innermost = &loop;
  simdgroups_[line.current->simdgroup].counting += loop.counts;
}

void Scheduler::leave(const Loop& loop) {
  loops_[line.current->thread_index] = loop.outer;
  simdgroups_[line.current->simdgroup].counting -= loop.counts;
}

bool Scheduler::in_step(unsigned index, unsigned lane, unsigned other) const {
  const Loop *a = loops_[index * kSimdWidth + lane], *b = loops_[index * kSimdWidth + other];
  while (a && b && a->site == b->site && a->turn == b->turn) a = a->outer, b = b->outer;
  return !a && !b;
}

bool Scheduler::together(unsigned index, unsigned lane, unsigned other) const {
  return simdgroups_[index].sites[lane] == simdgroups_[index].sites[other] && in_step(index, lane, other);
}

// Which of two lanes goes first: in a loop that both are in the one in the earlier turn, the outermost loop deciding, and
// else the one whose place has the lower address, a loop being where it was entered.
bool Scheduler::before(unsigned index, unsigned lane, unsigned other) const {
  constexpr unsigned kDeepest = 16;
  struct Way {
    unsigned depth = 0;
    const Loop* loops[kDeepest];
    uint64_t site;
    uint64_t place(unsigned level) const { return level < depth ? loops[level]->site : site; }
  };
  auto way = [&](unsigned which) {                            // from the outermost loop inwards; what lies too deep is left out
    Way found;
    const Loop* innermost = loops_[index * kSimdWidth + which];
    for (const Loop* loop = innermost; loop; loop = loop->outer) found.depth++;
    unsigned level = found.depth;
    for (const Loop* loop = innermost; loop; loop = loop->outer)
      if (--level < kDeepest) found.loops[level] = loop;
    if (found.depth > kDeepest) found.depth = kDeepest;
    found.site = simdgroups_[index].sites[which];
    return found;
  };
  Way a = way(lane), b = way(other);
  unsigned level = 0;
  for (; level < a.depth && level < b.depth && a.loops[level]->site == b.loops[level]->site; level++)
    if (a.loops[level]->turn != b.loops[level]->turn) return a.loops[level]->turn < b.loops[level]->turn;
  return a.place(level) < b.place(level);
}

// Completes the exchange of all that wait at one site in one turn. Of several sites the lowest address goes first, so that
// lanes in a loop run it to its end before those that wait behind it (minimal-PC reconvergence: Collange, HAL-00622654).
void Scheduler::complete(unsigned index) {
  Simdgroup& simdgroup = simdgroups_[index];
  uint32_t group = simdgroup.waiting;
  if (!simdgroup.uniform) {
    unsigned first = unsigned(__builtin_ctz(group));
    for (uint32_t left = simdgroup.waiting; left; left &= left - 1)
      if (before(index, unsigned(__builtin_ctz(left)), first)) first = unsigned(__builtin_ctz(left));
    for (uint32_t left = simdgroup.waiting; left; left &= left - 1)
      if (!together(index, unsigned(__builtin_ctz(left)), first)) group &= ~(1u << __builtin_ctz(left));
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
  }
#ifdef ASSAY_CHECKED
  if (group == lanes_of(index)) compare_matrix_ops(index);
  if (barrier) check::simd_barrier(index, flags);
#endif
  simdgroup.lanes = {group, simdgroup.data, simdgroup.result, &simdgroup.known};
  simdgroup.known = false;
  simdgroup.waiting &= ~group;
  simdgroup.uniform = true;                                   // of those left: looked at again when the next one arrives
  if (simdgroup.waiting)
    for (uint32_t left = simdgroup.waiting; left; left &= left - 1)
      simdgroup.uniform &= together(index, unsigned(__builtin_ctz(left)), unsigned(__builtin_ctz(simdgroup.waiting)));
  push_lanes(index, group);
}

// An operation that needs every lane, short of some: undefined in Metal, so reported.
void Scheduler::check_participation(const Simdgroup& simdgroup, unsigned index, uint32_t group) {
  uint32_t all = lanes_of(index);
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
