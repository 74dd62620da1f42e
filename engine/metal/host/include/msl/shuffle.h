// Functions that move values between the lanes of a simdgroup.
//
// A source outside the simdgroup (shuffle_up at the lower lanes, shuffle_down at the upper ones) gives the lane its
// own value back.
#pragma once

#include "simdgroup.h"

namespace metal {
namespace detail {

template <class T>
METAL_FUNC T shuffled(const T& value, unsigned source, rt::Op op) {
  const rt::Lanes lanes = deposit(value, op);
  return read_lane(lanes, source, value, op);
}

// Both values are deposited as a pair, because the filling data come from the lane that the data would have come
// from, modulo.
template <class T> struct filled { T data, filling; };

template <class T>
METAL_FUNC T shuffled_and_filled(const T& data, const T& filling, int source, unsigned modulo, unsigned lane) {
  const rt::Lanes lanes = deposit(filled<T>{data, filling}, rt::op_shuffle);
  const int base = static_cast<int>(lane / modulo * modulo);
  const bool inside = source >= base && source < base + static_cast<int>(modulo);
  const int wrapped = base + (source - base + static_cast<int>(modulo)) % static_cast<int>(modulo);
  const filled<T> got = read_lane(lanes, static_cast<unsigned>(wrapped), filled<T>{data, filling}, rt::op_shuffle);
  return inside ? got.data : got.filling;
}

}  // namespace detail

template <class T, class V = detail::simd_t<T>>
METAL_FUNC V simd_shuffle(T value, ushort lane) {
  return detail::shuffled(V(value), lane, rt::op_shuffle);
}
template <class T, class V = detail::simd_t<T>>
METAL_FUNC V simd_broadcast(T value, ushort lane) {
  return detail::shuffled(V(value), lane, rt::op_broadcast);
}
template <class T, class V = detail::simd_t<T>>
METAL_FUNC V simd_shuffle_xor(T value, ushort mask) {
  return detail::shuffled(V(value), detail::this_lane() ^ mask, rt::op_shuffle);
}
template <class T, class V = detail::simd_t<T>>
METAL_FUNC V simd_shuffle_up(T value, ushort delta) {
  return detail::shuffled(V(value), detail::this_lane() - delta, rt::op_shuffle);
}
template <class T, class V = detail::simd_t<T>>
METAL_FUNC V simd_shuffle_down(T value, ushort delta) {
  return detail::shuffled(V(value), detail::this_lane() + delta, rt::op_shuffle);
}
template <class T, class V = detail::simd_t<T>>
METAL_FUNC V simd_shuffle_rotate_up(T value, ushort delta) {
  return detail::shuffled(V(value), (detail::this_lane() - delta) % detail::simd_lanes, rt::op_shuffle);
}
template <class T, class V = detail::simd_t<T>>
METAL_FUNC V simd_shuffle_rotate_down(T value, ushort delta) {
  return detail::shuffled(V(value), (detail::this_lane() + delta) % detail::simd_lanes, rt::op_shuffle);
}
template <class T, class V = detail::simd_t<T>>
METAL_FUNC V simd_shuffle_and_fill_up(T data, detail::identity_t<detail::simd_t<T>> filling, ushort delta,
                                      ushort modulo = detail::simd_lanes) {
  const unsigned lane = detail::this_lane();
  return detail::shuffled_and_filled(V(data), V(filling), static_cast<int>(lane) - delta, modulo, lane);
}
template <class T, class V = detail::simd_t<T>>
METAL_FUNC V simd_shuffle_and_fill_down(T data, detail::identity_t<detail::simd_t<T>> filling, ushort delta,
                                        ushort modulo = detail::simd_lanes) {
  const unsigned lane = detail::this_lane();
  return detail::shuffled_and_filled(V(data), V(filling), static_cast<int>(lane) + delta, modulo, lane);
}

// The lowest lane that takes part.
template <class T, class V = detail::simd_t<T>>
METAL_FUNC V simd_broadcast_first(T value) {
  const rt::Lanes lanes = detail::deposit(V(value), rt::op_broadcast_first);
  return detail::deposited<V>(lanes, static_cast<unsigned>(__builtin_ctzll(lanes.active)));
}

}  // namespace metal
