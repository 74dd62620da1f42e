// What kernels call: thin functions over the host thread's scheduler, the table of kernels, and the record of faults.
#include "runtime.h"

#include <limits.h>
#include <string.h>
#include <unistd.h>

#include "scheduler.h"

namespace rt {

void* threadgroup_local(const Site& site, size_t size, size_t align, LayoutOf layout) {
  return scheduler->local(site, size, align, layout);
}

void count_matrix_op() { scheduler->counts.matrix_ops++; }

void inactive_lane_read(unsigned op, unsigned lane) {
  Fault what = fault(kind_simdgroup_divergence);
  what.op = int32_t(op);
  what.other_thread = int32_t(self().simdgroup * kSimdWidth + lane);
  backtrace(__builtin_frame_address(0), what.pcs, kFrames);
  record(what);
}

// ---- faults -------------------------------------------------------------------------------------------------------

static Control* recording = nullptr;
static uintptr_t module_base = 0, module_end = 0;
static int record_lock = 0;

void begin_recording(Control* control) {
  recording = control;
  control->fault_count = 0;
}

void set_modules(uintptr_t base, uintptr_t end) { module_base = base, module_end = end; }

Fault fault(Kind kind) {
  Fault what;
  memset(&what, 0, sizeof what);
  what.kind = kind;
  what.space = space_none;
  what.buffer = INT32_MIN;
  what.op = what.thread = what.other_thread = what.threadgroup = what.other_threadgroup = -1;
  if (line.current) {
    what.thread = int32_t(line.current->thread_index);
    what.threadgroup = int32_t(line.current->group->linear_threadgroup);
  }
  return what;
}

// Keeps the addresses that lie in the kernel's own module, relative to its start.
static void relative(uint64_t* pcs) {
  unsigned kept = 0;
  for (unsigned i = 0; i < kFrames && pcs[i]; i++)
    if (pcs[i] >= module_base && pcs[i] < module_end) pcs[kept++] = pcs[i] - module_base;
  for (; kept < kFrames; kept++) pcs[kept] = 0;
}

bool record_unlocked(const Fault& given) {
  Control& control = *recording;
  if (control.fault_count >= kMostFaults) return false;
  Fault what = given;
  relative(what.pcs);
  relative(what.other_pcs);
  for (unsigned i = 0; i < control.fault_count; i++) {
    const Fault& kept = control.faults[i];
    if (kept.kind == what.kind && kept.buffer == what.buffer && kept.pcs[0] == what.pcs[0] && kept.pcs[1] == what.pcs[1] &&
        kept.other_pcs[0] == what.other_pcs[0] && what.kind != kind_crash)
      return false;
  }
  control.faults[control.fault_count] = what;
  control.fault_count++;
  return true;
}

void record(const Fault& what) {
  while (__atomic_exchange_n(&record_lock, 1, __ATOMIC_ACQUIRE)) {}
  record_unlocked(what);
  __atomic_store_n(&record_lock, 0, __ATOMIC_RELEASE);
}

void fail(const char* message) {
  Fault what = fault(kind_crash);
  backtrace(__builtin_frame_address(0), what.pcs, kFrames);
  strncpy(what.message, message, sizeof what.message - 1);
  record(what);
  _exit(70);
}

unsigned backtrace(const void* frame, uint64_t* pcs, unsigned most) {
  // Frames only ever lie higher, within one stack's size.
  uintptr_t at = reinterpret_cast<uintptr_t>(frame);
  uintptr_t limit = at + kStackBytes;
  unsigned count = 0;
  while (count < most && at && (at & 7) == 0 && at < limit) {
    const uint64_t* slots = reinterpret_cast<const uint64_t*>(at);
    uint64_t pc = slots[1];
    if (!pc) break;
    if (pc >= module_base && pc < module_end) pcs[count++] = pc;
    if (slots[0] <= at) break;
    at = slots[0];
  }
  return count;
}

// ---- kernels ------------------------------------------------------------------------------------------------------

Vec3 builtin_value(Builtin builtin, const Thread& thread) {
  const GroupInfo& group = *thread.group;
  Vec3 at = thread.position, dispatch = group.dispatch_threads;
  uint32_t nominal = dispatch.x * dispatch.y * dispatch.z;
  auto scalar = [](uint32_t value) { return Vec3{value, 1, 1}; };
  switch (builtin) {
    case thread_position_in_grid:
      return {group.threadgroup.x * dispatch.x + at.x, group.threadgroup.y * dispatch.y + at.y, group.threadgroup.z * dispatch.z + at.z};
    case thread_position_in_threadgroup: return at;
    case thread_index_in_threadgroup: return scalar(thread.thread_index);
    case thread_index_in_simdgroup: return scalar(thread.lane);
    case thread_index_in_quadgroup: return scalar(thread.lane % 4);
    case threadgroup_position_in_grid: return group.threadgroup;
    case threadgroups_per_grid: return group.threadgroups;
    case threads_per_grid:
    case grid_size: return group.grid;
    case threads_per_threadgroup: return group.threads;
    case dispatch_threads_per_threadgroup: return dispatch;
    case threads_per_simdgroup: return scalar(kSimdWidth);
    case simdgroup_index_in_threadgroup: return scalar(thread.simdgroup);
    case simdgroups_per_threadgroup: return scalar(group.simdgroup_count);
    case dispatch_simdgroups_per_threadgroup: return scalar((nominal + kSimdWidth - 1) / kSimdWidth);
    case quadgroup_index_in_threadgroup: return scalar(thread.thread_index / 4);
    case quadgroups_per_threadgroup: return scalar((group.thread_count + 3) / 4);
    case dispatch_quadgroups_per_threadgroup: return scalar((nominal + 3) / 4);
    case grid_origin:
    case no_builtin: break;
  }
  return {0, 0, 0};
}

}  // namespace rt
