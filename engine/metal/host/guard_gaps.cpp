// Guard gaps around buffers: filled with a canary before a launch, looked at after it, in unchecked runs too.
#include <string.h>

#include "worker.h"

namespace rt {
namespace {

char canary_at(const char* at) { return reinterpret_cast<const char*>(&kCanary)[reinterpret_cast<uintptr_t>(at) & 3]; }

void fill(char* begin, char* end) {
  for (; begin < end && (reinterpret_cast<uintptr_t>(begin) & 3); begin++) *begin = canary_at(begin);
  for (; begin + 4 <= end; begin += 4) memcpy(begin, &kCanary, 4);
  for (; begin < end; begin++) *begin = canary_at(begin);
}

bool intact(const char* begin, const char* end) {
  uint32_t wrong = 0;
  for (; begin < end && (reinterpret_cast<uintptr_t>(begin) & 3); begin++) wrong |= uint32_t(*begin ^ canary_at(begin));
  for (; begin + 4 <= end; begin += 4) {
    uint32_t word;
    memcpy(&word, begin, 4);
    wrong |= word ^ kCanary;
  }
  for (; begin < end; begin++) wrong |= uint32_t(*begin ^ canary_at(begin));
  return wrong == 0;
}

void report_gap(char* begin, char* end, int before, int after) {
  char *first = begin, *last = end - 1;
  while (*first == canary_at(first)) first++;
  while (*last == canary_at(last)) last--;
  // The nearer neighbour: what runs over a buffer's end starts there, what runs below a buffer's start ends there.
  bool over = after < 0 || (before >= 0 && first - begin <= end - 1 - last);
  int index = over ? before : after;
  Fault what = fault(kind_out_of_bounds_write);
  what.space = space_device;
  what.buffer = index;
  const Binding& buffer = control().buffers[index];
  what.offset = (over ? first : last) - (shared + buffer.offset);
  what.size = last - first + 1;
  what.bound = int64_t(buffer.size);
  record(what);
  fill(begin, end);
}

template <class Visit>
void each_gap(Visit visit) {
  char* begin = shared + control().arena_begin;
  int before = -1;
  for (int i = 0; i < int(kMaxBuffers); i++) {
    const Binding& buffer = control().buffers[i];
    if (!buffer.present) continue;
    visit(begin, shared + buffer.offset, before, i);
    begin = shared + buffer.offset + buffer.size;
    before = i;
  }
  visit(begin, shared + control().arena_end, before, -1);
}

}  // namespace

void fill_gaps() {
  each_gap([](char* begin, char* end, int, int) { fill(begin, end); });
}

void check_gaps() {
  each_gap([](char* begin, char* end, int before, int after) {
    if (!intact(begin, end)) report_gap(begin, end, before, after);
  });
}

}  // namespace rt
