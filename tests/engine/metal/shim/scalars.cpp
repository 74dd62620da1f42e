// Conversions and arithmetic of half and bfloat over arrays: name_X(in…, out, n).
#define CONVERT(from, to, name) \
  EXPORT void name(const from* in, to* out, size_t n) { for (size_t i = 0; i < n; ++i) out[i] = static_cast<to>(in[i]); }
CONVERT(half, bfloat, half_to_bfloat)
CONVERT(bfloat, half, bfloat_to_half)
CONVERT(bfloat, float, bfloat_to_float)
CONVERT(float, bfloat, float_to_bfloat)
CONVERT(float, half, float_to_half)
CONVERT(half, float, half_to_float)
CONVERT(int, bfloat, int_to_bfloat)
CONVERT(uint, bfloat, uint_to_bfloat)
CONVERT(long, bfloat, long_to_bfloat)
CONVERT(ulong, bfloat, ulong_to_bfloat)
CONVERT(short, bfloat, short_to_bfloat)
CONVERT(bfloat, int, bfloat_to_int)
CONVERT(bfloat, uchar, bfloat_to_uchar)
CONVERT(int, half, int_to_half)

#define OPERATE(T, op, name) \
  EXPORT void name(const T* a, const T* b, T* out, size_t n) { for (size_t i = 0; i < n; ++i) out[i] = a[i] op b[i]; }
#define OPERATE_ALL(T) \
  OPERATE(T, +, T##_add) OPERATE(T, -, T##_subtract) OPERATE(T, *, T##_multiply) OPERATE(T, /, T##_divide)
OPERATE_ALL(half)
OPERATE_ALL(bfloat)

// Three operations, each rounded: what excess precision would give differs.
#define CHAIN(T) \
  EXPORT void T##_chain(const T* a, const T* b, T* out, size_t n) { \
    for (size_t i = 0; i < n; ++i) out[i] = (a[i] * b[i] + a[i]) - b[i]; \
  } \
  EXPORT void T##_fma(const T* a, const T* b, const T* c, T* out, size_t n) { \
    for (size_t i = 0; i < n; ++i) out[i] = fma(a[i], b[i], c[i]); \
  }
CHAIN(half)
CHAIN(bfloat)
