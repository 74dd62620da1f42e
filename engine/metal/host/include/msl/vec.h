// vec<T, N> and packed_vec<T, N>: storage, constructors, indexing. Operators are in vec_ops.h, aliases in
// vec_types.h.
//
// Class templates, because clang's ext_vector_type knows neither float4(a, b, c, d) nor float4{xy, xy}. A vec of 3
// has the size and the alignment of one of 4, as in MSL; a packed_vec has those of its elements and turns into a vec
// by itself. Conversion between element types is explicit, from a scalar implicit (it fills every component).
#pragma once

#include <initializer_list>

#include "swizzle.h"

namespace metal {
namespace detail {

// The value type of an operand: a scalar itself, the vec for a vec, packed_vec or swizzle; and how many components it
// has.
template <class A> struct plain { static constexpr int width = 0; };
template <class A> requires is_arithmetic_v<A> struct plain<A> { using type = A; static constexpr int width = 1; };
template <class T, int N> struct plain<vec<T, N>> { using type = vec<T, N>; static constexpr int width = N; };
template <class T, int N> struct plain<packed_vec<T, N>> : plain<vec<T, N>> {};
template <class T, int N, int... I> struct plain<swizzle<T, N, I...>> : plain<vec<T, sizeof...(I)>> {};
template <class A> struct plain<volatile A> : plain<A> {};
template <class A> using plain_t = typename plain<A>::type;
template <class A> inline constexpr int width = plain<A>::width;

template <int N, class... A>
inline constexpr bool fills = sizeof...(A) > 1 && (width<A> + ... + 0) == N && ((width<A> != 0) && ...);

template <class A> constexpr const A& component(const A& scalar, int) { return scalar; }
template <class T, int N> constexpr const T& component(const vec<T, N>& v, int i) { return v.e[i]; }
template <class T, int N> constexpr const T& component(const packed_vec<T, N>& v, int i) { return v.e[i]; }
template <class T, int N> const volatile T& component(const volatile vec<T, N>& v, int i) { return v.e[i]; }
template <class T, int N> const volatile T& component(const volatile packed_vec<T, N>& v, int i) { return v.e[i]; }
template <class T, int N, int... I> constexpr const T& component(const swizzle<T, N, I...>& v, int i) { return v[i]; }

// A scalar between braces. Where there are fewer than components, the rest is 0: `float4 v = {1}` is (1, 0, 0, 0), as for
// clang's ext_vector_type and unlike float4(1).
template <class T>
struct braced {
  T value;
  template <class S, enable_if_t<is_arithmetic_v<S>, int> = 0>
  constexpr braced(S scalar) : value(static_cast<T>(scalar)) {}
};

// What a volatile vector is assigned from. Not the vec itself: that would be one more copy assignment, and turn every
// union with a vector in it into one that can't be copied.
template <class V>
struct assigned {
  V value;
  template <class A, enable_if_t<__is_convertible(const A&, V), int> = 0>
  constexpr assigned(const A& from) : value(from) {}
};

}  // namespace detail

// A trivial copy from a misaligned address goes unseen: clang checks the alignment of what a reference is bound to.
#if __has_feature(thread_sanitizer) && !defined(MSL_PLAIN_COPIES)
#define MSL_VEC_COPY(name, N)                                                                           \
  constexpr name(const name& other) {                                                                    \
    for (int i = 0; i < N; ++i) e[i] = other.e[i];                                                       \
  }
#else
#define MSL_VEC_COPY(name, N) constexpr name(const name&) = default;
#endif

#define MSL_VEC_MEMBERS(name, N)                                                                        \
  static constexpr int size_of_vec = N;                                                                  \
  using element_type = T;                                                                                \
  name() = default;                                                                                      \
  MSL_VEC_COPY(name, N)                                                                                  \
  constexpr name& operator=(const name& other) {                                                         \
    for (int i = 0; i < N; ++i) e[i] = other.e[i];                                                       \
    return *this;                                                                                        \
  }                                                                                                      \
  volatile name& operator=(detail::assigned<name> from) volatile {                                       \
    for (int i = 0; i < N; ++i) e[i] = from.value.e[i];                                                  \
    return *this;                                                                                        \
  }                                                                                                      \
  template <class S, enable_if_t<is_arithmetic_v<S>, int> = 0>                                           \
  constexpr name(S scalar) {                                                                             \
    for (int i = 0; i < N; ++i) e[i] = static_cast<T>(scalar);                                           \
  }                                                                                                      \
  constexpr name(std::initializer_list<detail::braced<T>> scalars) {                                     \
    for (int i = 0; i < N; ++i) e[i] = size_t(i) < scalars.size() ? scalars.begin()[i].value : T(0);     \
  }                                                                                                      \
  template <class A, enable_if_t<detail::width<A> == N && !is_same_v<A, name>, int> = 0>                   \
  constexpr explicit(!is_same_v<detail::plain_t<A>, vec<T, N>>) name(const A& other) {                   \
    for (int i = 0; i < N; ++i) e[i] = static_cast<T>(detail::component(other, i));                      \
  }                                                                                                      \
  template <class... A, enable_if_t<detail::fills<N, A...>, int> = 0>                                    \
  constexpr name(const A&... parts) {                                                                    \
    int next = 0;                                                                                        \
    const auto append = [&](const auto& part) {                                                          \
      constexpr int width = detail::width<__remove_cvref(decltype(part))>;                               \
      for (int i = 0; i < width; ++i) e[next++] = static_cast<T>(detail::component(part, i));            \
    };                                                                                                   \
    (append(parts), ...);                                                                                \
  }                                                                                                      \
  constexpr T& operator[](size_t i) { return e[i]; }                                                     \
  constexpr const T& operator[](size_t i) const { return e[i]; }                                         \
  volatile T& operator[](size_t i) volatile { return e[i]; }                                             \
  const volatile T& operator[](size_t i) const volatile { return e[i]; }                                 \
  constexpr vec<T, N> operator()() const { return *this; }

// `e` holds the elements; x, y, z, w and r, g, b, a name them.
#define MSL_VEC_ONE(name, N, alignment, xyzw, rgba)                            \
  template <class T>                                                           \
  struct alignment name<T, N> {                                                \
    union {                                                                    \
      T e[N];                                                                  \
      struct { T xyzw; };                                                      \
      struct { T rgba; };                                                      \
      MSL_SWIZZLES_##N                                                         \
    };                                                                         \
    MSL_VEC_MEMBERS(name, N)                                                   \
  };
#define MSL_VEC(N, room, xyzw, rgba)                                           \
  MSL_VEC_ONE(vec, N, alignas(room * sizeof(T)), MSL_LIST(xyzw), MSL_LIST(rgba)) \
  MSL_VEC_ONE(packed_vec, N, , MSL_LIST(xyzw), MSL_LIST(rgba))
#define MSL_LIST(...) __VA_ARGS__
MSL_VEC(2, 2, MSL_LIST(x, y), MSL_LIST(r, g))
MSL_VEC(3, 4, MSL_LIST(x, y, z), MSL_LIST(r, g, b))
MSL_VEC(4, 4, MSL_LIST(x, y, z, w), MSL_LIST(r, g, b, a))
#undef MSL_LIST
#undef MSL_VEC
#undef MSL_VEC_ONE
#undef MSL_VEC_MEMBERS
#undef MSL_VEC_COPY

namespace detail {

// The type two operands meet in: of two scalars C++'s usual one (equal types stay as they are; half with bfloat is
// float, an unsuffixed literal counts as float); with a vector, that vector's type. Absent where MSL has no such
// operation.
template <class A, class B> struct joined {};
template <class A, class B> requires(is_arithmetic_v<A> && is_arithmetic_v<B>) struct joined<A, B> {
  static constexpr auto pick() {
    using a = conditional_t<is_same_v<plain_t<A>, double>, float, plain_t<A>>;
    using b = conditional_t<is_same_v<plain_t<B>, double>, float, plain_t<B>>;
    if constexpr (is_same_v<a, b>) return detail::identity<a>{};
    else if constexpr (is_floating_point_v<a> && is_floating_point_v<b>) return detail::identity<float>{};
    else if constexpr (is_floating_point_v<a>) return detail::identity<a>{};
    else if constexpr (is_floating_point_v<b>) return detail::identity<b>{};
    else return detail::identity<decltype(a() + b())>{};
  }
  using type = typename decltype(pick())::type;
};
template <class A, class B> requires(width<A> > 1 && width<B> == width<A> && is_same_v<plain_t<A>, plain_t<B>>)
struct joined<A, B> : plain<A> {};
template <class A, class B> requires(width<A> > 1 && width<B> == 1) struct joined<A, B> : plain<A> {};
template <class A, class B> requires(width<A> == 1 && width<B> > 1) struct joined<A, B> : plain<B> {};
template <class A, class B> using joined_t = typename joined<A, B>::type;
template <class A, class B, class C> using joined3_t = joined_t<joined_t<A, B>, C>;
template <class A> using value_t = joined_t<A, A>;

template <class V> struct element { using type = V; };
template <class T, int N> struct element<vec<T, N>> { using type = T; };
template <class V> using element_t = typename element<V>::type;
template <class V, class U> struct rebind { using type = U; };
template <class T, int N, class U> struct rebind<vec<T, N>, U> { using type = vec<U, N>; };
// V with its elements replaced by U: vec<U, N>, or U itself for a scalar.
template <class V, class U> using rebind_t = typename rebind<V, U>::type;

template <class V> inline constexpr bool is_vec = false;
template <class T, int N> inline constexpr bool is_vec<vec<T, N>> = true;

// Applies f to each component (of the scalar itself where V is no vector); every argument has V's width or is a scalar.
template <class V, class F, class... A>
constexpr V map(F f, const A&... a) {
  if constexpr (is_vec<V>) {
    V result;
    for (int i = 0; i < V::size_of_vec; ++i) result.e[i] = f(component(a, i)...);
    return result;
  } else {
    return V(f(a...));
  }
}

}  // namespace detail
}  // namespace metal
