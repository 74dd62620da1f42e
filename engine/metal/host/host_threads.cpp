// Host threads that run threadgroups side by side, each with its own scheduler; or one that runs them in a given order.
#include <pthread.h>
#include <stdlib.h>

#include "worker.h"

namespace rt {
namespace {

struct Pool {
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
  unsigned threads = 0, wanted = 0, busy = 0;
  uint64_t turn = 0;
} pool;
Scheduler* schedulers[kMostHostThreads];
uint32_t next_threadgroup;

uint32_t total_threadgroups() { return launch.threadgroups.x * launch.threadgroups.y * launch.threadgroups.z; }

void work(Scheduler& own) {
  scheduler = &own;
  own.begin_launch(launch);
  uint32_t total = total_threadgroups();
  for (uint32_t taken; (taken = __atomic_fetch_add(&next_threadgroup, 1, __ATOMIC_RELAXED)) < total;) own.run(taken);
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

}  // namespace

void run_side_by_side(unsigned helpers) {
  if (helpers > kMostHostThreads - 1) helpers = kMostHostThreads - 1;
  next_threadgroup = 0;
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
  uint32_t total = total_threadgroups();
  uint32_t* order = static_cast<uint32_t*>(malloc(sizeof(uint32_t) * total));
  for (uint32_t i = 0; i < total; i++) order[i] = i;
  uint64_t state = launch.seed * 2862933555777941757u + 3037000493u;
  for (uint32_t i = launch.seeded ? total : 0; i > 1; i--) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;  // xorshift64 (Marsaglia 2003)
    uint32_t other = uint32_t(state % i), kept = order[i - 1];
    order[i - 1] = order[other], order[other] = kept;
  }
  for (uint32_t i = 0; i < total; i++) own.run(order[i]);
  free(order);
  control().counts = own.counts;
  control().counts.threadgroup_bytes = own.threadgroup_bytes();
}

}  // namespace rt
