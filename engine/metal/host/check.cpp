// The clock, the regions and the memory of the shadow: everything that happens between accesses.

#include "check.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include "check_shadow.h"

namespace check {

State state;

namespace {

constexpr size_t kZeroByHand = size_t{1} << 20;  // more than that is remapped: untouched pages then cost nothing

std::vector<Region> buffers;
size_t watched;                           // bytes of the range of buffers; the window is shut between launches
std::vector<Region> threadgroup_regions;  // in order of arrival
struct Begin {
  Cell stamp;
  uint32_t threadgroup;
  Cell handed_over;  // what it did before this stamp lies before a fence of its own for the whole device
};
std::vector<Begin> begins;

void* map(size_t bytes, void* at = nullptr) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  return mmap(at, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
}

void zero(void* array, size_t bytes) {
  if (bytes <= kZeroByHand) {
    std::memset(array, 0, bytes);
    return;
  }
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  uintptr_t begin = reinterpret_cast<uintptr_t>(array), end = begin + bytes;
  uintptr_t first = (begin + page - 1) & ~(page - 1), last = end & ~(page - 1);
  std::memset(array, 0, first - begin);
  if (map(last - first, reinterpret_cast<void*>(first)) == MAP_FAILED) std::memset(reinterpret_cast<void*>(first), 0, last - first);
  std::memset(reinterpret_cast<void*>(last), 0, end - last);
}

// Six arrays and the kinds of pages, all zeros; with a margin, so that reading past the end by one access stays inside.
bool shadow(Window& window, uintptr_t begin, uintptr_t end) {
  size_t span = end - begin, padded = ((span >> kPageShift) + 2) << kPageShift;
  bool whole = true;
  auto make = [&](auto*& array, size_t old_bytes, size_t bytes) {
    if (array) munmap(array, old_bytes);
    void* memory = map(bytes);
    whole &= memory != MAP_FAILED;
    array = memory == MAP_FAILED ? nullptr : static_cast<decltype(array + 0)>(memory);
  };
  for (Cell** cells : {&window.w, &window.r, &window.s}) make(*cells, window.capacity * sizeof(Cell), padded * sizeof(Cell));
  for (uint32_t** places : {&window.pw, &window.pr, &window.ps}) make(*places, window.capacity, padded);
  make(window.pages, window.capacity >> kPageShift, padded >> kPageShift);
  window.capacity = padded;
  window.base = begin;
  window.span = span;
  return whole;
}

void fill(Window& window, uintptr_t begin, uintptr_t end, Cell cell) {
  begin = std::max(begin, window.base);
  end = std::min(end, window.base + window.span);
  if (begin < end) std::fill(window.w + (begin - window.base), window.w + (end - window.base), cell);
}

constexpr uintptr_t kPage = uintptr_t{1} << kPageShift;
uintptr_t page_down(uintptr_t address) { return address & ~(kPage - 1); }
uintptr_t page_up(uintptr_t address) { return page_down(address + kPage - 1); }

// The bytes around a region whose shadow a launch may have changed.
uintptr_t marked_begin(const Region& region) { return page_down(region.base) - kMargin; }
uintptr_t marked_end(const Region& region) { return page_up(region.base + region.size) + kMargin; }

void forget_buffer(const Region& region) {
  Window& device = state.device;
  size_t from = marked_begin(region) - device.base, bytes = marked_end(region) - marked_begin(region);
  for (Cell* cells : {device.w, device.r, device.s}) zero(cells + from, bytes * sizeof(Cell));
  for (uint32_t* places : {device.pw, device.pr, device.ps}) zero(places + (from >> 2), bytes);
  zero(device.pages + (from >> kPageShift), (bytes >> kPageShift) + 2);
}

// Pages that a gap or an output fills are known by their kind; the rest is marked byte by byte.
void mark_buffer(const Region& region) {
  Window& device = state.device;
  uintptr_t end = region.base + region.size;
  fill(device, marked_begin(region), region.base, kGap);
  fill(device, end, marked_end(region), kGap);
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
    all.insert(all.end(), {window->start, window->fence, window->met});
    all.insert(all.end(), std::begin(window->lane_fence), std::end(window->lane_fence));
  }
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

void renumber() {
  forget_earlier();
  std::vector<Cell> order = fences();
  auto rank = [&order](Cell stamp) {
    return Cell(1 + (std::upper_bound(order.begin(), order.end(), stamp) - order.begin())) << kStampShift;
  };
  auto renumber_cells = [&rank](const Window& window, size_t from, size_t to) {
    for (Cell* cells : {window.w, window.r, window.s}) {
      for (size_t i = from; i < to; i++) {
        if (cells[i] && cells[i] < kUnwritten) cells[i] = (cells[i] & ~kStamp) | rank(cells[i] & kStamp);
      }
    }
  };
  renumber_cells(state.threadgroup, 0, state.threadgroup.span);
  for (const Region& region : buffers) {
    size_t from = region.base - state.device.base;
    renumber_cells(state.device, from, from + region.size);
  }
  for (Window* window : {&state.threadgroup, &state.device}) {
    window->start = rank(window->start);
    window->fence = rank(window->fence);
    window->met = rank(window->met);
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
  window.fence = window.met = state.now;
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

bool watch(uintptr_t begin, uintptr_t end) {
  buffers.clear();
  return shadow(state.device, begin, end) && (watched = end - begin);
}

void begin_launch(const Region* regions, size_t count) {
  forget_pending();
  state.counts = {};
  state.elsewhere = {};
  state.launch++;
  begins.clear();
  for (const Region& region : buffers) forget_buffer(region);
  state.device.span = watched;
  buffers.assign(regions, regions + count);
  for (const Region& region : buffers) mark_buffer(region);
}

// The clock runs on from launch to launch, so that what is left of the last one is as old as any earlier threadgroup's.
void threadgroup_storage(uintptr_t begin, uintptr_t end) {
  Window& window = state.threadgroup;
  for (const Region& region : threadgroup_regions) fill(window, region.base, region.base + region.size, kGap);
  threadgroup_regions.clear();
  if (window.base == begin && window.span == end - begin) return;
  if (!shadow(window, begin, end)) {
    std::fprintf(stderr, "checked mode has no address space for the shadow of threadgroup memory\n");
    std::abort();
  }
  std::fill(window.w, window.w + (end - begin) + kMargin, kGap);
}

void begin_threadgroup(uint32_t linear_threadgroup) {
  settle();
  tick();
  for (Window* window : {&state.threadgroup, &state.device}) {
    window->start = state.now;
    fence_all(*window);  // before the clock moves: what it renumbers is in order
  }
  begins.push_back({state.now, linear_threadgroup, 0});
  state.fenced = false;
  tick();  // what has the first stamp lies before a fence
  for (Window* window : {&state.threadgroup, &state.device}) fence_all(*window);
}

void padding(uintptr_t base, size_t size, const bool* values, size_t period) {
  Window& window = state.threadgroup;
  Cell* cells = window.w + (base - window.base);
  for (size_t i = 0; i < size; i++)
    if (!values[i % period]) cells[i] = window.start;
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
  state.device.met = state.threadgroup.met = state.now;
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

bool judged(uintptr_t address) { return window_of(address) != nullptr; }

const Access* wild_access(uintptr_t address) {
  const Access& last = state.elsewhere;
  bool nowhere = !address && last.address >> 47 != 0;  // x86-64's user addresses have 47 bits
  return nowhere || address - last.address < last.size ? &last : nullptr;
}

Place nearest_region(const Window& window, uintptr_t address) {
  const std::vector<Region>& regions = &window == &state.device ? buffers : threadgroup_regions;
  Place best{{INT32_MIN, Space::device, address, 0, false, false}, 0};
  uintptr_t least = UINTPTR_MAX;
  for (const Region& region : regions) {
    uintptr_t end = region.base + region.size;
    // The gap above a buffer is twice the one below (address_space.cpp).
    uintptr_t below = (region.base - address) * (regions.data() == buffers.data() ? 2 : 1);
    uintptr_t distance = address < region.base ? below : address < end ? 0 : address - end + 1;
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
