// Operators of vectors: component by component, a scalar operand counting for every component.
// A comparison gives a vec<bool, N>; a result is rounded to the element type after each operation.
#pragma once

#include "vec.h"

namespace metal {
namespace detail {

// The joined type, only where at least one operand is a vector: scalars keep the language's own operators.
template <class A, class B, bool Vector = (width<A> > 1 || width<B> > 1)> struct vector_joined {};
template <class A, class B> struct vector_joined<A, B, true> : joined<A, B> {};
template <class A, class B> using vector_joined_t = typename vector_joined<A, B>::type;
template <class A> using vector_t = vector_joined_t<A, A>;

}  // namespace detail

#define MSL_VEC_BINARY(op)                                                                   \
  template <class A, class B, class V = detail::vector_joined_t<A, B>>                        \
  constexpr V operator op(const A& a, const B& b) {                                           \
    using T = typename V::element_type;                                                       \
    const V left(a), right(b);                                                                \
    V result;                                                                                 \
    for (int i = 0; i < V::size_of_vec; ++i) result.e[i] = static_cast<T>(left.e[i] op right.e[i]); \
    return result;                                                                            \
  }                                                                                           \
  template <class A, class B, class V = detail::vector_joined_t<A, B>,                        \
            enable_if_t<(detail::width<A> > 1), int> = 0>                                     \
  constexpr A& operator op##=(A& a, const B& b) {                                             \
    return a = V(a op b);                                                                     \
  }
MSL_VEC_BINARY(+)
MSL_VEC_BINARY(-)
MSL_VEC_BINARY(*)
MSL_VEC_BINARY(/)
MSL_VEC_BINARY(%)
MSL_VEC_BINARY(&)
MSL_VEC_BINARY(|)
MSL_VEC_BINARY(^)
#undef MSL_VEC_BINARY

#define MSL_VEC_COMPARISON(op)                                                               \
  template <class A, class B, class V = detail::vector_joined_t<A, B>>                        \
  constexpr detail::rebind_t<V, bool> operator op(const A& a, const B& b) {                   \
    const V left(a), right(b);                                                                \
    detail::rebind_t<V, bool> result;                                                         \
    for (int i = 0; i < V::size_of_vec; ++i) result.e[i] = left.e[i] op right.e[i];           \
    return result;                                                                            \
  }
MSL_VEC_COMPARISON(==)
MSL_VEC_COMPARISON(!=)
MSL_VEC_COMPARISON(<)
MSL_VEC_COMPARISON(<=)
MSL_VEC_COMPARISON(>)
MSL_VEC_COMPARISON(>=)
MSL_VEC_COMPARISON(&&)
MSL_VEC_COMPARISON(||)
#undef MSL_VEC_COMPARISON

// The left operand gives a shift its type; the count is taken modulo the width, as MSL has it.
#define MSL_VEC_SHIFT(op)                                                                    \
  template <class A, class B, class V = detail::vector_t<A>,                                  \
            enable_if_t<detail::width<B> == detail::width<A> || detail::width<B> == 1, int> = 0> \
  constexpr V operator op(const A& a, const B& b) {                                           \
    using T = typename V::element_type;                                                       \
    return detail::map<V>(                                                                    \
        [](T x, auto count) { return static_cast<T>(x op (count & (sizeof(T) * 8 - 1))); }, a, b); \
  }                                                                                           \
  template <class S, class B, class V = detail::vector_t<B>, enable_if_t<detail::width<S> == 1, int> = 0> \
  constexpr V operator op(S a, const B& b) {                                                  \
    return V(a) op V(b);                                                                      \
  }                                                                                           \
  template <class A, class B, class V = detail::vector_t<A>, enable_if_t<detail::width<B> != 0, int> = 0> \
  constexpr A& operator op##=(A& a, const B& b) {                                             \
    return a = V(a op b);                                                                     \
  }
MSL_VEC_SHIFT(<<)
MSL_VEC_SHIFT(>>)
#undef MSL_VEC_SHIFT

#define MSL_VEC_UNARY(op, R)                                                                 \
  template <class A, class V = detail::vector_t<A>>                                           \
  constexpr detail::rebind_t<V, R> operator op(const A& a) {                                  \
    return detail::map<detail::rebind_t<V, R>>([](auto x) { return static_cast<R>(op x); }, V(a)); \
  }
MSL_VEC_UNARY(-, typename V::element_type)
MSL_VEC_UNARY(+, typename V::element_type)
MSL_VEC_UNARY(~, typename V::element_type)
MSL_VEC_UNARY(!, bool)
#undef MSL_VEC_UNARY

#define MSL_VEC_STEP(op)                                                                     \
  template <class A, class V = detail::vector_t<A>>                                           \
  constexpr A& operator op##op(A& a) { return a = V(a op 1); }                                \
  template <class A, class V = detail::vector_t<A>>                                           \
  constexpr V operator op##op(A& a, int) {                                                    \
    const V before = a;                                                                       \
    a = V(a op 1);                                                                            \
    return before;                                                                            \
  }
MSL_VEC_STEP(+)
MSL_VEC_STEP(-)
#undef MSL_VEC_STEP

}  // namespace metal
