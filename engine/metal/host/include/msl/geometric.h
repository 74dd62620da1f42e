// metal_geometric: dot, length, cross … of floating-point vectors. Sums run from the first component to the last in
// the element type, rounding after each step; Apple does not document the order.
#pragma once

#include "math.h"

namespace metal {

#define MSL_GEOMETRIC1(name, R, expression)                                     \
  template <class A, class V = detail::vector_t<A>>                              \
  constexpr R name(const A& a) {                                                 \
    const V x(a);                                                                \
    return expression;                                                           \
  }                                                                              \
  MSL_BOTH(name)
#define MSL_GEOMETRIC2(name, R, expression)                                     \
  template <class A, class B, class V = detail::vector_joined_t<A, B>>           \
  constexpr R name(const A& a, const B& b) {                                     \
    const V x(a), y(b);                                                          \
    return expression;                                                           \
  }                                                                              \
  MSL_BOTH(name)

template <class A, class B, class V = detail::vector_joined_t<A, B>>
constexpr detail::element_t<V> dot(const A& a, const B& b) {
  using T = detail::element_t<V>;
  const V x(a), y(b);
  T sum = static_cast<T>(x.e[0] * y.e[0]);
  for (int i = 1; i < V::size_of_vec; ++i) sum = static_cast<T>(sum + static_cast<T>(x.e[i] * y.e[i]));
  return sum;
}
MSL_BOTH(dot)

MSL_GEOMETRIC1(length_squared, detail::element_t<V>, dot(x, x))
MSL_GEOMETRIC1(length, detail::element_t<V>, sqrt(dot(x, x)))
MSL_GEOMETRIC1(normalize, V, x * rsqrt(dot(x, x)))
MSL_GEOMETRIC2(distance_squared, detail::element_t<V>, dot(x - y, x - y))
MSL_GEOMETRIC2(distance, detail::element_t<V>, length(x - y))
// x is the incident direction, y the normal.
MSL_GEOMETRIC2(reflect, V, x - y * static_cast<detail::element_t<V>>(detail::element_t<V>(2) * dot(y, x)))
#undef MSL_GEOMETRIC1
#undef MSL_GEOMETRIC2

template <class A, class B, class V = detail::vector_joined_t<A, B>>
constexpr V cross(const A& a, const B& b) {
  const V x(a), y(b);
  return x.yzx * y.zxy - x.zxy * y.yzx;
}
MSL_BOTH(cross)

template <class N, class I, class R, class V = detail::vector_joined_t<N, I>>
constexpr V faceforward(const N& normal, const I& incident, const R& reference) {
  return dot(reference, incident) < detail::element_t<V>(0) ? V(normal) : V(-normal);
}
MSL_BOTH(faceforward)

template <class I, class N, class V = detail::vector_joined_t<I, N>>
constexpr V refract(const I& incident, const N& normal, detail::element_t<V> ratio) {
  using T = detail::element_t<V>;
  const T cosine = dot(normal, incident);
  const T k = static_cast<T>(T(1) - ratio * ratio * (T(1) - cosine * cosine));
  if (k < T(0)) return V(T(0));
  return incident * ratio - normal * static_cast<T>(ratio * cosine + sqrt(k));
}
MSL_BOTH(refract)

}  // namespace metal
