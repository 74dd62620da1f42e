// The clock, the regions and the memory of the shadow: everything that happens between accesses.

#include "check.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <vector>

#include "check_shadow.h"

namespace check {

State state;

namespace {

constexpr size_t kZeroByHand = size_t{1} << 20;  // larger arrays are remapped: untouched pages then cost nothing

std::vector<Region> buffers;              // sorted by address
std::vector<Region> threadgroup_regions;  // in order of arrival
struct Begin {
  Cell stamp;
  uint32_t threadgroup;
  Cell handed_over;  // what it did before this stamp lies before a fence of its own for the whole device
};
std::vector<Begin> begins;

void* map(size_t bytes, void* at = nullptr) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  void* memory = mmap(at, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "checked mode needs %zu bytes of address space for its shadow, which mmap refused\n", bytes);
    std::abort();
  }
  return memory;
}

// Makes an array of `bytes` zeros out of one that can hold `capacity` bytes, or a new one.
template <class T>
void clear(T*& array, size_t bytes, size_t capacity, bool fresh) {
  if (fresh) {
    if (array) munmap(array, capacity);
    array = static_cast<T*>(map(bytes));
  } else if (bytes <= kZeroByHand) {
    std::memset(array, 0, bytes);
  } else {
    map(bytes, array);
  }
}

// The span is rounded up to pages and followed by a margin, so that reading past the end by one access stays in the array.
void reset(Window& window, uintptr_t begin, uintptr_t end) {
  size_t span = end - begin;
  size_t padded = ((span >> kPageShift) + 2) << kPageShift;
  bool fresh = padded > window.capacity;
  size_t cells = padded * sizeof(Cell), old = window.capacity * sizeof(Cell);
  clear(window.w, cells, old, fresh);
  clear(window.r, cells, old, fresh);
  clear(window.s, cells, old, fresh);
  clear(window.pw, cells / 4, old / 4, fresh);
  clear(window.pr, cells / 4, old / 4, fresh);
  if (fresh) window.capacity = padded;
  window.base = begin;
  window.span = span;
}

void fill(Window& window, uintptr_t begin, uintptr_t end, Cell cell) {
  begin = std::max(begin, window.base);
  end = std::min(end, window.base + window.span);
  if (begin < end) std::fill(window.w + (begin - window.base), window.w + (end - window.base), cell);
}

constexpr uintptr_t kPage = uintptr_t{1} << kPageShift;
uintptr_t page_down(uintptr_t address) { return address & ~(kPage - 1); }
uintptr_t page_up(uintptr_t address) { return page_down(address + kPage - 1); }

// Pages that a gap or an output fills are known by their kind; the rest is marked byte by byte.
void mark_buffer(size_t index) {
  Window& device = state.device;
  const Region& region = buffers[index];
  uintptr_t end = region.base + region.size;
  uintptr_t before = index ? buffers[index - 1].base + buffers[index - 1].size : device.base;
  uintptr_t after = index + 1 < buffers.size() ? buffers[index + 1].base : device.base + device.span;
  fill(device, std::max(before, page_down(region.base) - kMargin), region.base, kGap);
  fill(device, end, std::min(after, page_up(end) + kMargin), kGap);
  Page kind = region.writable || !region.initialised ? page_mixed : region.space == Space::constant ? page_constant : page_input;
  for (uintptr_t at = page_down(region.base); at < end; at += kPage) {
    bool whole = at >= region.base && at + kPage <= end;
    uint8_t& entry = device.pages[(at - device.base) >> kPageShift];
    entry = std::max<uint8_t>(entry, region.initialised || !whole ? kind : page_output);
    if (!region.initialised && !whole) fill(device, std::max(at, region.base), std::min(at + kPage, end), kUnwritten);
  }
}

// Stamps matter only relative to the fences that are still remembered: each is replaced by its rank among them.
std::vector<Cell> fences() {
  std::vector<Cell> all;
  for (const Window* window : {&state.threadgroup, &state.device}) {
    all.insert(all.end(), {window->start, window->fence});
    all.insert(all.end(), std::begin(window->lane_fence), std::end(window->lane_fence));
  }
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

void renumber() {
  std::vector<Cell> order = fences();
  auto rank = [&order](Cell stamp) {
    return Cell(1 + (std::upper_bound(order.begin(), order.end(), stamp) - order.begin())) << kStampShift;
  };
  for (Window* window : {&state.threadgroup, &state.device}) {
    for (Cell* cells : {window->w, window->r, window->s}) {
      for (size_t i = 0; cells && i < window->span; i++) {
        if (cells[i] && cells[i] < kUnwritten) cells[i] = (cells[i] & ~kStamp) | rank(cells[i] & kStamp);
      }
    }
    window->start = rank(window->start);
    window->fence = rank(window->fence);
    for (Cell& fence : window->lane_fence) fence = rank(fence);
  }
  begins.erase(begins.begin(), begins.empty() ? begins.end() : begins.end() - 1);
  if (!begins.empty()) begins.back() = {state.device.start, begins.back().threadgroup, rank(begins.back().handed_over)};
  state.now = rank(order.back()) + kTick;
}

void tick() {
  if (state.now >= kLastStamp) renumber();
  state.now += kTick;
}

void fence_all(Window& window) {
  window.fence = state.now;
  std::fill(std::begin(window.lane_fence), std::end(window.lane_fence), state.now);
}

const Begin* began_before(Cell stamp) {
  auto after = std::upper_bound(begins.begin(), begins.end(), stamp,
                                [](Cell value, const Begin& begin) { return value < begin.stamp; });
  return after == begins.begin() ? nullptr : &*(after - 1);
}

bool overlaps(const Region& a, const Region& b) { return a.base < b.base + b.size && b.base < a.base + a.size; }

bool same(const Region& a, const Region& b) { return a.base == b.base && a.size == b.size && a.buffer == b.buffer; }

}  // namespace

