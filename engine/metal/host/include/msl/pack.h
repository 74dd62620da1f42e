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

namespace detail {

// Fields of unequal widths: component i has widths[i] bits, the first the lowest.
template <int N>
inline uint packed_fields(const vec<float, N>& v, const int (&widths)[N]) {
  uint word = 0;
  for (int i = 0, at = 0; i < N; at += widths[i++]) {
    const float value = clamped(v.e[i], 0.0f, 1.0f), scale = static_cast<float>((1 << widths[i]) - 1);
    word |= static_cast<uint>(__builtin_rintf((value != value ? 0.0f : value) * scale)) << at;
  }
  return word;
}
template <int N>
inline vec<float, N> unpacked_fields(uint word, const int (&widths)[N]) {
  vec<float, N> result;
  for (int i = 0, at = 0; i < N; at += widths[i++]) {
    const uint most = (1u << widths[i]) - 1;
    result.e[i] = static_cast<float>((word >> at) & most) / static_cast<float>(most);
  }
  return result;
}
inline constexpr int fields_10a2[4] = {10, 10, 10, 2};
inline constexpr int fields_565[3] = {5, 6, 5};

// IEC 61966-2-1; alpha stays linear.
inline vec<float, 4> to_srgb(vec<float, 4> v) {
  for (int i = 0; i < 3; ++i) {
    const float x = clamped(v.e[i], 0.0f, 1.0f);
    v.e[i] = x <= 0.0031308f ? 12.92f * x : 1.055f * __builtin_powf(x, 1.0f / 2.4f) - 0.055f;
  }
  return v;
}
inline vec<float, 4> from_srgb(vec<float, 4> v) {
  for (int i = 0; i < 3; ++i)
    v.e[i] = v.e[i] <= 0.04045f ? v.e[i] / 12.92f : __builtin_powf((v.e[i] + 0.055f) / 1.055f, 2.4f);
  return v;
}

}  // namespace detail

#define MSL_PACK_FIELDS(pack_kind, unpack_kind, n, word, to_word, from_word)                                    \
  inline word pack_float_to_##pack_kind(vec<float, n> v) { return static_cast<word>(to_word); }                  \
  inline word pack_half_to_##pack_kind(vec<half, n> v) { return pack_float_to_##pack_kind(vec<float, n>(v)); }   \
  inline vec<float, n> unpack_##unpack_kind##_to_float(word w) { return from_word; }                             \
  inline vec<half, n> unpack_##unpack_kind##_to_half(word w) { return vec<half, n>(unpack_##unpack_kind##_to_float(w)); }
MSL_PACK_FIELDS(unorm10a2, unorm10a2, 4, uint, detail::packed_fields(v, detail::fields_10a2),
                detail::unpacked_fields(w, detail::fields_10a2))
MSL_PACK_FIELDS(unorm565, unorm565, 3, ushort, detail::packed_fields(v, detail::fields_565),
                detail::unpacked_fields(w, detail::fields_565))
MSL_PACK_FIELDS(srgb_unorm4x8, unorm4x8_srgb, 4, uint, pack_float_to_unorm4x8(detail::to_srgb(v)),
                detail::from_srgb(unpack_unorm4x8_to_float(w)))
#undef MSL_PACK_FIELDS

}  // namespace metal
