// Math over arrays of floats: one function by name; its half version through half_NAME.
#define ONE(name) \
  EXPORT void float_##name(const float* a, float* out, size_t n) { for (size_t i = 0; i < n; ++i) out[i] = name(a[i]); } \
  EXPORT void half_##name(const half* a, half* out, size_t n) { for (size_t i = 0; i < n; ++i) out[i] = precise::name(a[i]); } \
  EXPORT void vec_##name(const float4* a, float4* out, size_t n) { for (size_t i = 0; i < n / 4; ++i) out[i] = fast::name(a[i]); }
ONE(exp) ONE(exp2) ONE(exp10) ONE(log) ONE(log2) ONE(log10) ONE(sin) ONE(cos) ONE(tan) ONE(sinh) ONE(cosh) ONE(tanh) ONE(asin) ONE(acos)
ONE(atan) ONE(asinh) ONE(acosh) ONE(atanh) ONE(sinpi) ONE(cospi) ONE(sqrt) ONE(rsqrt) ONE(ceil) ONE(floor) ONE(trunc) ONE(rint) ONE(round)
ONE(fract) ONE(fabs) ONE(abs) ONE(sign) ONE(saturate)
#define TWO(name) \
  EXPORT void float_##name(const float* a, const float* b, float* out, size_t n) { for (size_t i = 0; i < n; ++i) out[i] = name(a[i], b[i]); }
TWO(min) TWO(max) TWO(fmin) TWO(fmax) TWO(pow) TWO(powr) TWO(fmod) TWO(atan2) TWO(copysign) TWO(fdim) TWO(step) TWO(nextafter)

#define INT_OPERATIONS(T) \
  EXPORT void T##_integers(const T* a, const T* b, const T* c, T* out, size_t n) { \
    for (size_t i = 0; i < n; ++i, out += 16) { \
      const T r[16] = {popcount(a[i]), clz(a[i]), ctz(a[i]), reverse_bits(a[i]), rotate(a[i], b[i]), mulhi(a[i], b[i]), addsat(a[i], b[i]), \
                       subsat(a[i], b[i]), hadd(a[i], b[i]), rhadd(a[i], b[i]), madhi(a[i], b[i], c[i]), madsat(a[i], b[i], c[i]), \
                       T(absdiff(a[i], b[i])), extract_bits(a[i], 3, 4), insert_bits(a[i], b[i], 2, 5), clamp(a[i], T(-5), T(9))}; \
      for (int k = 0; k < 16; ++k) out[k] = r[k]; \
    } \
  }
INT_OPERATIONS(char) INT_OPERATIONS(uchar) INT_OPERATIONS(short) INT_OPERATIONS(ushort)
INT_OPERATIONS(int) INT_OPERATIONS(uint) INT_OPERATIONS(long) INT_OPERATIONS(ulong)

EXPORT void rest(const float* in, float* out) {
  int e;
  float whole, cosine;
  const float x = in[0];
  float significand = frexp(x, e), part = modf(x, whole), sine = sincos(x, cosine);
  const float values[] = {significand, float(e), part, whole, sine, cosine, ldexp(x, 3), float(ilogb(x)), mix(1.0f, 3.0f, 0.25f),
                          smoothstep(0.0f, 2.0f, 0.5f), clamp(x, 0.0f, 1.0f), float(isnan(NAN)) + isinf(-INFINITY) + isfinite(x) + signbit(-0.0f),
                          max3(1.0f, x, 2.0f), median3(1.0f, x, 2.0f), dot(float3(1, 2, 3), float3(4, 5, 6)), length(float2(3, 4)),
                          normalize(float2(3, 4)).y, cross(float3(1, 0, 0), float3(0, 1, 0)).z, distance(float2(1), float2(4, 5)),
                          reflect(float2(1, -1), float2(0, 1)).y, fma(x, x, 1.0f), float(isnormal(half(6e-5f))), float(isnormal(half(6.2e-5f)))};
  for (unsigned i = 0; i < sizeof values / 4; ++i) out[i] = values[i];
}
