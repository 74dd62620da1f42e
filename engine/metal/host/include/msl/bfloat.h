// bfloat: the upper 16 bits of a float, rounded to nearest even after every operation.
//
// A class and not the compiler's __bf16, because hardware conversions (AVX512-BF16) flush subnormals and excess
// precision would keep intermediate results in float. Conversions follow MSL: bfloat becomes float implicitly, float
// and half become bfloat only when asked to (or when assigned). `condition ? bfloat : float` is therefore a float, as
// in MSL.
#pragma once

#include "traits.h"

namespace metal {

namespace detail {

constexpr uint16_t bfloat_bits(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint16_t quiet = static_cast<uint16_t>((bits >> 16) | 0x40);
  const uint16_t rounded = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  return (bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
}

// Rounds to odd on the way to float, so that the second rounding to bfloat gives what one rounding would.
constexpr uint16_t bfloat_bits(double value) {
  float nearest = static_cast<float>(value);
  uint32_t bits = __builtin_bit_cast(uint32_t, nearest);
  const double error = value - static_cast<double>(nearest);
  const bool finite = (bits & 0x7fffffff) < 0x7f800000;
  if (finite && error != 0 && (bits & 1) == 0) {
    const bool away = (error > 0) == (value > 0);
    bits += away ? 1 : -1;
    nearest = __builtin_bit_cast(float, bits);
  }
  return bfloat_bits(nearest);
}

// A 64-bit integer keeps its upper bits and a sticky bit, which a double holds exactly.
constexpr double sticky_double(unsigned long value) {
  if (value < (1ul << 52)) return static_cast<double>(value);
  return static_cast<double>((value >> 24) | ((value & 0xffffff) != 0)) * 16777216.0;
}

template <class T>
constexpr uint16_t bfloat_bits_of(T value) {
  if constexpr (__is_floating_point(T)) {
    if constexpr (sizeof(T) <= 4) return bfloat_bits(static_cast<float>(value));
    else return bfloat_bits(static_cast<double>(value));
  } else if constexpr (sizeof(T) <= 2) {
    return bfloat_bits(static_cast<float>(value));
  } else if constexpr (sizeof(T) <= 4) {
    return bfloat_bits(static_cast<double>(value));
  } else if constexpr (__is_unsigned(T)) {
    return bfloat_bits(sticky_double(value));
  } else {
    return value < 0 ? bfloat_bits(-sticky_double(0ul - static_cast<unsigned long>(value)))
                     : bfloat_bits(sticky_double(static_cast<unsigned long>(value)));
  }
}

template <class T> inline constexpr bool is_builtin_arithmetic = __is_floating_point(T) || __is_integral(T);

}  // namespace detail

struct bfloat {
  uint16_t bits;

  bfloat() = default;
  template <class T, enable_if_t<detail::is_builtin_arithmetic<T>, int> = 0>
  constexpr explicit(__is_floating_point(T)) bfloat(T value) : bits(detail::bfloat_bits_of(value)) {}
  template <class T, enable_if_t<detail::is_builtin_arithmetic<T>, int> = 0>
  constexpr bfloat& operator=(T value) {
    bits = detail::bfloat_bits_of(value);
    return *this;
  }
  // To and from a volatile bfloat: templates, because a copy constructor would end being trivially copyable.
  template <class B, enable_if_t<__is_same(const B, const volatile bfloat), int> = 0>
  constexpr bfloat(B& other) : bits(other.bits) {}
  template <class T, enable_if_t<__is_convertible(T, bfloat) || detail::is_builtin_arithmetic<T>, int> = 0>
  volatile bfloat& operator=(T value) volatile {
    bits = bfloat(value).bits;
    return *this;
  }

