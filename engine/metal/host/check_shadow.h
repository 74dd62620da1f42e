// The checkers' own state: what a shadow cell holds and how a later access compares with it.
//
// Every checked byte has three 32-bit cells: its last writer (w) and up to two readers since the last fence (r, s). A
// cell is a stamp of the clock, a thread and three flags; all bits zero is "never touched", which on device memory means
// "as the host left it", so that the shadow of a large input costs nothing until it is used. Three places (pw, pr, ps) for
// each four bytes say where those accesses were, for the report alone.
//
// An earlier access is ordered before this one if its stamp lies before a fence that both sides passed: the threadgroup's
// last barrier for that address space, or for lanes of one simdgroup their own last barrier. These are thresholds on the
// stamp, so that no vector clocks are needed: barriers in Metal are collective. A threadgroup's barrier of any flags, even
// mem_none, orders earlier reads before later writes: a thread that has passed it has what it read.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "check.h"
#include "runtime.h"

namespace check {

#define CALLBACK extern "C" RT_EXPORT
#define FRAME __builtin_frame_address(0)

using Cell = uint32_t;

constexpr Cell kThread = 0x3FF;          // linear index in the threadgroup: at most 1,024 threads
constexpr Cell kAtomic = 1u << 10;       // the access was atomic
constexpr Cell kMany = 1u << 11;         // w: several threads of the group wrote the same value; r: s holds a second reader
constexpr unsigned kStampShift = 12;     // 19 bits
constexpr Cell kStamp = 0x7FFFFu << kStampShift;
constexpr Cell kFar = 1u << 31;          // w: other threadgroups wrote too; r: s is of another simdgroup or threadgroup
constexpr Cell kTick = 1u << kStampShift;
constexpr Cell kLastStamp = kStamp - 64 * kTick;  // renumber before stamps run into the two values below
constexpr Cell kGap = 0xFFFFFFFF;        // w: outside every region
constexpr Cell kUnwritten = 0xFFFFFFFE;  // w: device memory that nobody has initialised
constexpr unsigned kSimdgroups = rt::kMaxThreads / rt::kSimdWidth;
constexpr unsigned kPageShift = 12;
constexpr size_t kMargin = 64;           // bytes of gap marked around a region: the widest single access is 16

// What an untouched cell of a page means, where that does not depend on the byte: outside all buffers; never to be
// written, as the host left it; writable and not initialised. Mixed pages say it byte by byte, zero is initialised.
enum Page : uint8_t { page_gap, page_input, page_constant, page_output, page_mixed };

// One contiguous range of addresses with its shadow.
struct Window {
  uintptr_t base;
  size_t span;
  Cell* w;
  Cell* r;
  Cell* s;
  uint32_t* pw;
  uint32_t* pr;
  uint32_t* ps;
  uint8_t* pages;              // device only
  Cell start;                  // stamp at which the running threadgroup began
  Cell fence;                  // stamp of the last barrier that fenced this memory: everything before is ordered
  Cell met;                    // stamp of the last barrier of any flags: what was read before is ordered; never below fence
  Cell lane_fence[kSimdgroups];
  size_t capacity;             // bytes of address range that the mapping can shadow; most of its pages are never touched
};

struct State {
  Window threadgroup, device;
  Cell now;
  uint32_t launch;  // counts launches
  bool fenced;      // the running threadgroup has had a fence for the whole device
  Stats counts;
  Access elsewhere;  // the last access to neither window
};
extern State state;

inline void note_elsewhere(uintptr_t address, size_t size, unsigned access) {
  state.elsewhere = {address, static_cast<unsigned>(size), access & 3};
}

enum Kinds : unsigned { reads = 1, writes = 2, atomic = 4, bulk = 8 };  // bulk: a copy, which may hold padding

enum class Wrong : uint8_t { no, outside, unwritten, race, same_value };

struct Judgement {
  Wrong wrong = Wrong::no;
  Cell culprit = 0;          // 0: not known
  bool by_read = false;      // the culprit read
  bool second = false;       // and is the second of two readers
  bool by_atomic = false;    // an unknown culprit did something atomic
};

// Of one access: the first byte that is wrong, outside before all else, and a bit per byte that may be a race.
struct Found {
  Judgement judgement;
  unsigned byte = 0, same_value = 0;
  uint32_t other_pc = 0;  // the low half of where the culprit was
};

// Judges up to 16 bytes and updates their cells. `low_pc`: the low half of the caller's address, kept for the report.
Found judge_bytes(Window& window, size_t offset, unsigned size, unsigned access, uint32_t low_pc);

// Forgets what stamps that are renumbered would confuse.
void forget_earlier();

inline bool in(const Window& window, uintptr_t address, size_t& offset) {
  offset = address - window.base;
  return offset < window.span;
}
inline Window* window_of(uintptr_t address) {
  size_t offset;
  if (in(state.threadgroup, address, offset)) return &state.threadgroup;
  return in(state.device, address, offset) ? &state.device : nullptr;
}

// Full judgement of one access of up to 16 bytes at `offset`; reports and updates the shadow. `frame` is the frame whose
// return address lies in the kernel.
void judge(Window& window, size_t offset, unsigned size, unsigned access, const void* frame);
// A second write of a byte in one epoch is only a race if it changes the value, which is known when it has been done.
void settle();
void forget_pending();
// Reports a bulk copy's reading of bytes that nobody wrote.
void judge_unwritten(Window& window, size_t offset, unsigned size, const void* frame);
bool written(const Window& window, size_t offset);

struct Place {
  Region region;
  int64_t offset;
};
Place nearest_region(const Window& window, uintptr_t address);
int32_t threadgroup_of(Cell cell);  // -1: no longer known

// Metal orders threadgroups only through an atomic between two fences (atomic_thread_fence). The atomic is taken for
// granted: what an earlier threadgroup did before its fence is ordered before what this one does after its own.
bool handed_over(Cell cell);
void device_fence();

// Who the other party of a race is, as far as the shadow knows.
struct Other {
  bool known, read, atomic, same_threadgroup;
};
// Fills the fault's message: one line, without the place in the source, which only Python knows.
void word(rt::Fault& fault, const Region& region, unsigned access, const Other& other, const rt::GroupInfo& group);
void misaligned(uintptr_t address, unsigned size, const void* frame);

}  // namespace check
