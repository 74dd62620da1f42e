// The names of the vector types (float4, packed_half3 …), in namespace metal and outside it, where MSL has them as
// well, their sizes and alignments as the MSL specification's tables give them, and as_type.
#pragma once

#include "vec_ops.h"

#define MSL_NAMES(T)                                                                          \
  namespace metal {                                                                           \
  using T##2 = vec<T, 2>;                                                                     \
  using T##3 = vec<T, 3>;                                                                     \
  using T##4 = vec<T, 4>;                                                                     \
  using packed_##T##2 = packed_vec<T, 2>;                                                     \
  using packed_##T##3 = packed_vec<T, 3>;                                                     \
  using packed_##T##4 = packed_vec<T, 4>;                                                     \
  }                                                                                           \
  using metal::T##2;                                                                          \
  using metal::T##3;                                                                          \
  using metal::T##4;                                                                          \
  using metal::packed_##T##2;                                                                 \
  using metal::packed_##T##3;                                                                 \
  using metal::packed_##T##4;
MSL_NAMES(bool)
MSL_NAMES(char)
MSL_NAMES(uchar)
MSL_NAMES(short)
MSL_NAMES(ushort)
MSL_NAMES(int)
MSL_NAMES(uint)
MSL_NAMES(long)
MSL_NAMES(ulong)
MSL_NAMES(half)
MSL_NAMES(bfloat)
MSL_NAMES(float)
#undef MSL_NAMES

namespace metal {

namespace detail {

template <class T>
constexpr bool laid_out =
    sizeof(vec<T, 2>) == 2 * sizeof(T) && alignof(vec<T, 2>) == 2 * sizeof(T) && sizeof(vec<T, 3>) == 4 * sizeof(T) &&
    alignof(vec<T, 3>) == 4 * sizeof(T) && sizeof(vec<T, 4>) == 4 * sizeof(T) && alignof(vec<T, 4>) == 4 * sizeof(T) &&
    sizeof(packed_vec<T, 2>) == 2 * sizeof(T) && sizeof(packed_vec<T, 3>) == 3 * sizeof(T) &&
    sizeof(packed_vec<T, 4>) == 4 * sizeof(T) && alignof(packed_vec<T, 4>) == alignof(T);
static_assert(laid_out<float>, "MSL's sizes and alignments of vectors; tests look at the other element types");

}  // namespace detail

// Reinterprets the bits; both types have one size (a vec of 3 counts as 4, as it does in MSL).
template <class To, class From>
constexpr To as_type(const From& value) {
  if constexpr (detail::width<From> > 1 && !is_same_v<From, detail::plain_t<From>>) {
    return as_type<To>(detail::plain_t<From>(value));
  } else {
    static_assert(sizeof(To) == sizeof(From), "as_type: the two types differ in size");
    if constexpr (__is_trivially_copyable(To) && __is_trivially_copyable(From)) {
      return __builtin_bit_cast(To, value);
    } else {
      To result;
      __builtin_memcpy(static_cast<void*>(&result), static_cast<const void*>(&value), sizeof(To));
      return result;
    }
  }
}

}  // namespace metal
