// Reductions, prefixes and votes over a simdgroup of 32 lanes.
//
// A reduction folds the upper half of the lanes onto the lower one, five times (32, 16, 8, 4, 2), lanes that take no
// part counting as the operation's identity; each step rounds to the value's type. A prefix runs from lane 0 upwards.
// Apple documents neither order.
#pragma once

#include "exchange.h"

namespace metal {
namespace detail {

template <class T> constexpr T lowest_value() {
  if constexpr (is_floating_point_v<T>) return static_cast<T>(-__builtin_inff());
  else return numeric_limits<T>::min();
}
template <class T> constexpr T highest_value() {
  if constexpr (is_floating_point_v<T>) return static_cast<T>(__builtin_inff());
  else return numeric_limits<T>::max();
}

// An operation on elements with its identity. add starts from -0, so that a sum of -0 stays -0.
struct add {
  template <class T> static METAL_FUNC T apply(T a, T b) { return static_cast<T>(a + b); }
  template <class T> static constexpr T identity() { return is_floating_point_v<T> ? static_cast<T>(-0.0f) : T(0); }
};
struct multiply {
  template <class T> static METAL_FUNC T apply(T a, T b) { return static_cast<T>(a * b); }
  template <class T> static constexpr T identity() { return T(1); }
};
struct minimum {
  template <class T> static METAL_FUNC T apply(T a, T b) { return smaller(a, b); }
  template <class T> static constexpr T identity() { return highest_value<T>(); }
};
struct maximum {
  template <class T> static METAL_FUNC T apply(T a, T b) { return larger(a, b); }
  template <class T> static constexpr T identity() { return lowest_value<T>(); }
};
struct conjoin {
  template <class T> static METAL_FUNC T apply(T a, T b) { return static_cast<T>(a & b); }
  template <class T> static constexpr T identity() { return static_cast<T>(~T(0)); }
};
struct disjoin {
  template <class T> static METAL_FUNC T apply(T a, T b) { return static_cast<T>(a | b); }
  template <class T> static constexpr T identity() { return T(0); }
};
struct differ {
  // MLX's headers name the exclusive or of floats without ever using it: their bits, then.
  static METAL_FUNC float apply(float a, float b) {
    return __builtin_bit_cast(float, __builtin_bit_cast(uint, a) ^ __builtin_bit_cast(uint, b));
  }
  template <class T> static METAL_FUNC T apply(T a, T b) { return static_cast<T>(a ^ b); }
  template <class T> static constexpr T identity() { return T(0); }
};

template <class F, class T>
METAL_FUNC T applied(const T& a, const T& b) {
  if constexpr (is_vec<T>) {
    T result;
    for (int i = 0; i < T::size_of_vec; ++i) result.e[i] = F::apply(a.e[i], b.e[i]);
    return result;
  } else {
    return F::apply(a, b);
  }
}

template <class F, class T>
METAL_FUNC T reduce(const T& value) {
  const rt::Lanes lanes = deposit(value, rt::op_reduce);
  if (*lanes.known) {  // an earlier lane has folded them
    T result;
    __builtin_memcpy(&result, lanes.result, sizeof(T));
    return result;
  }
  T folded[simd_lanes];
  if (lanes.active == all_lanes) {
    for (int i = 0; i < simd_lanes; ++i) folded[i] = deposited<T>(lanes, i);
  } else {
    const T nothing(F::template identity<element_t<T>>());
    for (int i = 0; i < simd_lanes; ++i) folded[i] = (lanes.active >> i) & 1 ? deposited<T>(lanes, i) : nothing;
  }
  for (int half_width = simd_lanes / 2; half_width > 0; half_width /= 2)
    for (int i = 0; i < half_width; ++i) folded[i] = applied<F>(folded[i], folded[i + half_width]);
  __builtin_memcpy(lanes.result, &folded[0], sizeof(T));
  *lanes.known = true;
  return folded[0];
}

template <class F, bool Inclusive, class T>
METAL_FUNC T scan(const T& value) {
  const rt::Lanes lanes = deposit(value, rt::op_scan);
  const unsigned own = this_lane();
  T running(Inclusive || !is_same_v<F, add> ? F::template identity<element_t<T>>() : element_t<T>(0));
  for (unsigned i = 0; i < own + Inclusive; ++i)
    if ((lanes.active >> i) & 1) running = applied<F>(running, deposited<T>(lanes, i));
  return running;
}

METAL_FUNC unsigned long ballot(bool predicate) {
  const rt::Lanes lanes = deposit(predicate, rt::op_vote);
  unsigned long votes = 0;
  for (int i = 0; i < simd_lanes; ++i)
    votes |= static_cast<unsigned long>(((lanes.active >> i) & 1) && deposited<bool>(lanes, i)) << i;
  return votes;
}

}  // namespace detail

#define MSL_REDUCTION(name, F) \
  template <class T, class V = detail::simd_t<T>> METAL_FUNC V name(T value) { \
    return detail::reduce<detail::F>(V(value));                                \
  }
MSL_REDUCTION(simd_sum, add)
MSL_REDUCTION(simd_product, multiply)
MSL_REDUCTION(simd_min, minimum)
MSL_REDUCTION(simd_max, maximum)
MSL_REDUCTION(simd_and, conjoin)
MSL_REDUCTION(simd_or, disjoin)
MSL_REDUCTION(simd_xor, differ)
#undef MSL_REDUCTION

#define MSL_PREFIX(name, F, inclusive) \
  template <class T, class V = detail::simd_t<T>> METAL_FUNC V name(T value) { \
    return detail::scan<detail::F, inclusive>(V(value));                       \
  }
MSL_PREFIX(simd_prefix_inclusive_sum, add, true)
MSL_PREFIX(simd_prefix_exclusive_sum, add, false)
MSL_PREFIX(simd_prefix_inclusive_product, multiply, true)
MSL_PREFIX(simd_prefix_exclusive_product, multiply, false)
#undef MSL_PREFIX

// One bit for each lane; bits of lanes that took no part are 0.
struct simd_vote {
  using vote_t = ulong;
  vote_t votes;
  simd_vote() = default;
  constexpr explicit simd_vote(vote_t votes) : votes(votes) {}
  constexpr explicit operator vote_t() const { return votes; }
  constexpr explicit operator uint() const { return static_cast<uint>(votes); }
  constexpr bool all() const { return votes == detail::all_lanes; }
  constexpr bool any() const { return votes != 0; }
};

METAL_FUNC simd_vote simd_ballot(bool predicate) { return simd_vote(detail::ballot(predicate)); }
METAL_FUNC bool simd_any(bool predicate) { return detail::ballot(predicate) != 0; }
// True if the predicate holds on every lane that takes part.
METAL_FUNC bool simd_all(bool predicate) { return detail::ballot(!predicate) == 0; }
METAL_FUNC simd_vote simd_active_threads_mask() { return simd_vote(detail::ballot(true)); }
METAL_FUNC bool simd_is_first() {
  const rt::Lanes lanes = detail::deposit(true, rt::op_vote);
  return detail::this_lane() == unsigned(__builtin_ctzll(lanes.active));
}
METAL_FUNC bool simd_is_helper_thread() { return false; }

}  // namespace metal
