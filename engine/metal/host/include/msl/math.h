// metal_math for float, half, bfloat and their vectors, over the host's libm through compiler builtins.
//
// metal::fast and metal::precise are the same functions: exact to libm's rounding. What a GPU's fast functions do to
// overflow, subnormals and the ends of their ranges does not show here.
#pragma once

#include "common.h"

namespace metal {
namespace detail {

// A long double literal stays one under -cl-single-precision-constant.
constexpr double pi_double = static_cast<double>(3.14159265358979323846L);

// x - floor(x) rounds up to 1 for tiny negative x; MSL bounds it by the float below 1.
inline float fraction(float x) { return smaller(x - __builtin_floorf(x), 0x1.fffffep-1f); }

// sin(pi x) and cos(pi x) through the remainder modulo 2, which is exact.
inline float sin_pi(float x) {
  return static_cast<float>(__builtin_sin(__builtin_fmod(static_cast<double>(x), 2.0L) * pi_double));
}
inline float cos_pi(float x) {
  return static_cast<float>(__builtin_cos(__builtin_fmod(static_cast<double>(x), 2.0L) * pi_double));
}
inline float exp_10(float x) {
  return static_cast<float>(__builtin_pow(static_cast<double>(10.0f), static_cast<double>(x)));
}

template <class V> constexpr auto& at(V& v, int i) {
  if constexpr (is_vec<V>) return v.e[i];
  else return v;
}

template <class T>
constexpr T neighbour(T x, T y) {
  using bits_t = conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  if (x != x || y != y) return static_cast<T>(__builtin_nanf(""));
  if (x == y) return y;
  constexpr bits_t sign = static_cast<bits_t>(bits_t(1) << (sizeof(T) * 8 - 1));
  bits_t bits = __builtin_bit_cast(bits_t, x);
  if (x == T(0)) bits = static_cast<bits_t>((y < T(0) ? sign : 0) | 1);
  else bits = static_cast<bits_t>((x < y) == (bits < sign) ? bits + 1 : bits - 1);
  return __builtin_bit_cast(T, bits);
}

// Rounds x * y + z once to T: the product is exact in double, the sum goes to odd before the last rounding.
template <class T>
constexpr T fused(T x, T y, T z) {
  if constexpr (is_same_v<T, float>) {
    return __builtin_fmaf(x, y, z);
  } else {
    const double product = static_cast<double>(static_cast<float>(x)) * static_cast<float>(y);
    const double addend = static_cast<double>(static_cast<float>(z));
    const double sum = product + addend;
    const double back = sum - product;
    const double lost = (product - (sum - back)) + (addend - back);
    uint64_t bits = __builtin_bit_cast(uint64_t, sum);
    if (lost != 0 && lost == lost && (bits & 1) == 0) bits += (lost > 0) == (sum > 0) ? 1 : -1;
    return static_cast<T>(__builtin_bit_cast(double, bits));
  }
}

}  // namespace detail

MSL_FLOAT1(fabs, __builtin_fabsf(x))
MSL_FLOAT1(acos, __builtin_acosf(x))
MSL_FLOAT1(acosh, __builtin_acoshf(x))
MSL_FLOAT1(asin, __builtin_asinf(x))
MSL_FLOAT1(asinh, __builtin_asinhf(x))
MSL_FLOAT1(atan, __builtin_atanf(x))
MSL_FLOAT1(atanh, __builtin_atanhf(x))
MSL_FLOAT1(ceil, __builtin_ceilf(x))
MSL_FLOAT1(cos, __builtin_cosf(x))
MSL_FLOAT1(cosh, __builtin_coshf(x))
MSL_FLOAT1(cospi, detail::cos_pi(x))
MSL_FLOAT1(exp, __builtin_expf(x))
MSL_FLOAT1(exp2, __builtin_exp2f(x))
MSL_FLOAT1(exp10, detail::exp_10(x))
MSL_FLOAT1(floor, __builtin_floorf(x))
MSL_FLOAT1(fract, detail::fraction(x))
MSL_FLOAT1(log, __builtin_logf(x))
MSL_FLOAT1(log2, __builtin_log2f(x))
MSL_FLOAT1(log10, __builtin_log10f(x))
MSL_FLOAT1(rint, __builtin_rintf(x))
MSL_FLOAT1(round, __builtin_roundf(x))
MSL_FLOAT1(rsqrt, 1.0f / __builtin_sqrtf(x))
MSL_FLOAT1(sin, __builtin_sinf(x))
MSL_FLOAT1(sinh, __builtin_sinhf(x))
MSL_FLOAT1(sinpi, detail::sin_pi(x))
MSL_FLOAT1(sqrt, __builtin_sqrtf(x))
MSL_FLOAT1(tan, __builtin_tanf(x))
MSL_FLOAT1(tanh, __builtin_tanhf(x))
MSL_FLOAT1(tanpi, detail::sin_pi(x) / detail::cos_pi(x))
MSL_FLOAT1(trunc, __builtin_truncf(x))

MSL_FLOAT2(atan2, __builtin_atan2f(x, y))
MSL_FLOAT2(copysign, __builtin_copysignf(x, y))
MSL_FLOAT2(divide, x / y)
MSL_FLOAT2(fdim, __builtin_fdimf(x, y))
MSL_FLOAT2(fmod, __builtin_fmodf(x, y))
MSL_FLOAT2(pow, __builtin_powf(x, y))
// powr is pow for x >= 0 and NaN below.
MSL_FLOAT2(powr, x < 0 ? __builtin_nanf("") : __builtin_powf(x, y))

template <class A, class B, class C, class V = detail::float3_t<A, B, C>>
constexpr V fma(const A& a, const B& b, const C& c) {
  using T = detail::element_t<V>;
  return detail::map<V>([](T x, T y, T z) { return detail::fused(x, y, z); }, V(a), V(b), V(c));
}
MSL_BOTH(fma)

template <class A, class V = detail::float1_t<A>>
inline V sincos(const A& angle, detail::identity_t<V>& cosine) {
  cosine = cos(angle);
  return sin(angle);
}
MSL_BOTH(sincos)

template <class A, class V = detail::float1_t<A>>
inline V modf(const A& a, detail::identity_t<V>& whole) {
  whole = trunc(a);
  return detail::map<V>(
      [](auto x, auto t) { return copysign(isinf(x) ? decltype(x)(0) : decltype(x)(x - t), x); }, V(a), whole);
}
MSL_BOTH(modf)

template <class A, class V = detail::float1_t<A>>
inline V frexp(const A& a, detail::rebind_t<V, int>& exponent) {
  using T = detail::element_t<V>;
  V result;
  for (int i = 0; i < detail::width<V>; ++i) {
    int e = 0;
    const float significand = __builtin_frexpf(static_cast<float>(detail::component(V(a), i)), &e);
    detail::at(exponent, i) = e;
    detail::at(result, i) = static_cast<T>(significand);
  }
  return result;
}
MSL_BOTH(frexp)

template <class A, class B, class V = detail::float1_t<A>>
inline V ldexp(const A& a, const B& exponent) {
  using T = detail::element_t<V>;
  return detail::map<V>(
      [](T x, int e) { return static_cast<T>(__builtin_ldexpf(static_cast<float>(x), e)); }, V(a), exponent);
}
MSL_BOTH(ldexp)

template <class A, class V = detail::float1_t<A>>
inline detail::rebind_t<V, int> ilogb(const A& a) {
  return detail::map<detail::rebind_t<V, int>>([](auto x) { return __builtin_ilogbf(static_cast<float>(x)); }, V(a));
}
MSL_BOTH(ilogb)

// The neighbour in T's own format: sign-magnitude bits stepped by one.
template <class A, class B, class V = detail::float2_t<A, B>>
inline V nextafter(const A& a, const B& b) {
  using T = detail::element_t<V>;
  return detail::map<V>([](T x, T y) { return detail::neighbour(x, y); }, V(a), V(b));
}
MSL_BOTH(nextafter)

}  // namespace metal
