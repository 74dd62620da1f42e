// Where buffers lie in the worker: each in a piece of the shared file, mapped far from the others, so that an index that
// has wrapped around (a uint below zero: 16 GiB further for float, 64 for float4) ends in the gap of its own buffer.
//
// Nothing is mapped in the gaps. The first access to a page there is a signal; its handler (signals.cpp) makes a fault of
// it and lends the kernel a page of canaries, which is taken back after the launch: a GPU goes on, too.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "worker.h"

#ifdef ASSAY_CHECKED
#include "check.h"
#endif

namespace rt {
namespace {

constexpr size_t kGiB = size_t{1} << 30;
// Below a buffer, and twice as much above: int and uint indices of 16-byte elements reach 32 GiB down and 64 GiB up.
constexpr size_t kWidest = 32 * kGiB, kNarrowest = size_t{1} << 20;
// Where to ask for room: low enough that what lies 100 TiB further is still an address, which a signal can tell.
constexpr uintptr_t kHint = uintptr_t{16} << 40;
constexpr unsigned kMostLent = 4096;

Piece mapped[kMaxBuffers];
unsigned piece_count = 0;
char* addresses[kMaxBuffers];

uintptr_t reserved = 0;
size_t reserved_bytes = 0, gap = kWidest;

uintptr_t lent[kMostLent];
unsigned lent_count = 0;
int lending = 0;

size_t page_bytes() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

void* map(uintptr_t at, size_t bytes, int protection, int flags, int file = -1, size_t offset = 0) {
  return mmap(reinterpret_cast<void*>(at), bytes, protection, flags | (at ? MAP_FIXED : 0), file, off_t(offset));
}

void close_off(uintptr_t at, size_t bytes) {
  if (map(at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE) == MAP_FAILED) die("address space");
}

bool watched(uintptr_t begin, size_t bytes) {
#ifdef ASSAY_CHECKED
  return check::watch(begin, begin + bytes);
#else
  return begin && bytes;
#endif
}

// Room for `count` buffers of `bytes` in all. Where address space is short (a limit on it, strict overcommit) gaps shrink.
void reserve(unsigned count, size_t bytes) {
  if (reserved && bytes + 3 * gap * count <= reserved_bytes) return;
  if (reserved) munmap(reinterpret_cast<void*>(reserved), reserved_bytes);
  piece_count = 0;
  count = count < 8 ? 8 : kMaxBuffers;
  for (;; gap /= 4) {
    if (gap < kNarrowest) die("address space");
    size_t rounded = gap == kWidest ? kGiB : kNarrowest;
    while (rounded < bytes) rounded *= 2;
    reserved_bytes = rounded + 3 * gap * count;
    void* hint = reinterpret_cast<void*>(kHint);
    void* memory = mmap(hint, reserved_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) continue;
    reserved = reinterpret_cast<uintptr_t>(memory);
    if (watched(reserved, reserved_bytes)) return;
    munmap(memory, reserved_bytes);
  }
}

bool any(const Piece&) { return true; }
// A reference holds one value and is never indexed; a kernel mostly reads what it may not write.
template <bool write>
bool likely(const Piece& piece) {
  const Kernel& kernel = *launch.kernel;
  for (unsigned i = 0; i < kernel.count; i++)
    if (kernel.parameters[i].kind == param_buffer && kernel.parameters[i].index == piece.buffer)
      return !kernel.infos[i].is_reference && piece.writable == write;
  return false;
}

const Piece* nearest(uintptr_t address, bool (*candidate)(const Piece&)) {
  const Piece* best = nullptr;
  uintptr_t least = UINTPTR_MAX;
  for (const Piece& piece : pieces()) {
    if (!candidate(piece)) continue;
    uintptr_t end = piece.base + piece.size;
    // There is twice as much room above as below.
    uintptr_t distance = address < piece.base ? (piece.base - address) * 2 : address < end ? 0 : address - end + 1;
    if (distance < least) least = distance, best = &piece;
  }
  return best;
}

}  // namespace

size_t gap_bytes() { return page_bytes() > kGapBytes ? page_bytes() : kGapBytes; }

char* address_of(unsigned buffer) { return addresses[buffer]; }

Pieces pieces() { return {mapped, mapped + piece_count}; }

void map_buffers(int file) {
  const Binding* buffers = control().buffers;
  unsigned count = 0;
  size_t bytes = 0;
  for (unsigned i = 0; i < kMaxBuffers; i++)
    if (buffers[i].present) count++, bytes += gap_bytes() + buffers[i].size + buffers[i].room;
  for (const Piece& piece : pieces()) close_off(piece.begin, piece.end - piece.begin);
  reserve(count, bytes);
  piece_count = 0;
  uintptr_t at = reserved;
  for (unsigned i = 0; i < kMaxBuffers; i++) {
    const Binding& buffer = buffers[i];
    if (!buffer.present) continue;
    uintptr_t begin = at + gap, base = begin + gap_bytes(), end = base + buffer.size + buffer.room;
    if (map(begin, end - begin, PROT_READ | PROT_WRITE, MAP_SHARED, file, buffer.offset - gap_bytes()) == MAP_FAILED)
      die("shared memory");
    mapped[piece_count++] = {int(i), begin, end, base, buffer.size, buffer.writable != 0};
    at = end + 2 * gap;
  }
  for (unsigned i = 0; i < kMaxBuffers; i++) {
    const Binding& owner = buffers[buffers[i].owner];
    addresses[i] = nullptr;
    for (const Piece& piece : pieces())
      if (piece.buffer == int(buffers[i].owner)) addresses[i] = reinterpret_cast<char*>(piece.base) + (buffers[i].offset - owner.offset);
  }
}

// Which buffer an address in the gaps or far from all was meant for. False: there is none.
bool find_buffer(uintptr_t address, bool write, Fault& what, bool* guess) {
  *guess = address - reserved >= reserved_bytes;
  const Piece* piece = *guess ? nearest(address, write ? likely<true> : likely<false>) : nullptr;
  if (!piece) piece = nearest(address, any);
  if (!piece) return false;
  what.space = space_device;
  what.buffer = piece->buffer;
  what.offset = int64_t(address - piece->base);
  what.bound = int64_t(piece->size);
  return true;
}

bool lend_page(uintptr_t address, bool write) {
  while (__atomic_exchange_n(&lending, 1, __ATOMIC_ACQUIRE)) {}
  uintptr_t page = address & ~(page_bytes() - 1);
  unsigned known = 0;
  while (known < lent_count && lent[known] != page) known++;
  bool fresh = known == lent_count, lends = known < kMostLent;
  if (lends && fresh) {
    lends = map(page, page_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON) != MAP_FAILED;
    for (size_t i = 0; lends && i < page_bytes(); i += 4) memcpy(reinterpret_cast<void*>(page + i), &kCanary, 4);
    if (lends) lent[lent_count++] = page;
  }
  // A page that was read first may only be read: a write to it is another fault.
  if (lends) mprotect(reinterpret_cast<void*>(page), page_bytes(), write ? PROT_READ | PROT_WRITE : PROT_READ);
  __atomic_store_n(&lending, 0, __ATOMIC_RELEASE);
  return lends;
}

void take_back_pages() {
  for (; lent_count; lent_count--) close_off(lent[lent_count - 1], page_bytes());
}

char* reserve_around(size_t bytes, size_t* room) {
  for (*room = kWidest; *room >= kNarrowest; *room /= 4) {
    void* memory = map(0, bytes + 3 * *room, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE);
    if (memory == MAP_FAILED) continue;
    char* begin = static_cast<char*>(memory) + *room;
    return mprotect(begin, bytes, PROT_READ | PROT_WRITE) ? nullptr : begin;
  }
  return nullptr;
}

}  // namespace rt
