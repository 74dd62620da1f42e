// The worker process: loads kernels, runs launches that its caller describes in shared memory, and dies of what they do.
//
// Commands come over a pipe: 'L' length path loads a module and answers with its kernels; 'R' size runs the launch in the
// control page and answers 'D'. A signal that a kernel raises is written into the control page as a fault; then the worker
// ends and its caller starts another.
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include <initializer_list>

#include "scheduler.h"

#ifdef ASSAY_CHECKED
#include "check.h"
#endif

namespace rt {
namespace {

constexpr unsigned kMostKernels = 8192;
constexpr unsigned kMostHostThreads = 64;
constexpr uintptr_t kModuleSpan = 256u << 20;                 // no module is larger; addresses past its end name no line

struct Loaded {
  Kernel kernel;
  uintptr_t base;
};
Loaded kernels[kMostKernels];
uint32_t kernel_count = 0;

char* shared = nullptr;
size_t shared_bytes = 0;
int shared_fd = -1;
Launch launch;
Scheduler* schedulers[kMostHostThreads];

Control& control() { return *reinterpret_cast<Control*>(shared); }

[[noreturn]] void die(const char* what) {
  fprintf(stderr, "assay worker: %s: %s\n", what, strerror(errno));
  _exit(71);
}

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

// ---- guard gaps ---------------------------------------------------------------------------------------------------

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

// ---- signals ------------------------------------------------------------------------------------------------------

// `caller`: where the return address is while a function has no frame of its own yet, the link register or (top of) the
// stack. Checked kernels spend much of their time in callbacks that short.
void machine_state(void* context, uintptr_t* pc, uintptr_t* frame, uintptr_t* caller) {
  auto* state = static_cast<ucontext_t*>(context);
#if defined(__APPLE__) && defined(__aarch64__)
  *pc = uintptr_t(state->uc_mcontext->__ss.__pc), *frame = uintptr_t(state->uc_mcontext->__ss.__fp);
  *caller = uintptr_t(state->uc_mcontext->__ss.__lr);
#elif defined(__APPLE__)
  *pc = state->uc_mcontext->__ss.__rip, *frame = state->uc_mcontext->__ss.__rbp;
  *caller = state->uc_mcontext->__ss.__rsp;
#elif defined(__aarch64__)
  *pc = state->uc_mcontext.pc, *frame = state->uc_mcontext.regs[29];
  *caller = state->uc_mcontext.regs[30];
#else
  *pc = uintptr_t(state->uc_mcontext.gregs[16]), *frame = uintptr_t(state->uc_mcontext.gregs[10]);  // REG_RIP, REG_RBP
  *caller = uintptr_t(state->uc_mcontext.gregs[15]);                                              // REG_RSP
#endif
}

void locate(uintptr_t address, Fault& what) {
  what.offset = int64_t(address);
  if (scheduler && scheduler->find_region(address, &what.buffer, &what.offset, &what.bound)) {
    what.space = space_threadgroup;
    return;
  }
  uintptr_t base = reinterpret_cast<uintptr_t>(shared);
  if (address + (1u << 20) < base || address > base + shared_bytes + (16u << 20)) return;
  for (int i = 0; i < int(kMaxBuffers); i++) {
    const Binding& buffer = control().buffers[i];
    if (!buffer.present || (what.buffer >= 0 && address < base + buffer.offset)) continue;
    what.buffer = i;
    what.space = space_device;
    what.offset = int64_t(address) - int64_t(base + buffer.offset);
    what.bound = int64_t(buffer.size);
  }
}

void keep_checker_counts();

void on_signal(int number, siginfo_t* info, void* context) {
  uintptr_t pc, frame, caller, address = reinterpret_cast<uintptr_t>(info->si_addr);
  machine_state(context, &pc, &frame, &caller);
  Fault what = fault(number == SIGALRM ? kind_timeout : kind_crash);
  what.op = number;
  what.pcs[0] = pc + 1;                                       // others are return addresses: behind the call
  const Fiber* fiber = scheduler ? scheduler->running_fiber() : nullptr;
  unsigned count = 1;
  if (fiber && frame >= fiber->low() && frame < fiber->high())
    count += backtrace(reinterpret_cast<void*>(frame), what.pcs + 1, kFrames - 3);
#if defined(__x86_64__)
  if (fiber && caller >= fiber->low() && caller + 16 < fiber->high()) memcpy(&what.pcs[count], reinterpret_cast<void*>(caller), 16);
#else
  what.pcs[count] = caller;
#endif                                                        // last, and dropped if they lie outside the kernel's module
  if (number == SIGSEGV || number == SIGBUS) {
    if (fiber && address < fiber->low() && address + kGuardBytes >= fiber->low())
      snprintf(what.message, sizeof what.message, "the thread's stack of %zu KiB overflowed", kStackBytes / 1024);
    else
      locate(address, what);
  }
  keep_checker_counts();
  if (!record_unlocked(what)) control().faults[kMostFaults - 1] = what;
  _exit(70);
}

void signal_stack() {
  stack_t stack{};
  stack.ss_size = 128 * 1024;
  stack.ss_sp = malloc(stack.ss_size);
  sigaltstack(&stack, nullptr);
}

void catch_signals() {
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGALRM}) sigaction(number, &action, nullptr);
}

