// The functions that -fsanitize=thread makes a kernel call before a plain load or store, and their fast paths.
//
// Almost every access is to something written before the last barrier and already known to be read in this epoch: one
// vector comparison each for the bytes' writers and readers. Everything else goes to judge(), as a tail call, so that the
// return address and the frame judge() sees are the kernel's. Compile this file with frame pointers and without
// sanitizers.

#include <stddef.h>
#include <stdint.h>

#include "check_shadow.h"

namespace check {
namespace {

#define SLOW __attribute__((noinline, cold))
#define FAST static inline __attribute__((always_inline))
#define HERE reinterpret_cast<uintptr_t>(__builtin_return_address(0))
#define LIKELY(x) __builtin_expect(!!(x), 1)

template <unsigned N>
struct Vector {
  typedef Cell type __attribute__((ext_vector_type(N), aligned(4)));
  typedef int32_t mask __attribute__((ext_vector_type(N)));
};

template <unsigned N>
FAST typename Vector<N>::type load(const Cell* cells) {
  return *reinterpret_cast<const typename Vector<N>::type*>(cells);
}

template <class T>
FAST bool all(T mask) {
  return __builtin_reduce_and(mask) != 0;
}

FAST Cell me() { return state.now | rt::self().thread_index; }

template <unsigned N, unsigned access>
SLOW void slow(void* address) {
  size_t offset;
  Window& window = in(state.threadgroup, reinterpret_cast<uintptr_t>(address), offset) ? state.threadgroup : state.device;
  offset = reinterpret_cast<uintptr_t>(address) - window.base;
  judge(window, offset, N, access, FRAME);
}

// A reader needs no record if this very thread has one of this stamp, or if two are kept that no writer can be ordered
// with both of: of different simdgroups since the last barrier of any flags, or of this one since its own.
template <unsigned N>
FAST auto known_to_all(const Window& window, typename Vector<N>::type r, Cell self) {
  return ((r & ~kMany) == self) | (r >= (window.met | kFar));
}
template <unsigned N>
FAST auto known_to_lanes(const Window& window, typename Vector<N>::type r, Cell self) {
  constexpr Cell simdgroup = kThread & ~(rt::kSimdWidth - 1);
  Cell lanes = window.lane_fence[(self & simdgroup) / rt::kSimdWidth], fence = lanes < window.met ? window.met : lanes;
  return ((r & (simdgroup | kMany | kFar)) == ((self & simdgroup) | kMany)) & (r >= fence);
}

// ---- reads ---------------------------------------------------------------------------------------------------------

template <unsigned N>
FAST auto ordered(const Window& window, bool untouched_is_written, typename Vector<N>::type w) {
  auto before = w - window.start < window.fence - window.start;
  return untouched_is_written ? (w == 0) | before : before;
}
// Written by this thread alone since its threadgroup began.
template <unsigned N>
FAST auto own(const Window& window, typename Vector<N>::type w, Cell self) {
  return ((w & ~kStamp) == (self & kThread)) & (w >= window.start);
}

template <unsigned N>
FAST bool read_is_plain(uintptr_t address) {
  size_t offset;
  Window& group = state.threadgroup;
  if (in(group, address, offset)) {
    state.counts.loads[2]++;
    auto w = load<N>(group.w + offset), r = load<N>(group.r + offset);
    Cell self = me();
    return all(ordered<N>(group, false, w) & (known_to_all<N>(group, r, self) | known_to_lanes<N>(group, r, self)));
  }
  Window& device = state.device;
  if (!in(device, address, offset)) return note_elsewhere(address, N, reads), true;
  uint8_t page = device.pages[offset >> kPageShift];
  state.counts.loads[page == page_constant]++;
  auto w = load<N>(device.w + offset);
  if (LIKELY(page == page_input || page == page_constant)) return all(w == 0);
  auto r = load<N>(device.r + offset);
  return page != page_gap && all(ordered<N>(device, page == page_mixed, w) & known_to_all<N>(device, r, me()));
}

template <unsigned N>
FAST void set(Cell* cells, size_t offset, Cell value) {
  *reinterpret_cast<typename Vector<N>::type*>(cells + offset) = value;
}
template <unsigned N>
FAST void set_place(uint32_t* places, size_t offset, uintptr_t pc) {
  for (unsigned i = 0; i < (N + 3) / 4; i++) places[(offset >> 2) + i] = static_cast<uint32_t>(pc);
}

// Records a reader of bytes that share their history, in the cases that need no look at the second reader: what
// record_read() in check_judge.cpp does for one byte.
template <unsigned N>
FAST bool record_uniform(Window& window, bool device, size_t offset, Cell self, uintptr_t pc) {
  auto cells = load<N>(window.r + offset);
  Cell r = cells[0], simdgroup = kThread & ~(rt::kSimdWidth - 1), stamp = r & kStamp;
  if (!all(cells == r)) return false;
  uint32_t* places = window.pr;
  if (stamp < window.met) {
    if (device && r && (stamp < window.start || (r & kMany))) return false;
    set<N>(window.r, offset, self);
  } else if (((r ^ self) & kThread) == 0) {
    if (r & (kMany | kAtomic)) return false;
    set<N>(window.r, offset, self);
  } else if ((r ^ self) & simdgroup) {
    set<N>(window.s, offset, self);
    set<N>(window.r, offset, r | kMany | kFar);
    places = window.ps;
  } else {
    if ((r & kMany) || stamp < window.lane_fence[(self & simdgroup) / rt::kSimdWidth]) return false;
    set<N>(window.s, offset, self);
    set<N>(window.r, offset, r | kMany);
    places = window.ps;
  }
  set_place<N>(places, offset, pc);
  return true;
}

template <unsigned N>
__attribute__((noinline)) void read_again(void* pointer) {
  uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  size_t offset;
  bool device = !in(state.threadgroup, address, offset);
  Window& window = device ? state.device : state.threadgroup;
  offset = address - window.base;
  Cell self = me();
  auto w = load<N>(window.w + offset), r = load<N>(window.r + offset);
  uint8_t page = device ? window.pages[offset >> kPageShift] : page_output;
  if (page >= page_output) {
    auto written = ordered<N>(window, page == page_mixed, w) | own<N>(window, w, self);
    if (all(written & (known_to_lanes<N>(window, r, self) | known_to_all<N>(window, r, self)))) return;
    if (all(written) && record_uniform<N>(window, device, offset, self, HERE)) return;
  }
  [[clang::musttail]] return slow<N, reads>(pointer);
}

// ---- writes --------------------------------------------------------------------------------------------------------

template <unsigned N>
FAST void set_writer(Window& window, size_t offset, Cell self, uintptr_t pc) {
  set<N>(window.w, offset, self);
  set_place<N>(window.pw, offset, pc);
}

template <unsigned N>
FAST bool write_is_plain(uintptr_t address, uintptr_t pc) {
  size_t offset;
  Window& group = state.threadgroup;
  if (in(group, address, offset)) {
    state.counts.stores[2]++;
    Cell self = me();
    auto w = load<N>(group.w + offset), r = load<N>(group.r + offset);
    if (!LIKELY(all(((w < group.fence) | (w == self)) & (((r & ~kFar) < group.met) | (r == self))))) return false;
    set_writer<N>(group, offset, self, pc);
    return true;
  }
  Window& device = state.device;
  if (!in(device, address, offset)) return note_elsewhere(address, N, writes), true;
  state.counts.stores[0]++;
  if (device.pages[offset >> kPageShift] < page_output) return false;
  Cell self = me(), span = device.fence - device.start, met = device.met - device.start;
  auto w = load<N>(device.w + offset), r = load<N>(device.r + offset);
  auto writer = (w == 0) | (w == kUnwritten) | (w == self) | (w - device.start < span);
  auto reader = (r == 0) | (r == self) | ((r - device.start < met) & ((r & kMany) == 0));
  if (!LIKELY(all(writer & reader))) return false;
  set_writer<N>(device, offset, self, pc);
  return true;
}

// What only this thread has used since the last barrier, though at several stamps.
template <unsigned N>
__attribute__((noinline)) void write_again(void* pointer) {
  uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  size_t offset;
  bool device = !in(state.threadgroup, address, offset);
  Window& window = device ? state.device : state.threadgroup;
  offset = address - window.base;
  Cell self = me();
  auto w = load<N>(window.w + offset), r = load<N>(window.r + offset);
  if (!device || window.pages[offset >> kPageShift] >= page_output) {
    auto reader = own<N>(window, r, self) | (device ? r == 0 : (r & ~kFar) < window.met);
    if (all(own<N>(window, w, self) & reader)) return set_writer<N>(window, offset, self, HERE);
  }
  [[clang::musttail]] return slow<N, writes>(pointer);
}

}  // namespace
}  // namespace check

