// What the parts of the worker process share: the mapped memory, the launch, and one function or two of each part.
#pragma once
#include "scheduler.h"

namespace rt {

constexpr unsigned kMostHostThreads = 64;

constexpr int kReported = 70;                                 // exit code: the control page has the fault that ended it
constexpr int kGuessed = 1, kSeen = 2;                        // Fault::op of an access outside: its buffer is a guess, or isn't

extern Control* shared;                                       // the start of the file that caller and worker map
extern Launch launch;
inline Control& control() { return *shared; }

[[noreturn]] void die(const char* what);                      // for what is no kernel's fault
void keep_checker_counts();
bool late();                                                  // whether the launch has had its time

struct Piece {                                                // a buffer, or several that overlap, in its own part of memory
  int buffer;
  uintptr_t begin, end;                                       // what is mapped, guard gaps included
  uintptr_t base;
  size_t size;
  bool writable;
};
struct Pieces {
  const Piece *first, *last;
  const Piece* begin() const { return first; }
  const Piece* end() const { return last; }
};
Pieces pieces();                                              // address_space.cpp
void map_buffers(int file);                                   // when the layout in the control page is another than before
char* address_of(unsigned buffer);
bool find_buffer(uintptr_t address, bool write, Fault& what, bool* guess);
bool lend_page(uintptr_t address, bool write);
void take_back_pages();

void fill_gaps();                                             // guard_gaps.cpp
void check_gaps();

void signal_stack();                                          // signals.cpp: once on every host thread
void catch_signals();
bool skip_division(void* context);                            // division.cpp: whether the signal came from one, which has its values now

void run_side_by_side(unsigned helpers);                      // host_threads.cpp
void run_alone();

}  // namespace rt
