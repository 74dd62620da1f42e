// metal_integer: bit counting, wide and saturating arithmetic, rotation, bit fields, for every integer type and its
// vectors.
#pragma once

#include "common.h"

namespace metal {
namespace detail {

template <class A, class V = value_t<A>> using int1_t = enable_if_t<is_integral_v<element_t<V>>, V>;
template <class A, class B> using int2_t = int1_t<joined_t<A, B>>;
template <class A, class B, class C> using int3_t = int1_t<joined3_t<A, B, C>>;
template <class T> using unsigned_t = __make_unsigned(T);
template <class T> inline constexpr int bits_in = int(sizeof(T)) * 8;
// Twice as wide, of the same signedness.
template <class T> using wide_t = conditional_t<__is_signed(T), __int128, unsigned __int128>;

template <class T, class W> constexpr T saturated(W value) {
  constexpr W low = numeric_limits<T>::min(), high = numeric_limits<T>::max();
  return static_cast<T>(value < low ? low : value > high ? high : value);
}
template <class T> constexpr T high_half(T x, T y) { return static_cast<T>((wide_t<T>(x) * y) >> bits_in<T>); }
template <class T> constexpr T leading_zeros(T x) {
  using U = unsigned_t<T>;
  return x == 0 ? T(bits_in<T>) : T(__builtin_clzll(static_cast<U>(x)) - (64 - bits_in<T>));
}
template <class T> constexpr T trailing_zeros(T x) {
  return x == 0 ? T(bits_in<T>) : T(__builtin_ctzll(static_cast<unsigned_t<T>>(x)));
}
template <class T> constexpr T rotated(T x, T count) {
  using U = unsigned_t<T>;
  const unsigned n = static_cast<unsigned>(count) & (bits_in<T> - 1);
  const U u = static_cast<U>(x);
  return static_cast<T>(n == 0 ? u : static_cast<U>(static_cast<U>(u << n) | (u >> (bits_in<T> - n))));
}
template <class T> constexpr T reversed(T x) {
  using U = unsigned_t<T>;
  U in = static_cast<U>(x), out = 0;
  for (int i = 0; i < bits_in<T>; ++i) out = static_cast<U>((out << 1) | ((in >> i) & 1));
  return static_cast<T>(out);
}
// The field [offset, offset + count), sign-extended for signed T.
template <class T> constexpr T field(T x, unsigned offset, unsigned count) {
  if (count == 0) return T(0);
  const unsigned left = bits_in<T> - offset - count;
  return static_cast<T>(static_cast<T>(static_cast<unsigned_t<T>>(x) << left) >> (bits_in<T> - count));
}
template <class T> constexpr T inserted(T base, T insert, unsigned offset, unsigned count) {
  using U = unsigned_t<T>;
  const U ones = count >= unsigned(bits_in<T>) ? static_cast<U>(~U(0)) : static_cast<U>((1ull << count) - 1);
  const U mask = static_cast<U>(ones << offset);
  return static_cast<T>((static_cast<U>(base) & ~mask) | (static_cast<U>(static_cast<U>(insert) << offset) & mask));
}

}  // namespace detail

#define MSL_INT1(name, expression)                                                      \
  template <class A, class V = detail::int1_t<A>>                                        \
  constexpr V name(const A& a) {                                                         \
    using T = detail::element_t<V>;                                                      \
    return detail::map<V>([](T x) { return static_cast<T>(expression); }, V(a));         \
  }
#define MSL_INT2(name, expression)                                                      \
  template <class A, class B, class V = detail::int2_t<A, B>>                            \
  constexpr V name(const A& a, const B& b) {                                             \
    using T = detail::element_t<V>;                                                      \
    return detail::map<V>([](T x, T y) { return static_cast<T>(expression); }, V(a), V(b)); \
  }
#define MSL_INT3(name, expression)                                                      \
  template <class A, class B, class C, class V = detail::int3_t<A, B, C>>                \
  constexpr V name(const A& a, const B& b, const C& c) {                                 \
    using T = detail::element_t<V>;                                                      \
    return detail::map<V>([](T x, T y, T z) { return static_cast<T>(expression); }, V(a), V(b), V(c)); \
  }

MSL_INT1(popcount, __builtin_popcountll(static_cast<detail::unsigned_t<T>>(x)))
MSL_INT1(clz, detail::leading_zeros(x))
MSL_INT1(ctz, detail::trailing_zeros(x))
MSL_INT1(reverse_bits, detail::reversed(x))
MSL_INT2(rotate, detail::rotated(x, y))
MSL_INT2(mulhi, detail::high_half(x, y))
MSL_INT2(addsat, detail::saturated<T>(static_cast<__int128>(x) + y))
MSL_INT2(subsat, detail::saturated<T>(static_cast<__int128>(x) - y))
MSL_INT2(hadd, (static_cast<__int128>(x) + y) >> 1)
MSL_INT2(rhadd, (static_cast<__int128>(x) + y + 1) >> 1)
MSL_INT3(madhi, static_cast<detail::unsigned_t<T>>(detail::high_half(x, y)) + static_cast<detail::unsigned_t<T>>(z))
MSL_INT3(madsat, detail::saturated<T>(detail::wide_t<T>(x) * y + z))
MSL_INT2(mul24, static_cast<unsigned>(x) * static_cast<unsigned>(y))
MSL_INT3(mad24, static_cast<unsigned>(x) * static_cast<unsigned>(y) + static_cast<unsigned>(z))
#undef MSL_INT1
#undef MSL_INT2
#undef MSL_INT3

// |x - y| without overflow, in the unsigned type.
template <class A, class B, class V = detail::int2_t<A, B>>
constexpr auto absdiff(const A& a, const B& b) {
  using T = detail::element_t<V>;
  using U = detail::unsigned_t<T>;
  return detail::map<detail::rebind_t<V, U>>(
      [](T x, T y) { return static_cast<U>(x < y ? U(y) - U(x) : U(x) - U(y)); }, V(a), V(b));
}
template <class A, class V = detail::int1_t<A>>
constexpr V extract_bits(const A& a, uint offset, uint bits) {
  using T = detail::element_t<V>;
  return detail::map<V>([=](T x) { return detail::field(x, offset, bits); }, V(a));
}
template <class A, class B, class V = detail::int2_t<A, B>>
constexpr V insert_bits(const A& base, const B& insert, uint offset, uint bits) {
  using T = detail::element_t<V>;
  return detail::map<V>([=](T x, T y) { return detail::inserted(x, y, offset, bits); }, V(base), V(insert));
}

}  // namespace metal
