// metal_type_traits: the compile-time predicates and transformations, over compiler builtins so that nothing of
// <type_traits> comes along. half and bfloat count as floating-point types, as in MSL. Address spaces do not exist
// here, so remove_addrspace is the identity.
#pragma once

#include "scalars.h"

namespace metal {

struct bfloat;

template <class T, T Value>
struct integral_constant {
  using value_type = T;
  using type = integral_constant;
  static constexpr T value = Value;
  constexpr operator T() const { return Value; }
  constexpr T operator()() const { return Value; }
};
template <bool Value>
using bool_constant = integral_constant<bool, Value>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool Condition, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool Condition, class T = void> using enable_if_t = typename enable_if<Condition, T>::type;

template <bool Condition, class Then, class Else> struct conditional { using type = Then; };
template <class Then, class Else> struct conditional<false, Then, Else> { using type = Else; };
template <bool Condition, class Then, class Else>
using conditional_t = typename conditional<Condition, Then, Else>::type;

namespace detail {
template <class T> struct identity { using type = T; };
template <class T> using identity_t = typename identity<T>::type;
}  // namespace detail

#define MSL_TRANSFORM(name, builtin)                  \
  template <class T> struct name { using type = builtin(T); }; \
  template <class T> using name##_t = typename name<T>::type;
MSL_TRANSFORM(remove_const, __remove_const)
MSL_TRANSFORM(remove_volatile, __remove_volatile)
MSL_TRANSFORM(remove_cv, __remove_cv)
MSL_TRANSFORM(remove_reference, __remove_reference_t)
MSL_TRANSFORM(remove_pointer, __remove_pointer)
MSL_TRANSFORM(remove_extent, __remove_extent)
MSL_TRANSFORM(remove_all_extents, __remove_all_extents)
MSL_TRANSFORM(add_pointer, __add_pointer)
MSL_TRANSFORM(add_lvalue_reference, __add_lvalue_reference)
MSL_TRANSFORM(add_rvalue_reference, __add_rvalue_reference)
MSL_TRANSFORM(decay, __decay)
MSL_TRANSFORM(make_signed, __make_signed)
MSL_TRANSFORM(make_unsigned, __make_unsigned)
MSL_TRANSFORM(underlying_type, __underlying_type)
#undef MSL_TRANSFORM

template <class T> struct add_const { using type = const T; };
template <class T> using add_const_t = const T;
template <class T> struct remove_addrspace { using type = T; };
template <class T> using remove_addrspace_t = T;

#define MSL_PREDICATE(name, ...)                                            \
  template <class T> inline constexpr bool name##_v = __VA_ARGS__;           \
  template <class T> struct name : bool_constant<name##_v<T>> {};
template <class T, class U> inline constexpr bool is_same_v = __is_same(T, U);
template <class T, class U> struct is_same : bool_constant<is_same_v<T, U>> {};
MSL_PREDICATE(is_floating_point, __is_floating_point(T) || __is_same(__remove_cv(T), bfloat))
MSL_PREDICATE(is_integral, __is_integral(T))
MSL_PREDICATE(is_arithmetic, is_floating_point_v<T> || is_integral_v<T>)
MSL_PREDICATE(is_scalar, is_arithmetic_v<T> || __is_enum(T) || __is_pointer(T))
MSL_PREDICATE(is_signed, is_floating_point_v<T> || __is_signed(T))
MSL_PREDICATE(is_unsigned, __is_unsigned(T))
MSL_PREDICATE(is_void, __is_void(T))
MSL_PREDICATE(is_const, __is_const(T))
MSL_PREDICATE(is_volatile, __is_volatile(T))
MSL_PREDICATE(is_pointer, __is_pointer(T))
MSL_PREDICATE(is_reference, __is_reference(T))
MSL_PREDICATE(is_lvalue_reference, __is_lvalue_reference(T))
MSL_PREDICATE(is_array, __is_array(T))
MSL_PREDICATE(is_enum, __is_enum(T))
MSL_PREDICATE(is_class, __is_class(T))
MSL_PREDICATE(is_union, __is_union(T))
MSL_PREDICATE(is_function, __is_function(T))
MSL_PREDICATE(is_trivial, __is_trivially_copyable(T) && __is_trivially_constructible(T))
MSL_PREDICATE(is_trivially_copyable, __is_trivially_copyable(T))
MSL_PREDICATE(is_standard_layout, __is_standard_layout(T))
#undef MSL_PREDICATE
template <class From, class To> inline constexpr bool is_convertible_v = __is_convertible(From, To);
template <class From, class To> struct is_convertible : bool_constant<is_convertible_v<From, To>> {};
template <class Base, class Derived> inline constexpr bool is_base_of_v = __is_base_of(Base, Derived);
template <class Base, class Derived> struct is_base_of : bool_constant<is_base_of_v<Base, Derived>> {};
template <class T, class... A> inline constexpr bool is_constructible_v = __is_constructible(T, A...);
template <class T, class... A> struct is_constructible : bool_constant<is_constructible_v<T, A...>> {};

template <class T> struct rank : integral_constant<size_t, __array_rank(T)> {};
template <class T, unsigned N = 0> struct extent : integral_constant<size_t, __array_extent(T, N)> {};

template <class... B> struct conjunction : bool_constant<(bool(B::value) && ...)> {};
template <class... B> struct disjunction : bool_constant<(bool(B::value) || ...)> {};
template <class B> struct negation : bool_constant<!bool(B::value)> {};
// Spellings of Apple's own headers, which kernels reach for under "#pragma METAL internals".
template <class... B> using _conjunction = conjunction<B...>;
template <class... B> using _disjunction = disjunction<B...>;
template <class B> using _negation = negation<B>;

template <class T> __add_rvalue_reference(T) declval();
template <class T> constexpr T&& forward(__remove_reference_t(T)& value) { return static_cast<T&&>(value); }
template <class T> constexpr __remove_reference_t(T)&& move(T&& value) {
  return static_cast<__remove_reference_t(T)&&>(value);
}
// Two parameters, so that a swap(T&, T&) of the user's own is the better match.
template <class A, class B> constexpr enable_if_t<is_same_v<A, B>> swap(A& a, B& b) {
  A kept = a;
  a = b;
  b = kept;
}

}  // namespace metal