// ---- host threads -------------------------------------------------------------------------------------------------

struct Pool {
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
  unsigned threads = 0, wanted = 0, busy = 0;
  uint64_t turn = 0;
} pool;
uint32_t next_threadgroup, total_threadgroups;

void work(Scheduler& own) {
  scheduler = &own;
  own.begin_launch(launch);
  for (uint32_t taken; (taken = __atomic_fetch_add(&next_threadgroup, 1, __ATOMIC_RELAXED)) < total_threadgroups;) own.run(taken);
}

Scheduler& scheduler_of(unsigned index) {
  if (!schedulers[index]) {
    schedulers[index] = new Scheduler();
    if (!schedulers[index]->create()) die("no memory for threadgroups");
  }
  return *schedulers[index];
}

void* host_thread(void* argument) {
  unsigned index = unsigned(reinterpret_cast<uintptr_t>(argument));
  uint64_t seen = 0;
  signal_stack();
  pthread_mutex_lock(&pool.lock);
  for (;;) {
    while (pool.turn == seen || index > pool.wanted) {
      seen = pool.turn;
      pthread_cond_wait(&pool.wake, &pool.lock);
    }
    seen = pool.turn;
    pthread_mutex_unlock(&pool.lock);
    work(*schedulers[index]);
    pthread_mutex_lock(&pool.lock);
    if (--pool.busy == 0) pthread_cond_signal(&pool.done);
  }
}

void run_on(unsigned helpers) {
  if (helpers > kMostHostThreads - 1) helpers = kMostHostThreads - 1;
  pthread_mutex_lock(&pool.lock);
  while (pool.threads < helpers) {
    scheduler_of(++pool.threads);
    pthread_t made;
    if (pthread_create(&made, nullptr, host_thread, reinterpret_cast<void*>(uintptr_t(pool.threads)))) die("no host thread");
  }
  pool.wanted = pool.busy = helpers;
  if (helpers) pool.turn++, pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.lock);
  work(scheduler_of(0));
  pthread_mutex_lock(&pool.lock);
  while (pool.busy) pthread_cond_wait(&pool.done, &pool.lock);
  pthread_mutex_unlock(&pool.lock);
  Counts& sum = control().counts;
  for (unsigned i = 0; i <= helpers; i++) {
    sum.threadgroups += schedulers[i]->counts.threadgroups;
    sum.barriers += schedulers[i]->counts.barriers;
    sum.matrix_ops += schedulers[i]->counts.matrix_ops;
    if (schedulers[i]->threadgroup_bytes() > sum.threadgroup_bytes) sum.threadgroup_bytes = schedulers[i]->threadgroup_bytes();
  }
}

// On one host thread, in order or in one drawn from the seed: the same seed gives the same run.
void run_alone() {
  Scheduler& own = scheduler_of(0);
  scheduler = &own;
  own.begin_launch(launch);
  uint32_t* order = static_cast<uint32_t*>(malloc(sizeof(uint32_t) * total_threadgroups));
  for (uint32_t i = 0; i < total_threadgroups; i++) order[i] = i;
  uint64_t state = launch.seed * 2862933555777941757u + 3037000493u;
  for (uint32_t i = launch.seeded ? total_threadgroups : 0; i > 1; i--) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;  // xorshift64 (Marsaglia 2003)
    uint32_t other = uint32_t(state % i), kept = order[i - 1];
    order[i - 1] = order[other], order[other] = kept;
  }
  for (uint32_t i = 0; i < total_threadgroups; i++) own.run(order[i]);
  free(order);
  control().counts = own.counts;
  control().counts.threadgroup_bytes = own.threadgroup_bytes();
}