void begin_launch(const Region* regions, size_t count, uintptr_t arena_begin, uintptr_t arena_end) {
  forget_pending();
  state.counts = {};
  state.launch++;
  begins.clear();
  buffers.assign(regions, regions + count);
  std::sort(buffers.begin(), buffers.end(), [](const Region& a, const Region& b) { return a.base < b.base; });
  arena_begin = page_down(arena_begin);
  size_t pages = ((arena_end - arena_begin) >> kPageShift) + 2;
  Window& device = state.device;
  size_t old_pages = device.capacity >> kPageShift;
  clear(device.pages, pages, old_pages, !device.pages || pages > old_pages);
  reset(device, arena_begin, arena_end);
  for (size_t i = 0; i < buffers.size(); i++) mark_buffer(i);
}

// The clock runs on from launch to launch, so that what is left of the last one is as old as any earlier threadgroup's.
void threadgroup_storage(uintptr_t begin, uintptr_t end) {
  Window& window = state.threadgroup;
  for (const Region& region : threadgroup_regions) fill(window, region.base, region.base + region.size, kGap);
  threadgroup_regions.clear();
  if (window.base == begin && window.span == end - begin) return;
  reset(window, begin, end);
  std::fill(window.w, window.w + (end - begin) + kMargin, kGap);
}

void begin_threadgroup(uint32_t linear_threadgroup) {
  settle();
  tick();
  for (Window* window : {&state.threadgroup, &state.device}) {
    window->start = state.now;
    fence_all(*window);
  }
  begins.push_back({state.now, linear_threadgroup, 0});
  state.fenced = false;
}

void add_threadgroup_region(const Region& region) {
  Window& window = state.threadgroup;
  for (size_t i = 0; i < threadgroup_regions.size(); i++) {
    const Region old = threadgroup_regions[i];
    if (same(old, region)) return;
    if (!overlaps(old, region)) continue;
    fill(window, old.base, old.base + old.size, kGap);
    threadgroup_regions.erase(threadgroup_regions.begin() + static_cast<ptrdiff_t>(i--));
  }
  threadgroup_regions.push_back(region);
  fill(window, region.base, region.base + region.size, 0);
}

void barrier(unsigned mem_flags) {
  settle();
  tick();
  if (mem_flags & 1) fence_all(state.device);
  if (mem_flags & 2) fence_all(state.threadgroup);
}

void simd_barrier(unsigned simdgroup, unsigned mem_flags) {
  settle();
  tick();
  if (mem_flags & 1) state.device.lane_fence[simdgroup] = state.now;
  if (mem_flags & 2) state.threadgroup.lane_fence[simdgroup] = state.now;
}

void end_launch() {
  settle();
  state.device.span = 0;
}

const Stats& stats() { return state.counts; }

Place nearest_region(const Window& window, uintptr_t address) {
  const std::vector<Region>& regions = &window == &state.device ? buffers : threadgroup_regions;
  Place best{{INT32_MIN, Space::device, address, 0, false, false}, 0};
  uintptr_t least = UINTPTR_MAX;
  for (const Region& region : regions) {
    uintptr_t end = region.base + region.size;
    uintptr_t distance = address < region.base ? region.base - address : address < end ? 0 : address - end + 1;
    if (distance >= least) continue;
    least = distance;
    best = {region, static_cast<int64_t>(address - region.base)};
  }
  return best;
}

int32_t threadgroup_of(Cell cell) {
  const Begin* begin = began_before(cell & kStamp);
  return begin ? static_cast<int32_t>(begin->threadgroup) : -1;
}

bool handed_over(Cell cell) {
  const Begin* begin = state.fenced ? began_before(cell & kStamp) : nullptr;
  return begin && (cell & kStamp) < begin->handed_over;
}

void device_fence() {
  settle();
  tick();
  if (!begins.empty()) begins.back().handed_over = state.now;
  state.fenced = true;
}

}  // namespace check
