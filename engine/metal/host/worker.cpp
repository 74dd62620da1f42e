// The worker process: loads kernels, runs launches that its caller describes in shared memory, and dies of what they do.
//
// Commands come over a pipe: 'L' length path loads a module and answers with its kernels; 'R' runs the launch in the control
// page and answers 'D'. A signal that a kernel raises is written into the control page as a fault; then the worker
// ends and its caller starts another.
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "worker.h"

#ifdef ASSAY_CHECKED
#include "check.h"
#endif

namespace rt {

Control* shared = nullptr;
Launch launch;

void die(const char* what) {
  fprintf(stderr, "assay worker: %s: %s\n", what, strerror(errno));
  _exit(71);
}

namespace {

constexpr unsigned kMostKernels = 8192;
constexpr uintptr_t kModuleSpan = 256u << 20;                 // no module is larger; addresses past its end name no line

struct Loaded {
  Kernel kernel;
  uintptr_t base;
};
Loaded kernels[kMostKernels];
uint32_t kernel_count = 0;

int shared_fd = -1;
pid_t caller = 0;
uint64_t deadline = 0;

bool read_all(int fd, void* to, size_t bytes) {
  for (char* at = static_cast<char*>(to); bytes;) {
    ssize_t got = read(fd, at, bytes);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    at += got, bytes -= size_t(got);
  }
  return true;
}

void write_all(int fd, const void* from, size_t bytes) {
  for (const char* at = static_cast<const char*>(from); bytes;) {
    ssize_t put = write(fd, at, bytes);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) _exit(0);
    at += put, bytes -= size_t(put);
  }
}

uint64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return uint64_t(time.tv_sec) * 1000000000u + uint64_t(time.tv_nsec);
}

// ---- checked mode -------------------------------------------------------------------------------------------------

#ifdef ASSAY_CHECKED
void begin_checks() {
  check::Region regions[kMaxBuffers];
  size_t count = 0;
  for (const Piece& piece : pieces()) {
    const Binding& buffer = control().buffers[piece.buffer];
    check::Space space = buffer.constant ? check::Space::constant : check::Space::device;
    regions[count++] = {piece.buffer, space, piece.base, piece.size, piece.writable, buffer.initialised != 0};
  }
  check::begin_launch(regions, count);
}

#else
void begin_checks() {}
#endif

// ---- commands -----------------------------------------------------------------------------------------------------

void map_control() {
  void* memory = mmap(nullptr, kControlBytes, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
  if (memory == MAP_FAILED) die("shared memory");
  shared = static_cast<Control*>(memory);
}

void prepare() {
  Control& given = control();
  const Kernel& kernel = kernels[given.kernel].kernel;
  set_modules(kernels[given.kernel].base, kernels[given.kernel].base + kModuleSpan);
  begin_recording(&given);
  if (given.flags & flag_fresh_layout) map_buffers(shared_fd);
  memset(&given.counts, 0, sizeof given.counts);
  launch.kernel = &kernel;
  launch.threadgroups = given.threadgroups, launch.threads = given.threads, launch.grid = given.grid;
  launch.poison = given.flags & flag_poison, launch.seeded = given.flags & flag_seeded;
  launch.seed = launch.seeded ? given.seed : 0;
  memcpy(launch.threadgroup_memory, given.threadgroup_memory, sizeof launch.threadgroup_memory);
  for (unsigned i = 0; i < kernel.count; i++)
    launch.addresses[i] = kernel.parameters[i].kind == param_buffer ? address_of(kernel.parameters[i].index) : nullptr;
  if (given.flags & flag_fresh_layout) fill_gaps();
}

// The time limit, in ticks of a second at most: a worker whose caller has died in the middle of a launch ends at the next.
void set_timer(uint64_t microseconds) {
  constexpr uint64_t tick = 1000000;
  itimerval timer{};
  uint64_t first = microseconds < tick ? microseconds : tick;
  timer.it_value.tv_sec = time_t(first / tick), timer.it_value.tv_usec = suseconds_t(first % tick);
  if (microseconds > tick) timer.it_interval.tv_sec = 1;
  setitimer(ITIMER_REAL, &timer, nullptr);
}

void run() {
  prepare();
  begin_checks();
  uint64_t started = now();
  deadline = started + control().timeout_microseconds * 1000;
  set_timer(control().timeout_microseconds);
#ifdef ASSAY_CHECKED
  run_alone();
#else
  if (launch.seeded) run_alone();
  else run_side_by_side(control().host_threads - 1);
#endif
  control().counts.nanoseconds = now() - started;
  set_timer(0);
#ifdef ASSAY_CHECKED
  check::end_launch();
#endif
  keep_checker_counts();
  take_back_pages();
  check_gaps();
}

void load(const char* path, int answer) {
  uint32_t first = kernel_count;
  static char text[1 << 20];
  size_t used = 0;
  auto say = [&](auto... arguments) {
    int wrote = snprintf(text + used, sizeof text - used, arguments...);
    if (wrote > 0 && used + size_t(wrote) < sizeof text) used += size_t(wrote);
  };
  if (!dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
    say("error %s", dlerror());
  }
  for (uint32_t i = first; i < kernel_count; i++) {
    const Kernel& kernel = kernels[i].kernel;
    say("%u\t%s", i, kernel.name);
    for (unsigned p = 0; p < kernel.count; p++) {
      const ParameterInfo& info = kernel.infos[p];
      say("\t%u:%u:%d:%d:%d:%d:%d", info.size, info.align, int(info.is_const), int(info.is_pointer), int(info.is_reference),
          int(info.element), int(info.element_size));
    }
    say("%s", "\n");
  }
  uint32_t length = uint32_t(used);
  write_all(answer, &length, sizeof length);
  write_all(answer, text, used);
}

int serve(int commands, int answers) {
  char command;
  while (read_all(commands, &command, 1)) {
    if (command == 'L') {
      uint32_t length;
      static char path[8192];
      if (!read_all(commands, &length, sizeof length) || length >= sizeof path || !read_all(commands, path, length)) return 1;
      path[length] = 0;
      load(path, answers);
    } else if (command == 'R') {
      run();
      write_all(answers, "D", 1);
    } else {
      return 1;
    }
  }
  return 0;
}

}  // namespace

bool late() {
  if (getppid() != caller) _exit(0);
  uint64_t time = now();
  if (time < deadline && deadline - time < 1000000000) set_timer((deadline - time) / 1000 + 1);
  return time >= deadline;
}

void keep_checker_counts() {
#ifdef ASSAY_CHECKED
  for (unsigned i = 0; i < 3; i++) {
    control().counts.loads[i] = check::stats().loads[i];
    control().counts.stores[i] = check::stats().stores[i];
  }
#endif
}

void register_kernel(const Kernel& kernel) {
  if (kernel_count == kMostKernels) die("too many kernels");
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(kernel.invoke), &info);
  kernels[kernel_count].kernel = kernel;
  kernels[kernel_count++].base = reinterpret_cast<uintptr_t>(info.dli_fbase);
}

}  // namespace rt

// Arguments: the descriptors of the shared file, of the commands and of the answers.
int main(int count, char** arguments) {
  if (count != 4) return 2;
  rt::shared_fd = atoi(arguments[1]);
  rt::caller = getppid();
  rt::map_control();
  rt::signal_stack();
  rt::catch_signals();
  return rt::serve(atoi(arguments[2]), atoi(arguments[3]));
}