using namespace check;


#define ACCESS(NAME, N)                                                                         \
  CALLBACK void __tsan_##NAME##read##N(void* address) {                                         \
    if (LIKELY(read_is_plain<N>(reinterpret_cast<uintptr_t>(address)))) return;                 \
    [[clang::musttail]] return read_again<N>(address);                                          \
  }                                                                                             \
  CALLBACK void __tsan_##NAME##write##N(void* address) {                                        \
    if (LIKELY(write_is_plain<N>(reinterpret_cast<uintptr_t>(address), HERE))) return;          \
    [[clang::musttail]] return write_again<N>(address);                                         \
  }                                                                                             \
  CALLBACK void __tsan_##NAME##read_write##N(void* address) {                                   \
    uintptr_t at = reinterpret_cast<uintptr_t>(address);                                        \
    if (!window_of(at)) return note_elsewhere(at, N, reads);                                    \
    [[clang::musttail]] return slow<N, reads | writes>(address);                                \
  }

ACCESS(, 1)
ACCESS(, 2)
ACCESS(, 4)
ACCESS(, 8)
ACCESS(, 16)
ACCESS(unaligned_, 2)
ACCESS(unaligned_, 4)
ACCESS(unaligned_, 8)
ACCESS(unaligned_, 16)

CALLBACK void __tsan_init() {}
CALLBACK void __tsan_func_entry(void*) {}
CALLBACK void __tsan_func_exit() {}
CALLBACK void __tsan_ignore_thread_begin() {}
CALLBACK void __tsan_ignore_thread_end() {}
CALLBACK void __tsan_vptr_read(void**) {}
CALLBACK void __tsan_vptr_update(void**, void*) {}
