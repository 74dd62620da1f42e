// Swizzles: v.zyx and v.bgr are members of the union that holds a vector's elements, so they can be read and assigned
// in place.
//
// A swizzle turns into the vec of its components wherever a value is wanted; functions of the shim take it as it is.
// What it is not is a vec, which templates deduce and `c ? a.xy : b.zw` joins: the rewriter (swizzles.py) puts a call
// behind every swizzle that is read, v.zyx(), which gives one; a vec answers such a call with itself. (Compiler
// properties would be vecs, but clang rejects operators between two dependent ones.) Repeated components (v.xx = w),
// which MSL rejects as a target, are not rejected here: the last one wins.
#pragma once

#include "bfloat.h"

namespace metal {

template <class T, int N> struct vec;
template <class T, int N> struct packed_vec;

namespace detail {

// Components I… of the N elements it shares its address with.
template <class T, int N, int... I>
struct swizzle {
  T e[N];
  using vector = vec<T, sizeof...(I)>;
  static constexpr int indices[] = {I...};

  constexpr operator vector() const { return vector(e[I]...); }
  constexpr vector operator()() const { return vector(e[I]...); }
  vector operator()() const volatile { return vector(e[I]...); }
  constexpr T& operator[](size_t i) { return e[indices[i]]; }
  constexpr const T& operator[](size_t i) const { return e[indices[i]]; }
  swizzle() = default;
  constexpr swizzle(const swizzle&) = default;
  // Assigning a swizzle copies what it names, not the elements it lies over.
  constexpr swizzle& operator=(const swizzle& other) { return *this = vector(other); }
  template <class A, enable_if_t<__is_convertible(const A&, vector), int> = 0>
  constexpr swizzle& operator=(const A& value) {
    const vector v = value;
    for (int i = 0; i < int(sizeof...(I)); ++i) e[indices[i]] = v.e[i];
    return *this;
  }
};

}  // namespace detail
}  // namespace metal

// MSL_TAKE declares one swizzle under its xyzw and rgba names.
#define MSL_TAKE(n, p, q, ...) detail::swizzle<T, n, __VA_ARGS__> p, q;

// Append one of the first n components: SECOND makes names of two letters, END of four.
#define MSL_END_2(n, p, q, ...) MSL_TAKE(n, p##x, q##r, __VA_ARGS__, 0) MSL_TAKE(n, p##y, q##g, __VA_ARGS__, 1)
#define MSL_END_3(n, p, q, ...) MSL_END_2(n, p, q, __VA_ARGS__) MSL_TAKE(n, p##z, q##b, __VA_ARGS__, 2)
#define MSL_END_4(n, p, q, ...) MSL_END_3(n, p, q, __VA_ARGS__) MSL_TAKE(n, p##w, q##a, __VA_ARGS__, 3)

#define MSL_THIRD(n, p, q, ...) MSL_TAKE(n, p, q, __VA_ARGS__) MSL_END_##n(n, p, q, __VA_ARGS__)
#define MSL_THIRDS_2(n, p, q, ...) \
  MSL_THIRD(n, p##x, q##r, __VA_ARGS__, 0) MSL_THIRD(n, p##y, q##g, __VA_ARGS__, 1)
#define MSL_THIRDS_3(n, p, q, ...) MSL_THIRDS_2(n, p, q, __VA_ARGS__) MSL_THIRD(n, p##z, q##b, __VA_ARGS__, 2)
#define MSL_THIRDS_4(n, p, q, ...) MSL_THIRDS_3(n, p, q, __VA_ARGS__) MSL_THIRD(n, p##w, q##a, __VA_ARGS__, 3)

#define MSL_SECOND(n, p, q, i, j) MSL_TAKE(n, p, q, i, j) MSL_THIRDS_##n(n, p, q, i, j)
#define MSL_SECONDS_2(n, p, q, i) MSL_SECOND(n, p##x, q##r, i, 0) MSL_SECOND(n, p##y, q##g, i, 1)
#define MSL_SECONDS_3(n, p, q, i) MSL_SECONDS_2(n, p, q, i) MSL_SECOND(n, p##z, q##b, i, 2)
#define MSL_SECONDS_4(n, p, q, i) MSL_SECONDS_3(n, p, q, i) MSL_SECOND(n, p##w, q##a, i, 3)

#define MSL_SWIZZLES_2 MSL_SECONDS_2(2, x, r, 0) MSL_SECONDS_2(2, y, g, 1)
#define MSL_SWIZZLES_3 MSL_SECONDS_3(3, x, r, 0) MSL_SECONDS_3(3, y, g, 1) MSL_SECONDS_3(3, z, b, 2)
#define MSL_SWIZZLES_4 \
  MSL_SECONDS_4(4, x, r, 0) MSL_SECONDS_4(4, y, g, 1) MSL_SECONDS_4(4, z, b, 2) MSL_SECONDS_4(4, w, a, 3)
