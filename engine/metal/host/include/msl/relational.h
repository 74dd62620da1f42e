// metal_relational: classification, select, any and all. Classification looks at bits, so no compiler flag can fold
// it away.
#pragma once

#include "limits.h"
#include "vec_types.h"

namespace metal {
namespace detail {

// Absent for types that are neither floating-point nor vectors of such: users' own isnan(complex) is not hidden.
template <class A, class V = value_t<A>> using float_bool_t =
    enable_if_t<is_floating_point_v<element_t<V>>, rebind_t<V, bool>>;

struct bits_of_float { uint32_t sign, exponent, fraction; };
template <class T> constexpr bits_of_float split(T value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(value));
  return {bits >> 31, (bits >> 23) & 0xff, bits & 0x7fffff};
}
// Zero exponent in T's own format: a half subnormal is a normal float.
template <class T> constexpr bool is_subnormal_or_zero(T value) {
  const float magnitude = __builtin_fabsf(static_cast<float>(value));
  return magnitude < static_cast<float>(numeric_limits<T>::min());
}

}  // namespace detail

#define MSL_CLASSIFY(name, test)                                                        \
  template <class A, class R = detail::float_bool_t<A>>                                  \
  constexpr R name(const A& a) {                                                         \
    return detail::map<R>(                                                               \
        [](auto x) {                                                                     \
          const auto b = detail::split(x);                                               \
          return test;                                                                   \
        },                                                                               \
        a);                                                                              \
  }
MSL_CLASSIFY(isnan, b.exponent == 0xff && b.fraction != 0)
MSL_CLASSIFY(isinf, b.exponent == 0xff && b.fraction == 0)
MSL_CLASSIFY(isfinite, b.exponent != 0xff)
MSL_CLASSIFY(isnormal, b.exponent != 0xff && !detail::is_subnormal_or_zero(x))
MSL_CLASSIFY(signbit, b.sign != 0)
#undef MSL_CLASSIFY

#define MSL_COMPARE(name, test)                                                         \
  template <class A, class B, class V = detail::joined_t<A, B>>                          \
  constexpr detail::rebind_t<V, bool> name(const A& a, const B& b) {                     \
    return detail::map<detail::rebind_t<V, bool>>([](auto x, auto y) { return test; }, V(a), V(b)); \
  }
MSL_COMPARE(isequal, x == y)
MSL_COMPARE(isnotequal, x != y)
MSL_COMPARE(isgreater, x > y)
MSL_COMPARE(isgreaterequal, x >= y)
MSL_COMPARE(isless, x < y)
MSL_COMPARE(islessequal, x <= y)
MSL_COMPARE(islessgreater, x < y || x > y)
MSL_COMPARE(isordered, x == x && y == y)
MSL_COMPARE(isunordered, x != x || y != y)
#undef MSL_COMPARE

constexpr bool all(bool value) { return value; }
constexpr bool any(bool value) { return value; }
template <class A, class V = detail::vector_t<A>>
constexpr bool all(const A& a) {
  bool result = true;
  for (int i = 0; i < V::size_of_vec; ++i) result &= bool(detail::component(a, i));
  return result;
}
template <class A, class V = detail::vector_t<A>>
constexpr bool any(const A& a) {
  bool result = false;
  for (int i = 0; i < V::size_of_vec; ++i) result |= bool(detail::component(a, i));
  return result;
}

// condition ? b : a, component by component; for integer conditions any set bit counts as true.
template <class A, class B, class C, class V = detail::joined_t<A, B>, enable_if_t<(detail::width<C> > 0), int> = 0>
constexpr V select(const A& a, const B& b, const C& condition) {
  return detail::map<V>([](auto x, auto y, auto c) { return c ? y : x; }, V(a), V(b), condition);
}

}  // namespace metal
