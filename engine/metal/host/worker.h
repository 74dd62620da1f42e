// What the parts of the worker process share: the mapped memory, the launch, and one function or two of each part.
#pragma once
#include "scheduler.h"

namespace rt {

constexpr unsigned kMostHostThreads = 64;

extern char* shared;                                          // the file that caller and worker map: a Control, then the buffers
extern size_t shared_bytes;
extern Launch launch;
inline Control& control() { return *reinterpret_cast<Control*>(shared); }

[[noreturn]] void die(const char* what);                      // for what is no kernel's fault
void keep_checker_counts();

void fill_gaps();                                             // guard_gaps.cpp
void check_gaps();

void signal_stack();                                          // signals.cpp: once on every host thread
void catch_signals();

void run_side_by_side(unsigned helpers);                      // host_threads.cpp
void run_alone();

}  // namespace rt
