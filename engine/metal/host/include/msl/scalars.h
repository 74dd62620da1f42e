// Scalar types of the Metal Shading Language: half is _Float16, the sized integers are the host's, size_t is 64 bits
// wide.
//
// half relies on the compiler rounding after every operation: build with -ffloat16-excess-precision=none. The literal
// operator stands for MSL's suffix in 1.h; C++ cannot declare one for 1.bf or 1.H: write half(1.) or bfloat(1.).
// Unsuffixed literals are float in MSL: the rewriter gives them their suffix before this is compiled. <cmath> and
// <math.h> stay out on purpose: their global pow, exp … would be overload candidates beside metal's under `using
// namespace metal`.
#pragma once

#include <float.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>

typedef _Float16 half;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

static_assert(sizeof(half) == 2 && sizeof(short) == 2 && sizeof(int) == 4, "MSL's scalar sizes");
static_assert(sizeof(long) == 8 && sizeof(size_t) == 8, "MSL's long and size_t have 64 bits");

#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wuser-defined-literals"
constexpr half operator""h(long double value) { return static_cast<half>(value); }
#pragma clang diagnostic pop

namespace metal {
using ::half;
using ::uchar;
using ::uint;
using ::ulong;
using ::ushort;
using ::size_t;
using ::ptrdiff_t;
using ::int8_t;
using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::uint8_t;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
}  // namespace metal
