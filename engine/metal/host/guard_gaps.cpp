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

void check(char* begin, char* end, const Piece& piece) {
  if (intact(begin, end)) return;
  char *first = begin, *last = end - 1;
  while (*first == canary_at(first)) first++;
  while (*last == canary_at(last)) last--;
  Fault what = fault(kind_out_of_bounds_write);
  what.space = space_device;
  what.buffer = piece.buffer;
  what.offset = first - reinterpret_cast<char*>(piece.base);
  what.size = last - first + 1;
  what.bound = int64_t(piece.size);
  record(what);
  fill(begin, end);
}

template <class Visit>
void each_gap(Visit visit) {
  for (const Piece& piece : pieces()) {
    char* base = reinterpret_cast<char*>(piece.base);
    visit(reinterpret_cast<char*>(piece.begin), base, piece);
    visit(base + piece.size, reinterpret_cast<char*>(piece.end), piece);
  }
}

}  // namespace

void fill_gaps() {
  each_gap([](char* begin, char* end, const Piece&) { fill(begin, end); });
}

void check_gaps() {
  each_gap([](char* begin, char* end, const Piece& piece) { check(begin, end, piece); });
}

}  // namespace rt