  constexpr float widened() const { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }
  // Deduced, so that float is the only implicit target: with a plain operator float, `c ? b : 0` would become an int.
  template <class T, enable_if_t<__is_same(T, float), int> = 0>
  constexpr operator T() const { return widened(); }
  template <class T, enable_if_t<detail::is_builtin_arithmetic<T> && !__is_same(T, float), int> = 0>
  constexpr explicit operator T() const { return static_cast<T>(widened()); }
  template <class T, enable_if_t<__is_same(T, float), int> = 0>
  operator T() const volatile { return bfloat(*this).widened(); }

  constexpr bfloat operator-() const { return from_bits(bits ^ 0x8000); }
  constexpr bfloat operator+() const { return *this; }
  constexpr bool operator!() const { return widened() == 0; }
  constexpr bfloat& operator++() { return *this = bfloat(widened() + 1.0f); }
  constexpr bfloat& operator--() { return *this = bfloat(widened() - 1.0f); }
  constexpr bfloat operator++(int) { const bfloat before = *this; ++*this; return before; }
  constexpr bfloat operator--(int) { const bfloat before = *this; --*this; return before; }

  static constexpr bfloat from_bits(unsigned bits) {
    bfloat result{};
    result.bits = static_cast<uint16_t>(bits);
    return result;
  }
};
static_assert(sizeof(bfloat) == 2 && __is_trivially_copyable(bfloat), "bfloat is a plain 16-bit value");

namespace detail {

// What `bfloat op T` yields: bfloat with bfloat or an integer, float with float or half; absent for every other type.
template <class A, class B> struct bfloat_result {};
template <> struct bfloat_result<bfloat, bfloat> { using type = bfloat; };
template <class T> requires is_builtin_arithmetic<T> struct bfloat_result<bfloat, T> {
  using type = conditional_t<__is_floating_point(T), float, bfloat>;
};
template <class T> requires is_builtin_arithmetic<T> struct bfloat_result<T, bfloat> : bfloat_result<bfloat, T> {};
template <class A, class B> using bfloat_result_t = typename bfloat_result<A, B>::type;
// An integer operand is converted to bfloat before the operation.
template <class R> constexpr float operand(bfloat value) { return value.widened(); }
template <class R, class T> constexpr float operand(T value) {
  if constexpr (__is_same(R, float)) return static_cast<float>(value);
  else return bfloat(value).widened();
}

}  // namespace detail

#define MSL_BFLOAT_ARITHMETIC(op)                                                     \
  template <class A, class B, class R = detail::bfloat_result_t<A, B>>                 \
  constexpr R operator op(A a, B b) {                                                  \
    return R(detail::operand<R>(a) op detail::operand<R>(b));                          \
  }                                                                                    \
  template <class B, class R = detail::bfloat_result_t<bfloat, B>>                     \
  constexpr bfloat& operator op##=(bfloat& a, B b) {                                   \
    return a = bfloat(a op b);                                                         \
  }                                                                                    \
  template <class A, enable_if_t<detail::is_builtin_arithmetic<A>, int> = 0>           \
  constexpr A& operator op##=(A& a, bfloat b) {                                        \
    return a = static_cast<A>(a op b);                                                 \
  }
MSL_BFLOAT_ARITHMETIC(+)
MSL_BFLOAT_ARITHMETIC(-)
MSL_BFLOAT_ARITHMETIC(*)
MSL_BFLOAT_ARITHMETIC(/)
#undef MSL_BFLOAT_ARITHMETIC

#define MSL_BFLOAT_COMPARISON(op)                                                     \
  template <class A, class B, class R = detail::bfloat_result_t<A, B>>                 \
  constexpr bool operator op(A a, B b) {                                               \
    return detail::operand<R>(a) op detail::operand<R>(b);                             \
  }
MSL_BFLOAT_COMPARISON(==)
MSL_BFLOAT_COMPARISON(!=)
MSL_BFLOAT_COMPARISON(<)
MSL_BFLOAT_COMPARISON(<=)
MSL_BFLOAT_COMPARISON(>)
MSL_BFLOAT_COMPARISON(>=)
#undef MSL_BFLOAT_COMPARISON

}  // namespace metal

using metal::bfloat;