// ---- checked mode -------------------------------------------------------------------------------------------------

#ifdef ASSAY_CHECKED
void begin_checks() {
  check::Region regions[kMaxBuffers];
  size_t count = 0;
  for (unsigned i = 0; i < launch.kernel->count; i++) {
    const Parameter& parameter = launch.kernel->parameters[i];
    if (parameter.kind != param_buffer) continue;
    const Binding& buffer = control().buffers[parameter.index];
    check::Space space = buffer.constant ? check::Space::constant : check::Space::device;
    regions[count++] = {parameter.index, space, reinterpret_cast<uintptr_t>(shared + buffer.offset), buffer.size,
                        buffer.writable != 0, buffer.initialised != 0};
  }
  uintptr_t base = reinterpret_cast<uintptr_t>(shared);
  check::begin_launch(regions, count, base + control().arena_begin, base + control().arena_end);
}

void keep_checker_counts() {
  for (unsigned i = 0; i < 3; i++) {
    control().counts.loads[i] = check::stats().loads[i];
    control().counts.stores[i] = check::stats().stores[i];
  }
}
#else
void begin_checks() {}
void keep_checker_counts() {}
#endif

// ---- commands -----------------------------------------------------------------------------------------------------

void map_shared(size_t bytes) {
  if (bytes == shared_bytes) return;
  if (shared) munmap(shared, shared_bytes);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
  if (memory == MAP_FAILED) die("shared memory");
  shared = static_cast<char*>(memory);
  shared_bytes = bytes;
}

void prepare() {
  Control& given = control();
  const Kernel& kernel = kernels[given.kernel].kernel;
  set_modules(kernels[given.kernel].base, kernels[given.kernel].base + kModuleSpan);
  begin_recording(&given);
  memset(&given.counts, 0, sizeof given.counts);
  launch.kernel = &kernel;
  launch.threadgroups = given.threadgroups, launch.threads = given.threads, launch.grid = given.grid;
  launch.poison = given.flags & flag_poison, launch.seeded = given.flags & flag_seeded;
  launch.seed = launch.seeded ? given.seed : 0;
  memcpy(launch.threadgroup_memory, given.threadgroup_memory, sizeof launch.threadgroup_memory);
  for (unsigned i = 0; i < kernel.count; i++)
    launch.addresses[i] = kernel.parameters[i].kind == param_buffer ? shared + given.buffers[kernel.parameters[i].index].offset : nullptr;
  if (given.flags & flag_fresh_canaries) each_gap([](char* begin, char* end, int, int) { fill(begin, end); });
  next_threadgroup = 0;
  total_threadgroups = given.threadgroups.x * given.threadgroups.y * given.threadgroups.z;
}

void run() {
  prepare();
  itimerval limit{};
  limit.it_value.tv_sec = time_t(control().timeout_microseconds / 1000000);
  limit.it_value.tv_usec = suseconds_t(control().timeout_microseconds % 1000000);
  begin_checks();
  setitimer(ITIMER_REAL, &limit, nullptr);
  uint64_t started = now();
#ifdef ASSAY_CHECKED
  run_alone();
#else
  if (launch.seeded) run_alone();
  else run_on(control().host_threads - 1);
#endif
  control().counts.nanoseconds = now() - started;
  limit.it_value = {};
  setitimer(ITIMER_REAL, &limit, nullptr);
#ifdef ASSAY_CHECKED
  check::end_launch();
#endif
  keep_checker_counts();
  each_gap([](char* begin, char* end, int before, int after) {
    if (!intact(begin, end)) report_gap(begin, end, before, after);
  });
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
      say("\t%u:%u:%d:%d:%d", info.size, info.align, int(info.is_const), int(info.is_pointer), int(info.is_reference));
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
      uint64_t bytes;
      if (!read_all(commands, &bytes, sizeof bytes)) return 1;
      map_shared(size_t(bytes));
      run();
      write_all(answers, "D", 1);
    } else {
      return 1;
    }
  }
  return 0;
}

}  // namespace

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
  rt::signal_stack();
  rt::catch_signals();
  return rt::serve(atoi(arguments[2]), atoi(arguments[3]));
}
