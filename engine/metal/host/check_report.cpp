// The slow path: has an access judged and makes faults of what is wrong, each place once.

#include <cstring>

#include "check_shadow.h"

namespace check {
namespace {

uintptr_t return_address(const void* frame) { return static_cast<const uintptr_t*>(frame)[1]; }

// rt::record keeps one fault of a kind; this keeps a hot loop from walking the stack for each of its repetitions.
bool seen_before(rt::Kind kind, uintptr_t pc, int32_t buffer) {
  struct Key {
    uintptr_t pc;
    uint32_t kind;
    int32_t buffer;
    uint32_t launch;
  };
  static Key seen[256];
  Key& key = seen[(pc ^ pc >> 8 ^ static_cast<uintptr_t>(kind) * 97) % 256];
  if (key.pc == pc && key.kind == kind && key.buffer == buffer && key.launch == state.launch) return true;
  key = {pc, kind, buffer, state.launch};
  return false;
}

void place(rt::Fault& fault, const Place& where, unsigned size) {
  fault.space = static_cast<uint32_t>(where.region.space);
  fault.buffer = where.region.buffer;
  fault.offset = where.offset;
  fault.size = size;
  fault.bound = static_cast<int64_t>(where.region.size);
}

// The two places are in one module, so the low halves of their addresses are enough.
uintptr_t full_pc(uint32_t low, uintptr_t near) {
  return near + static_cast<uintptr_t>(static_cast<intptr_t>(static_cast<int32_t>(low - static_cast<uint32_t>(near))));
}

Other name_other(rt::Fault& fault, const Window& window, const Found& found, uintptr_t pc) {
  const Judgement& judgement = found.judgement;
  Cell culprit = judgement.culprit;
  Other other{culprit != 0, judgement.by_read, judgement.by_atomic || (culprit & kAtomic), (culprit & kStamp) >= window.start};
  if (!culprit) return other;
  fault.other_thread = static_cast<int32_t>(culprit & kThread);
  fault.other_threadgroup = threadgroup_of(culprit);
  if (found.other_pc) fault.other_pcs[0] = full_pc(found.other_pc, pc);
  return other;
}

rt::Kind kind_of(Wrong wrong, unsigned access) {
  if (wrong == Wrong::unwritten) return rt::kind_uninitialised_read;
  if (wrong != Wrong::outside) return rt::kind_race;
  return access & writes ? rt::kind_out_of_bounds_write : rt::kind_out_of_bounds_read;
}

// A second write of a byte without a fence in between is only a race if it changes the value, which is known once the
// store that follows the callback has been done: at the next slow access, barrier or end.
struct Pending {
  bool waiting;
  uintptr_t address;
  unsigned bytes;  // bit per byte that another thread wrote
  unsigned char old[16];
  rt::Fault fault;  // words are put in when it turns out to be one
  Region region;
  unsigned access;
  Other other;
  const rt::GroupInfo* group;
};
Pending pending;

struct Described {
  rt::Fault fault;
  Other other;
};
Described describe(const Window& window, unsigned size, unsigned access, const Found& found, const Place& where,
                   const void* frame) {
  Described all{rt::fault(kind_of(found.judgement.wrong, access)), {}};
  place(all.fault, where, size);
  rt::backtrace(frame, all.fault.pcs, rt::kFrames);
  if (all.fault.kind == rt::kind_race) all.other = name_other(all.fault, window, found, return_address(frame));
  return all;
}

// The nearest region counts from the first byte that is outside, the offset from the first byte accessed.
Place locate(const Window& window, size_t offset, unsigned byte) {
  Place where = nearest_region(window, window.base + offset + byte);
  where.offset -= byte;
  return where;
}

void wait(const Described& described, const Place& where, unsigned access, uintptr_t address, unsigned size, unsigned bytes) {
  pending.waiting = true;
  pending.address = address;
  pending.bytes = bytes;
  pending.fault = described.fault;
  pending.region = where.region;
  pending.access = access;
  pending.other = described.other;
  pending.group = rt::self().group;
  std::memcpy(pending.old, reinterpret_cast<const void*>(address), size);
}

}  // namespace

void forget_pending() { pending.waiting = false; }

void settle() {
  if (!pending.waiting) return;
  pending.waiting = false;
  const unsigned char* now = reinterpret_cast<const unsigned char*>(pending.address);
  for (unsigned i = 0; i < 16; i++) {
    if (!((pending.bytes >> i) & 1) || now[i] == pending.old[i]) continue;
    rt::Fault& fault = pending.fault;
    if (seen_before(rt::kind_race, fault.pcs[0], fault.buffer)) return;
    word(fault, pending.region, pending.access, pending.other, *pending.group);
    return rt::record(fault);
  }
}

void judge(Window& window, size_t offset, unsigned size, unsigned access, const void* frame) {
  settle();
  const rt::Thread& self = rt::self();
  uintptr_t pc = return_address(frame);
  Found found = judge_bytes(window, offset, size, access, static_cast<uint32_t>(pc));
  uint8_t page = &window == &state.device ? window.pages[offset >> kPageShift] : page_mixed;
  bool constant = (access & writes) && (page == page_input || page == page_constant);
  if (constant) found.judgement = {Wrong::outside};
  if (found.judgement.wrong == Wrong::no) return;
  Place where = locate(window, offset, found.byte);
  bool deferred = found.judgement.wrong == Wrong::same_value;
  rt::Kind kind = kind_of(found.judgement.wrong, access);
  if (!deferred && seen_before(kind, pc, where.region.buffer)) return;
  Described described = describe(window, size, access, found, where, frame);
  if (deferred) return wait(described, where, access, window.base + offset, size, found.same_value);
  word(described.fault, where.region, access, described.other, *self.group);
  rt::record(described.fault);
}

void judge_unwritten(Window& window, size_t offset, unsigned size, const void* frame) {
  Place where = nearest_region(window, window.base + offset);
  if (seen_before(rt::kind_uninitialised_read, return_address(frame), where.region.buffer)) return;
  Found found;
  found.judgement.wrong = Wrong::unwritten;
  Described described = describe(window, size, reads, found, where, frame);
  word(described.fault, where.region, reads, described.other, *rt::self().group);
  rt::record(described.fault);
}

void misaligned(uintptr_t address, unsigned alignment, const void* frame) {
  Window* window = window_of(address);
  if (!window) return;
  static uintptr_t last;  // one expression checks the same address several times
  static uint32_t launch;
  if (address == last && launch == state.launch) return;
  last = address, launch = state.launch;
  Place where = nearest_region(*window, address);
  if (seen_before(rt::kind_misaligned, return_address(frame), where.region.buffer)) return;
  rt::Fault fault = rt::fault(rt::kind_misaligned);
  place(fault, where, alignment);
  rt::backtrace(frame, fault.pcs, rt::kFrames);
  word(fault, where.region, reads, {}, *rt::self().group);
  rt::record(fault);
}

}  // namespace check
