// numeric_limits and the floating-point macros of metal_limits and metal_math (half and bfloat included).
// Values: IEEE 754 binary16 and binary32; bfloat has binary32's exponent range and 8 significand bits.
#pragma once

#include "bfloat.h"

namespace metal {

template <class T>
struct numeric_limits {
  static constexpr bool is_specialized = __is_integral(T);
  static constexpr bool is_signed = __is_signed(T);
  static constexpr bool is_integer = __is_integral(T);
  static constexpr bool is_exact = __is_integral(T);
  static constexpr bool has_infinity = false;
  static constexpr bool has_quiet_NaN = false;
  static constexpr bool has_signaling_NaN = false;
  static constexpr int radix = 2;
  static constexpr int digits = __is_same(T, bool) ? 1 : int(sizeof(T)) * 8 - is_signed;
  static constexpr int digits10 = digits * 643 / 2136;  // floor(digits * log10(2))
  static constexpr T max() {
    if constexpr (__is_same(T, bool)) return true;
    else if constexpr (__is_signed(T)) return static_cast<T>(~(T(1) << (sizeof(T) * 8 - 1)));
    else return static_cast<T>(~T(0));
  }
  static constexpr T min() {
    if constexpr (__is_signed(T)) return static_cast<T>(T(1) << (sizeof(T) * 8 - 1));
    else return T(0);
  }
  static constexpr T lowest() { return min(); }
  static constexpr T epsilon() { return T(0); }
  static constexpr T infinity() { return T(0); }
  static constexpr T quiet_NaN() { return T(0); }
};

namespace detail {

// Digits: significand bits with the implicit one; Exponent: the largest, as <float.h> counts it (0.5 <= significand <
// 1).
template <class T, class Bits, int Digits, int Exponent>
struct float_limits {
  static constexpr bool is_specialized = true, is_signed = true, is_integer = false, is_exact = false;
  static constexpr bool has_infinity = true, has_quiet_NaN = true, has_signaling_NaN = true, is_iec559 = true;
  static constexpr int radix = 2, digits = Digits, max_exponent = Exponent, min_exponent = 3 - Exponent;
  static constexpr int digits10 = (Digits - 1) * 643 / 2136, max_digits10 = Digits * 643 / 2136 + 2;
  static constexpr int fraction = Digits - 1;
  static constexpr Bits exponent_mask = static_cast<Bits>((Bits(2) * Exponent - 1) << fraction);
  static constexpr T of(unsigned long bits) { return __builtin_bit_cast(T, static_cast<Bits>(bits)); }
  static constexpr T infinity() { return of(exponent_mask); }
  static constexpr T max() { return of(exponent_mask - 1ul); }
  static constexpr T lowest() { return of((exponent_mask - 1ul) | (1ul << (sizeof(T) * 8 - 1))); }
  static constexpr T min() { return of(1ul << fraction); }
  static constexpr T denorm_min() { return of(1); }
  static constexpr T epsilon() { return of(static_cast<unsigned long>(Exponent - 1 - fraction) << fraction); }
  static constexpr T round_error() { return of(static_cast<unsigned long>(Exponent - 2) << fraction); }
  static constexpr T quiet_NaN() { return of(exponent_mask | (1ul << (fraction - 1))); }
  static constexpr T signaling_NaN() { return of(exponent_mask | (1ul << (fraction - 2))); }
};

}  // namespace detail

template <> struct numeric_limits<float> : detail::float_limits<float, uint32_t, 24, 128> {};
template <> struct numeric_limits<half> : detail::float_limits<half, uint16_t, 11, 16> {};
template <> struct numeric_limits<bfloat> : detail::float_limits<bfloat, uint16_t, 8, 128> {};
template <class T> struct numeric_limits<const T> : numeric_limits<T> {};

}  // namespace metal

#undef INFINITY
#undef NAN
#undef HUGE_VALF
#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF INFINITY
#define HUGE_VALH (metal::numeric_limits<half>::infinity())
#define MAXFLOAT FLT_MAX
#define MAXHALF HALF_MAX
#define MAXBFLOAT BFLT_MAX

#define HALF_DIG 3
#define HALF_MANT_DIG 11
#define HALF_MAX_10_EXP 4
#define HALF_MAX_EXP 16
#define HALF_MIN_10_EXP -4
#define HALF_MIN_EXP -13
#define HALF_RADIX 2
#define HALF_MAX (metal::numeric_limits<half>::max())
#define HALF_MIN (metal::numeric_limits<half>::min())
#define HALF_EPSILON (metal::numeric_limits<half>::epsilon())
#define BFLT_MAX (metal::numeric_limits<bfloat>::max())
#define BFLT_MIN (metal::numeric_limits<bfloat>::min())
#define BFLT_EPSILON (metal::numeric_limits<bfloat>::epsilon())

// Each constant in float (_F), half (_H) and bfloat (_BF); decimal values as POSIX <math.h> lists them.
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.434294481903251827651f
#define M_LN2_F 0.693147180559945309417f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_PI_4_F 0.785398163397448309616f
#define M_1_PI_F 0.318309886183790671538f
#define M_2_PI_F 0.636619772367581343076f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f
#define M_E_H (half(M_E_F))
#define M_LOG2E_H (half(M_LOG2E_F))
#define M_LOG10E_H (half(M_LOG10E_F))
#define M_LN2_H (half(M_LN2_F))
#define M_LN10_H (half(M_LN10_F))
#define M_PI_H (half(M_PI_F))
#define M_PI_2_H (half(M_PI_2_F))
#define M_PI_4_H (half(M_PI_4_F))
#define M_1_PI_H (half(M_1_PI_F))
#define M_2_PI_H (half(M_2_PI_F))
#define M_2_SQRTPI_H (half(M_2_SQRTPI_F))
#define M_SQRT2_H (half(M_SQRT2_F))
#define M_SQRT1_2_H (half(M_SQRT1_2_F))
#define M_E_BF (bfloat(M_E_F))
#define M_LOG2E_BF (bfloat(M_LOG2E_F))
#define M_LN2_BF (bfloat(M_LN2_F))
#define M_PI_BF (bfloat(M_PI_F))
#define M_SQRT2_BF (bfloat(M_SQRT2_F))
