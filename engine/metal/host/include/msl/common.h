// metal_common, and what works on integers and floating-point values alike: abs, min, max, clamp, mix, step,
// smoothstep, sign …
//
// The minimum and maximum of floating-point values ignore a NaN, as fmin and fmax do. Every function exists in
// metal::fast and metal::precise as well; the fast ones are exact here (their ranges and errors on a GPU are not
// modelled).
#pragma once

#include "relational.h"

// Both math namespaces name the same function.
#define MSL_BOTH(name)                        \
  namespace fast { using metal::name; }       \
  namespace precise { using metal::name; }

namespace metal {
namespace detail {

template <class T> constexpr T smaller(T a, T b) {
  if constexpr (is_floating_point_v<T>) {
    if (a != a) return b;
    if (b != b) return a;
  }
  return b < a ? b : a;
}
template <class T> constexpr T larger(T a, T b) {
  if constexpr (is_floating_point_v<T>) {
    if (a != a) return b;
    if (b != b) return a;
  }
  return a < b ? b : a;
}
template <class T> constexpr T magnitude(T a) {
  if constexpr (is_same_v<T, float>) return __builtin_fabsf(a);
  else if constexpr (is_floating_point_v<T>)
    return __builtin_bit_cast(T, static_cast<uint16_t>(__builtin_bit_cast(uint16_t, a) & 0x7fff));
  else return a < T(0) ? static_cast<T>(T(0) - a) : a;
}

}  // namespace detail

#define MSL_TWO(name, f)                                                                \
  template <class A, class B, class V = detail::joined_t<A, B>>                          \
  constexpr V name(const A& a, const B& b) {                                             \
    return detail::map<V>([](auto x, auto y) { return f(x, y); }, V(a), V(b));           \
  }                                                                                      \
  MSL_BOTH(name)
MSL_TWO(min, detail::smaller)
MSL_TWO(max, detail::larger)
MSL_TWO(fmin, detail::smaller)
MSL_TWO(fmax, detail::larger)
#undef MSL_TWO

#define MSL_THREE(name, expression)                                                     \
  template <class A, class B, class C, class V = detail::joined3_t<A, B, C>>             \
  constexpr V name(const A& a, const B& b, const C& c) {                                 \
    return detail::map<V>([](auto x, auto y, auto z) { return expression; }, V(a), V(b), V(c)); \
  }                                                                                      \
  MSL_BOTH(name)
MSL_THREE(min3, detail::smaller(x, detail::smaller(y, z)))
MSL_THREE(max3, detail::larger(x, detail::larger(y, z)))
MSL_THREE(fmin3, detail::smaller(x, detail::smaller(y, z)))
MSL_THREE(fmax3, detail::larger(x, detail::larger(y, z)))
MSL_THREE(median3, detail::larger(detail::smaller(x, y), detail::smaller(detail::larger(x, y), z)))
MSL_THREE(fmedian3, detail::larger(detail::smaller(x, y), detail::smaller(detail::larger(x, y), z)))
MSL_THREE(clamp, detail::smaller(detail::larger(x, y), z))
#undef MSL_THREE

template <class A, class V = detail::value_t<A>>
constexpr V abs(const A& a) {
  return detail::map<V>([](auto x) { return detail::magnitude(x); }, V(a));
}
MSL_BOTH(abs)

namespace detail {

// The type a floating-point function answers in: integers (and double literals) count as float.
template <class V> struct floating { using type = conditional_t<is_floating_point_v<V>, V, float>; };
template <class T, int N> struct floating<vec<T, N>> { using type = vec<T, N>; };
template <class V> using floating_t = typename floating<V>::type;
template <class A> using float1_t = floating_t<value_t<A>>;
template <class A, class B> using float2_t = floating_t<joined_t<A, B>>;
template <class A, class B, class C> using float3_t = floating_t<joined3_t<A, B, C>>;

}  // namespace detail

// half and bfloat are computed in float and rounded once at the end.
#define MSL_FLOAT1(name, expression)                                                    \
  template <class A, class V = detail::float1_t<A>>                                      \
  constexpr V name(const A& a) {                                                         \
    using T = detail::element_t<V>;                                                      \
    return detail::map<V>([](T v) { const float x(v); return static_cast<T>(expression); }, V(a)); \
  }                                                                                      \
  MSL_BOTH(name)
#define MSL_FLOAT2(name, expression)                                                    \
  template <class A, class B, class V = detail::float2_t<A, B>>                          \
  constexpr V name(const A& a, const B& b) {                                             \
    using T = detail::element_t<V>;                                                      \
    return detail::map<V>(                                                               \
        [](T v, T w) { const float x(v), y(w); return static_cast<T>(expression); }, V(a), V(b)); \
  }                                                                                      \
  MSL_BOTH(name)
#define MSL_FLOAT3(name, expression)                                                    \
  template <class A, class B, class C, class V = detail::float3_t<A, B, C>>              \
  constexpr V name(const A& a, const B& b, const C& c) {                                 \
    using T = detail::element_t<V>;                                                      \
    return detail::map<V>(                                                               \
        [](T v, T w, T u) { const float x(v), y(w), z(u); return static_cast<T>(expression); }, V(a), V(b), V(c)); \
  }                                                                                      \
  MSL_BOTH(name)

namespace detail {

constexpr float clamped(float x, float low, float high) { return smaller(larger(x, low), high); }
constexpr float smooth(float low, float high, float x) {
  const float t = clamped((x - low) / (high - low), 0.0f, 1.0f);
  return t * t * (3.0f - 2.0f * t);
}

}  // namespace detail

MSL_FLOAT1(saturate, detail::clamped(x, 0.0f, 1.0f))
MSL_FLOAT1(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? x : 0.0f)
MSL_FLOAT2(step, y < x ? 0.0f : 1.0f)
MSL_FLOAT3(mix, x + (y - x) * z)
MSL_FLOAT3(smoothstep, detail::smooth(x, y, z))

}  // namespace metal
