// Threadgroup memory of one host thread: arguments and what bodies declare, apart from each other in one arena, with
// canaries between, filled anew for every threadgroup.
#include <string.h>

#include "scheduler.h"

#ifdef ASSAY_CHECKED
#include "check.h"
#endif

namespace rt {

bool Scheduler::create() { return (arena_ = reserve_around(kArenaBytes, &arena_room_)) != nullptr; }

static void fill_canary(char* begin, char* end) {
  for (char* at = begin; at + 4 <= end; at += 4) memcpy(at, &kCanary, 4);
}

StoredRegion& Scheduler::allocate(int32_t buffer, uint32_t size, size_t align, const Site* site, LayoutOf layout) {
  align = align < 16 ? 16 : align;
  uintptr_t at = reinterpret_cast<uintptr_t>(arena_next_) + kArenaGap;
  char* base = reinterpret_cast<char*>((at + align - 1) & ~(align - 1));
  if (region_count_ == kMaxRegions || base + size + 2 * kArenaGap > arena_ + kArenaBytes) {
    fail("the kernel declares more threadgroup memory than the executor holds");
  }
  fill_canary(base - 256, base);
  char* end = base + size;
  char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(end) + 3) & ~uintptr_t{3});
  for (char* c = end; c < aligned; c++) *c = reinterpret_cast<const char*>(&kCanary)[reinterpret_cast<uintptr_t>(c) & 3];
  fill_canary(aligned, aligned + 256);
  arena_next_ = aligned + 256;
  used_bytes_ += size;
  return regions_[region_count_++] = {buffer, size, base, site, layout, true};
}

static bool is_canary(const char* at) {
  return *at == reinterpret_cast<const char*>(&kCanary)[reinterpret_cast<uintptr_t>(at) & 3];
}

void Scheduler::check_canaries() {
  for (unsigned i = 0; i < region_count_; i++) {
    const StoredRegion& region = regions_[i];
    char* end = region.base + region.size;
    int64_t found = 0;
    bool bad = false;
    for (char* at = end; at < end + 256 && !bad; at++)
      if (!is_canary(at)) bad = true, found = at - region.base;
    for (char* at = region.base - 1; at >= region.base - 256 && !bad; at--)
      if (!is_canary(at)) bad = true, found = at - region.base;
    if (!bad) continue;
    Fault what = fault(kind_out_of_bounds_write);
    what.thread = -1;
    what.threadgroup = int32_t(info_.linear_threadgroup);
    what.space = space_threadgroup;
    what.buffer = region.buffer;
    what.offset = found;
    what.size = 1;
    what.bound = region.size;
    record(what);
    for (char* at = region.base - 256; at < region.base; at++) *at = reinterpret_cast<const char*>(&kCanary)[reinterpret_cast<uintptr_t>(at) & 3];
    for (char* at = end; at < end + 256; at++) *at = reinterpret_cast<const char*>(&kCanary)[reinterpret_cast<uintptr_t>(at) & 3];
  }
}

void Scheduler::begin_use(StoredRegion& region) {
  region.fresh = false;
  memset(region.base, launch_->poison ? 0xFF : 0, region.size);
#ifdef ASSAY_CHECKED
  check::add_threadgroup_region({region.buffer, check::Space::threadgroup, reinterpret_cast<uintptr_t>(region.base), region.size, true, !launch_->poison});
  if (region.layout) {
    Layout layout = region.layout();
    if (layout.values) check::padding(reinterpret_cast<uintptr_t>(region.base), region.size, layout.values, layout.period);
  }
#endif
}

void* Scheduler::local(const Site& site, size_t size, size_t align, LayoutOf layout) {
  StoredRegion* region = nullptr;
  for (unsigned i = argument_regions_; i < region_count_ && !region; i++)
    if (regions_[i].site == &site) region = &regions_[i];
  if (!region) region = &allocate(-1 - int32_t(site.id), uint32_t(size), align, &site, layout);
  if (region->fresh) begin_use(*region);
  return region->base;
}

// Far from them all, the region is a guess where there are several.
bool Scheduler::find_region(uintptr_t address, Fault& what, bool* guess) const {
  uintptr_t arena = reinterpret_cast<uintptr_t>(arena_);
  if (!arena_ || address + arena_room_ < arena || address >= arena + kArenaBytes + 2 * arena_room_) return false;
  *guess = region_count_ > 1;
  const StoredRegion* best = nullptr;
  for (unsigned i = 0; i < region_count_; i++)
    if (reinterpret_cast<uintptr_t>(regions_[i].base) <= address || !best) best = &regions_[i];
  what.space = space_threadgroup;
  if (!best) return true;
  what.buffer = best->buffer;
  what.offset = int64_t(address - reinterpret_cast<uintptr_t>(best->base));
  what.bound = best->size;
  return true;
}

}  // namespace rt
