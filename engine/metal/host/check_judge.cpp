// The rules: judges an access byte by byte against the shadow and updates the cells.

#include <cstring>

#include "check_shadow.h"

namespace check {
namespace {

struct Bytes {
  Cell w, r, s;
};

// The running thread's view of one window.
struct View {
  const Window& window;
  bool device;
  Cell thread, simdgroup;
  unsigned access;

  Cell stamp(Cell cell) const { return cell & kStamp; }
  bool earlier_group(Cell cell) const { return device && stamp(cell) && stamp(cell) < window.start; }
  bool current(Cell cell) const { return stamp(cell) >= window.fence; }
  bool current_read(Cell cell) const { return stamp(cell) >= window.met; }
  bool mine(Cell cell) const { return (cell & kThread) == thread; }
  bool same_simdgroup(Cell cell) const { return (cell & kThread) / rt::kSimdWidth == simdgroup; }
  bool lanes_fenced(Cell cell) const { return stamp(cell) < window.lane_fence[simdgroup]; }
  bool written(Cell w) const { return device ? w != kUnwritten : stamp(w) >= window.start; }
  bool unordered(Cell cell) const {
    if (stamp(cell) < window.start) return earlier_group(cell) && !handed_over(cell);
    if (!current(cell) || mine(cell)) return false;
    return !(same_simdgroup(cell) && lanes_fenced(cell));
  }
  // A thread's plain write that its own atomic follows races with the other threads' atomics: it is the one to remember.
  bool hidden(Cell w) const {
    bool plain = w && w < kUnwritten && !(w & kAtomic) && (access & atomic);
    return plain && mine(w) && stamp(w) >= window.start && current(w) && !lanes_fenced(w);
  }
  bool clash_read(Cell cell) const { return (stamp(cell) < window.start || current_read(cell)) && clash(cell); }
  bool clash(Cell cell) const { return cell && unordered(cell) && !((access & atomic) && (cell & kAtomic)); }
};

Judgement judge_read(const View& view, const Bytes& b) {
  if (!view.written(b.w)) return {(view.access & bulk) ? Wrong::no : Wrong::unwritten};
  if (view.clash(b.w)) return {Wrong::race, b.w};
  bool others_atomics = (b.w & kAtomic) && (b.w & (kMany | kFar)) && !(view.access & atomic) && b.w;
  if (others_atomics && ((b.w & kFar) || view.current(b.w))) return {Wrong::race, 0, false, false, true};
  return {};
}

Judgement judge_write(const View& view, const Bytes& b) {
  if (view.clash_read(b.r)) return {Wrong::race, b.r, true};
  if ((b.r & kMany) && view.clash_read(b.s)) return {Wrong::race, b.s, true, true};
  if (!b.w || !view.written(b.w)) return {};
  bool both_atomic = (view.access & atomic) && (b.w & kAtomic), plain = !(view.access & atomic) && !(b.w & kAtomic);
  if (both_atomic) return {};
  if (view.unordered(b.w)) return {plain ? Wrong::same_value : Wrong::race, b.w};
  if ((b.w & kFar) || ((b.w & kMany) && view.current(b.w))) return {plain ? Wrong::same_value : Wrong::race, 0, false, false, (b.w & kAtomic) != 0};
  return {};
}

Cell written_cell(const View& view, Cell old) {
  Cell cell = state.now | view.thread | ((view.access & atomic) ? kAtomic : 0);
  if (!old || !view.written(old)) return cell;
  if ((view.earlier_group(old) && !handed_over(old)) || (old & kFar)) cell |= kFar;
  if (view.unordered(old) || (view.current(old) && (old & kMany))) cell |= kMany;
  return cell;
}

// Keeps two readers, of different threadgroups or simdgroups if there are such: any later writer then races with one.
// The fast path relies on this: kMany without kFar in a cell after the lanes' fence means that s is after it too.
void record_read(const View& view, Bytes& b) {
  Cell me = state.now | view.thread | ((view.access & atomic) ? kAtomic : 0);
  if (view.earlier_group(b.r)) {
    b.s = b.r;
    b.r = me | kMany | kFar;
  } else if (!b.r || !view.current_read(b.r)) {
    b.r = (b.r & kMany) && view.earlier_group(b.s) ? me | kMany | kFar : me;
  } else if (view.mine(b.r)) {
    Cell second = b.r & (kMany | kFar);
    if (second == kMany && view.lanes_fenced(b.s)) second = 0;
    b.r = (b.r & kAtomic ? me : me & ~kAtomic) | second;
  } else if (b.r & kFar) {
    return;
  } else if (!view.same_simdgroup(b.r)) {
    b.s = me;
    b.r |= kMany | kFar;
  } else if (view.lanes_fenced(b.r)) {
    bool second = (b.r & kMany) && !view.lanes_fenced(b.s) && !view.mine(b.s);
    b.r = second ? me | kMany : me;
  } else if (!(b.r & kMany) || view.lanes_fenced(b.s)) {
    b.s = me;
    b.r |= kMany;
  }
}

Judgement judge_byte(const View& view, Bytes& b) {
  if (b.w == kGap) return {Wrong::outside};
  Judgement judgement;
  if (view.access & reads) judgement = judge_read(view, b);
  if ((view.access & writes) && judgement.wrong == Wrong::no) judgement = judge_write(view, b);
  if (view.access & writes) {
    if (!view.hidden(b.w)) b.w = written_cell(view, b.w);
  } else {
    record_read(view, b);
  }
  return judgement;
}

// Who wrote a place before its last writer, unordered with it: the other party of a race where the last writer is the
// running thread itself. Only atomics and writers of one value get so far; a place that another has taken is forgotten.
struct Earlier {
  uintptr_t address;
  Cell w;
  uint32_t pc, launch;
};
Earlier earlier[1024];
Earlier& earlier_at(uintptr_t address) { return earlier[(address >> 2) % 1024]; }

void remember_earlier(const View& view, uintptr_t address, Cell w, uint32_t pc) {
  if (w && w < kUnwritten && view.unordered(w)) earlier_at(address) = {address >> 2, w, pc, state.launch};
}
const Earlier* recall_earlier(const View& view, uintptr_t address) {
  const Earlier& it = earlier_at(address);
  return it.address == address >> 2 && it.launch == state.launch && view.unordered(it.w) ? &it : nullptr;
}

Cell device_writer(const Window& device, size_t at) {
  uint8_t page = device.pages[at >> kPageShift];
  if (page == page_gap) return kGap;
  return page == page_output && !device.w[at] ? kUnwritten : device.w[at];
}

}  // namespace

// Bytes of one access mostly share their history: equal cells are judged once.
Found judge_bytes(Window& window, size_t offset, unsigned size, unsigned access, uint32_t low_pc) {
  View view{window, &window == &state.device, rt::self().thread_index, rt::self().simdgroup, access};
  Found found;
  Bytes before{}, after{};
  Judgement judgement;
  uint32_t writer = 0, reader = 0, second = 0;  // places, before this access becomes one
  for (unsigned i = 0; i < size; i++) {
    size_t at = offset + i;
    if (i == 0 || at % 4 == 0) writer = window.pw[at >> 2], reader = window.pr[at >> 2], second = window.ps[at >> 2];
    Bytes now{window.w[at], window.r[at], window.s[at]};
    if (view.device) now.w = device_writer(window, at);
    if (i == 0 || now.w != before.w || now.r != before.r || now.s != before.s) {
      before = after = now;
      judgement = judge_byte(view, after);
    }
    if (judgement.wrong == Wrong::same_value) found.same_value |= 1u << i;
    bool worse = judgement.wrong == Wrong::outside && found.judgement.wrong != Wrong::outside;
    if (found.judgement.wrong == Wrong::no || worse) {
      found.judgement = judgement;
      found.byte = i;
      found.other_pc = judgement.second ? second : judgement.by_read ? reader : writer;
      bool nameless = judgement.wrong >= Wrong::race && !judgement.culprit;
      const Earlier* other = nameless ? recall_earlier(view, window.base + at) : nullptr;
      if (other) found.judgement.culprit = other->w, found.other_pc = other->pc;
    }
    if ((access & writes) && (i == 0 || at % 4 == 0)) remember_earlier(view, window.base + at, now.w, writer);
    if (after.w == kGap) continue;
    if (after.w != now.w) window.pw[at >> 2] = low_pc;
    constexpr Cell who = kStamp | kThread;
    if ((after.r ^ now.r) & who) window.pr[at >> 2] = low_pc;
    if (after.s != now.s) window.ps[at >> 2] = (after.s ^ now.r) & who ? low_pc : reader;
    window.w[at] = after.w;
    window.r[at] = after.r;
    window.s[at] = after.s;
  }
  return found;
}

void forget_earlier() { std::memset(earlier, 0, sizeof earlier); }

bool written(const Window& window, size_t offset) {
  if (&window == &state.device) return device_writer(window, offset) != kUnwritten;
  return window.w[offset] == kGap || (window.w[offset] & kStamp) >= window.start;
}

}  // namespace check
