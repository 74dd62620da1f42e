// What every simdgroup function is made of: each lane deposits a value and sees those of all lanes that took part.
//
// All of it is always_inline: the runtime tells operations apart by the address that rt::exchange returns to.
#pragma once

#include "barrier.h"
#include "common.h"

namespace metal {
namespace detail {

constexpr int simd_lanes = rt::kSimdWidth;
constexpr unsigned long all_lanes = (1ul << simd_lanes) - 1;

// In checked builds a vec's copy is a function (vec.h).
#if __has_feature(thread_sanitizer) && !defined(MSL_PLAIN_COPIES)
inline constexpr bool watched_copies = true;
#else
inline constexpr bool watched_copies = false;
#endif

METAL_FUNC unsigned this_lane() { return rt::self().lane; }

template <class T>
METAL_FUNC T deposited(const rt::Lanes& lanes, unsigned lane) {
  T value;
  __builtin_memcpy(static_cast<void*>(&value), lanes.at(lane), sizeof(T));
  return value;
}

template <class T>
METAL_FUNC rt::Lanes deposit(const T& value, rt::Op op) {
  static_assert(sizeof(T) <= rt::kDepositBytes && (watched_copies || __is_trivially_constructible(T, const T&)),
                "not a value that simd functions exchange");
  return rt::exchange(&value, sizeof(T), op);
}

// The value of `lane`; of the calling lane where `lane` is outside the simdgroup. Reading a lane that took no part is
// reported.
template <class T>
METAL_FUNC T read_lane(const rt::Lanes& lanes, unsigned lane, const T& own, rt::Op op) {
  if (lane >= unsigned(simd_lanes)) return own;
  if (!((lanes.active >> lane) & 1)) {
    rt::inactive_lane_read(op, lane);
    return own;
  }
  return deposited<T>(lanes, lane);
}

// Values that simd functions take: scalars (bool too) and vectors.
template <class A> using simd_t = plain_t<A>;

}  // namespace detail
}  // namespace metal
