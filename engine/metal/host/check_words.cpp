// Words for the faults that the checkers find: one line that names the thread, the access and the memory.

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "check_shadow.h"

namespace check {
namespace {

struct Line {
  char* text;
  size_t room;

  __attribute__((format(printf, 2, 3))) void add(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, room, format, arguments);
    va_end(arguments);
    size_t used = length < 0 ? 0 : static_cast<size_t>(length) < room ? static_cast<size_t>(length) : room - 1;
    text += used;
    room -= used;
  }
  void position(const char* what, rt::Vec3 size, uint32_t linear) {
    uint32_t x = size.x ? size.x : 1, y = size.y ? size.y : 1;
    add("%s (%u, %u, %u)", what, linear % x, linear / x % y, linear / x / y);
  }
};

const char* verb(uint32_t kind, unsigned access) {
  if (access & atomic) return access == (reads | atomic) || kind == rt::kind_uninitialised_read ? "atomically reads" : "atomically writes";
  if (kind == rt::kind_out_of_bounds_read || kind == rt::kind_uninitialised_read) return "reads";
  return access & writes ? "writes" : "reads";
}

void word_bounds(Line& line, const rt::Fault& fault, const Region& region) {
  long long offset = fault.offset, bound = fault.bound;
  if (fault.kind == rt::kind_out_of_bounds_write && !region.writable && offset >= 0 && offset + fault.size <= bound) {
    line.add(", which is read-only");
  } else if (offset < 0) {
    line.add(": %lld bytes before it begins", -offset);
  } else if (offset >= bound) {
    line.add(": past its end, it has %lld bytes", bound);
  } else {
    line.add(": the last %lld lie past its end, it has %lld bytes", offset + static_cast<long long>(fault.size) - bound,
             bound);
  }
}

// Threads of the other party's threadgroup: fewer than the launch's at the edge of a grid.
rt::Vec3 shape_of(const rt::Fault& fault, const Other& other, const rt::GroupInfo& group) {
  if (other.same_threadgroup || fault.other_threadgroup < 0) return group.threads;
  uint32_t linear = static_cast<uint32_t>(fault.other_threadgroup), x = group.threadgroups.x, y = group.threadgroups.y;
  auto least = [](uint32_t most, uint32_t whole, uint32_t at) { return most < whole - at * most ? most : whole - at * most; };
  rt::Vec3 most = group.dispatch_threads, whole = group.grid;
  return {least(most.x, whole.x, linear % x), least(most.y, whole.y, linear / x % y), least(most.z, whole.z, linear / x / y)};
}

void word_race(Line& line, const rt::Fault& fault, unsigned access, const Other& other, const rt::GroupInfo& group) {
  const char* what = other.read ? "read" : other.atomic ? "atomic write" : "write";
  const char* article = other.known ? "the" : other.atomic ? "an" : "a";
  line.add(" in a race with %s %s by ", article, what);
  if (!other.known) {
    line.add("another thread");
  } else {
    line.position("thread", shape_of(fault, other, group), static_cast<uint32_t>(fault.other_thread));
  }
  if (other.known && !other.same_threadgroup) {
    if (fault.other_threadgroup < 0) {
      line.add(" of an earlier threadgroup");
    } else {
      line.position(" of threadgroup", group.threadgroups, static_cast<uint32_t>(fault.other_threadgroup));
    }
    line.add(": threadgroups are not ordered");
  } else if (other.atomic != ((access & atomic) != 0)) {
    line.add(": one of the two is not atomic");
  } else if (other.known) {
    line.add(": no barrier with mem_%s in between", fault.space == rt::space_threadgroup ? "threadgroup" : "device");
  }
}

// Storage that a body declares goes by a negative number here; only Python has the names.
void name_region(char* text, size_t most, const Region& region) {
  if (region.buffer == INT32_MIN) {
    snprintf(text, most, "memory outside all buffers");
  } else {
    snprintf(text, most, "%s(%d)", region.space == Space::threadgroup ? "threadgroup" : "buffer", region.buffer);
  }
}

}  // namespace

void word(rt::Fault& fault, const Region& region, unsigned access, const Other& other, const rt::GroupInfo& group) {
  Line line{fault.message, sizeof fault.message};
  line.position("thread", group.threads, static_cast<uint32_t>(fault.thread));
  line.position(" of threadgroup", group.threadgroups, static_cast<uint32_t>(fault.threadgroup));
  char name[80];
  name_region(name, sizeof name, region);
  if (fault.kind == rt::kind_misaligned) {
    line.add(" uses an address that is not a multiple of %lld bytes, at %s%+lld", static_cast<long long>(fault.size), name,
             static_cast<long long>(fault.offset));
    return;
  }
  line.add(" %s %lld bytes at %s%+lld", verb(fault.kind, access), static_cast<long long>(fault.size), name,
           static_cast<long long>(fault.offset));
  if (fault.kind == rt::kind_uninitialised_read) line.add(", of which some or all were never written");
  if (fault.kind == rt::kind_race) word_race(line, fault, access, other, group);
  if (fault.kind == rt::kind_out_of_bounds_read || fault.kind == rt::kind_out_of_bounds_write) word_bounds(line, fault, region);
}

}  // namespace check
