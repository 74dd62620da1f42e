// metal_pack: vectors of normalised integers packed into a word, component 0 in the lowest bits.
// Packing rounds to nearest, ties to even, after clamping; a signed value of -2^(n-1) unpacks to -1.
#pragma once

#include "math.h"

namespace metal {
namespace detail {

template <int Bits, bool Signed> inline constexpr float pack_scale = static_cast<float>((1 << (Bits - Signed)) - 1);

template <int Bits, bool Signed, int N>
inline uint packed(const vec<float, N>& v) {
  uint word = 0;
  for (int i = 0; i < N; ++i) {
    const float value = clamped(v.e[i], Signed ? -1.0f : 0.0f, 1.0f);
    const int n = static_cast<int>(__builtin_rintf((value != value ? 0.0f : value) * pack_scale<Bits, Signed>));
    word |= (static_cast<uint>(n) & ((1u << Bits) - 1)) << (Bits * i);
  }
  return word;
}
template <int Bits, bool Signed, int N>
inline vec<float, N> unpacked(uint word) {
  vec<float, N> result;
  for (int i = 0; i < N; ++i) {
    const uint bits = word << (32 - Bits - Bits * i);
    const float n = Signed ? static_cast<float>(static_cast<int>(bits) >> (32 - Bits))
                           : static_cast<float>(bits >> (32 - Bits));
    result.e[i] = larger(n / pack_scale<Bits, Signed>, -1.0f);
  }
  return result;
}

}  // namespace detail

#define MSL_PACK(kind, bits, is_signed, n, word)                                                                     \
  inline word pack_float_to_##kind(vec<float, n> v) { return static_cast<word>(detail::packed<bits, is_signed>(v)); } \
  inline word pack_half_to_##kind(vec<half, n> v) { return pack_float_to_##kind(vec<float, n>(v)); }                  \
  inline vec<float, n> unpack_##kind##_to_float(word w) { return detail::unpacked<bits, is_signed, n>(w); }           \
  inline vec<half, n> unpack_##kind##_to_half(word w) { return vec<half, n>(unpack_##kind##_to_float(w)); }
MSL_PACK(snorm4x8, 8, true, 4, uint)
MSL_PACK(unorm4x8, 8, false, 4, uint)
MSL_PACK(snorm2x16, 16, true, 2, uint)
MSL_PACK(unorm2x16, 16, false, 2, uint)
#undef MSL_PACK

}  // namespace metal
