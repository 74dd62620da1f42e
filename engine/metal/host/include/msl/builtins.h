// The __metal_* builtins under Apple's headers that kernels call themselves (MLX does, to give bfloat its math
// functions): each is the function without the prefix, its last argument (fast or precise) ignored.
#pragma once

#include "math.h"
#include "quadgroup.h"

#define __METAL_MAYBE_FAST_MATH__ 1
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0

#define MSL_BUILTIN(name) \
  METAL_FUNC float __metal_##name(float x, int) { return metal::name(x); }
#define MSL_BUILTIN2(name) \
  METAL_FUNC float __metal_##name(float x, float y, int) { return metal::name(x, y); }
#define MSL_BUILTIN3(name) \
  METAL_FUNC float __metal_##name(float x, float y, float z, int) { return metal::name(x, y, z); }
MSL_BUILTIN(fabs) MSL_BUILTIN(acos) MSL_BUILTIN(acosh) MSL_BUILTIN(asin) MSL_BUILTIN(asinh) MSL_BUILTIN(atan)
MSL_BUILTIN(atanh) MSL_BUILTIN(ceil) MSL_BUILTIN(cos) MSL_BUILTIN(cosh) MSL_BUILTIN(cospi) MSL_BUILTIN(exp)
MSL_BUILTIN(exp10) MSL_BUILTIN(exp2) MSL_BUILTIN(floor) MSL_BUILTIN(fract) MSL_BUILTIN(log) MSL_BUILTIN(log10)
MSL_BUILTIN(log2) MSL_BUILTIN(rint) MSL_BUILTIN(round) MSL_BUILTIN(rsqrt) MSL_BUILTIN(sin) MSL_BUILTIN(sinh)
MSL_BUILTIN(sinpi) MSL_BUILTIN(sqrt) MSL_BUILTIN(tan) MSL_BUILTIN(tanh) MSL_BUILTIN(tanpi) MSL_BUILTIN(trunc)
MSL_BUILTIN2(atan2) MSL_BUILTIN2(divide) MSL_BUILTIN2(fmax) MSL_BUILTIN2(fmin) MSL_BUILTIN2(fmod) MSL_BUILTIN2(pow)
MSL_BUILTIN2(powr)
MSL_BUILTIN3(fmax3) MSL_BUILTIN3(fmin3) MSL_BUILTIN3(fmedian3)
#undef MSL_BUILTIN
#undef MSL_BUILTIN2
#undef MSL_BUILTIN3
METAL_FUNC float __metal_fma(float x, float y, float z) { return metal::fma(x, y, z); }
METAL_FUNC float __metal_nextafter(float x, float y) { return metal::nextafter(x, y); }
METAL_FUNC float __metal_ldexp(float x, int k, int) { return metal::ldexp(x, k); }
METAL_FUNC float __metal_frexp(float x, int* exponent) { return metal::frexp(x, *exponent); }

#define MSL_BUILTIN_SIMD(name) \
  template <class T> METAL_FUNC T __metal_##name(T value) { return metal::name(value); }
#define MSL_BUILTIN_SHUFFLE(name) \
  template <class T> METAL_FUNC T __metal_##name(T value, ushort n) { return metal::name(value, n); }
MSL_BUILTIN_SIMD(simd_sum) MSL_BUILTIN_SIMD(simd_product) MSL_BUILTIN_SIMD(simd_min) MSL_BUILTIN_SIMD(simd_max)
MSL_BUILTIN_SIMD(simd_xor) MSL_BUILTIN_SIMD(simd_prefix_inclusive_sum) MSL_BUILTIN_SIMD(simd_prefix_exclusive_sum)
MSL_BUILTIN_SIMD(simd_prefix_inclusive_product) MSL_BUILTIN_SIMD(simd_prefix_exclusive_product)
MSL_BUILTIN_SHUFFLE(simd_shuffle) MSL_BUILTIN_SHUFFLE(simd_broadcast) MSL_BUILTIN_SHUFFLE(simd_shuffle_xor)
MSL_BUILTIN_SHUFFLE(simd_shuffle_up) MSL_BUILTIN_SHUFFLE(simd_shuffle_down)
MSL_BUILTIN_SHUFFLE(simd_shuffle_rotate_up) MSL_BUILTIN_SHUFFLE(simd_shuffle_rotate_down)
#undef MSL_BUILTIN_SIMD
#undef MSL_BUILTIN_SHUFFLE
template <class T> METAL_FUNC T __metal_simd_shuffle_and_fill_up(T data, T filling, ushort delta, ushort modulo) {
  return metal::simd_shuffle_and_fill_up(data, filling, delta, modulo);
}
template <class T> METAL_FUNC T __metal_simd_shuffle_and_fill_down(T data, T filling, ushort delta, ushort modulo) {
  return metal::simd_shuffle_and_fill_down(data, filling, delta, modulo);
}
template <class T> METAL_FUNC T __metal_get_simdgroup_size(T) { return T(rt::kSimdWidth); }
template <class T> METAL_FUNC T __metal_get_thread_index_in_simdgroup(T) { return T(rt::self().lane); }
