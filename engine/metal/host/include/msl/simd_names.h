// <simd/simd.h>: the names that headers shared with a host program give Metal's types. Layouts are Metal's own.
#pragma once

#include "matrix.h"

namespace simd {
using namespace metal;
}

#define MSL_SIMD(name, T, n)          \
  using simd_##name##n = metal::T##n;  \
  using vector_##name##n = metal::T##n; \
  using simd_packed_##name##n = metal::packed_##T##n;
#define MSL_SIMDS(name, T) MSL_SIMD(name, T, 2) MSL_SIMD(name, T, 3) MSL_SIMD(name, T, 4)
MSL_SIMDS(char, char) MSL_SIMDS(uchar, uchar) MSL_SIMDS(short, short) MSL_SIMDS(ushort, ushort)
MSL_SIMDS(int, int) MSL_SIMDS(uint, uint) MSL_SIMDS(long, long) MSL_SIMDS(ulong, ulong)
MSL_SIMDS(half, half) MSL_SIMDS(float, float)
#undef MSL_SIMDS
#undef MSL_SIMD

#define MSL_SIMD_MATRIX(T, c, r) \
  using simd_##T##c##x##r = metal::T##c##x##r; \
  using matrix_##T##c##x##r = metal::T##c##x##r;
#define MSL_SIMD_MATRICES(T)                                                                     \
  MSL_SIMD_MATRIX(T, 2, 2) MSL_SIMD_MATRIX(T, 2, 3) MSL_SIMD_MATRIX(T, 2, 4) MSL_SIMD_MATRIX(T, 3, 2) \
  MSL_SIMD_MATRIX(T, 3, 3) MSL_SIMD_MATRIX(T, 3, 4) MSL_SIMD_MATRIX(T, 4, 2) MSL_SIMD_MATRIX(T, 4, 3) \
  MSL_SIMD_MATRIX(T, 4, 4)
MSL_SIMD_MATRICES(half) MSL_SIMD_MATRICES(float)
#undef MSL_SIMD_MATRICES
#undef MSL_SIMD_MATRIX
