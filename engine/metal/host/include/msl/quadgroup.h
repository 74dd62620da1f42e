// metal_quadgroup: the same for groups of four neighbouring lanes, exchanged with the rest of their simdgroup.
#pragma once

#include "shuffle.h"

namespace metal {
namespace detail {

METAL_FUNC unsigned quad_base() { return this_lane() & ~3u; }

template <class F, class T>
METAL_FUNC T quad_reduce(const T& value) {
  const rt::Lanes lanes = deposit(value, rt::op_quad);
  const unsigned base = quad_base();
  T folded[4];
  for (unsigned i = 0; i < 4; ++i)
    folded[i] = (lanes.active >> (base + i)) & 1 ? deposited<T>(lanes, base + i)
                                                 : T(F::template identity<element_t<T>>());
  return applied<F>(applied<F>(folded[0], folded[2]), applied<F>(folded[1], folded[3]));
}
template <class F, bool Inclusive, class T>
METAL_FUNC T quad_scan(const T& value) {
  const rt::Lanes lanes = deposit(value, rt::op_quad);
  const unsigned base = quad_base(), own = this_lane();
  T running(F::template identity<element_t<T>>());
  for (unsigned i = base; i < own + Inclusive; ++i)
    if ((lanes.active >> i) & 1) running = applied<F>(running, deposited<T>(lanes, i));
  return running;
}
METAL_FUNC unsigned quad_ballot_bits(bool predicate) {
  const rt::Lanes lanes = deposit(predicate, rt::op_quad);
  const unsigned base = quad_base();
  unsigned votes = 0;
  for (unsigned i = 0; i < 4; ++i)
    votes |= unsigned(((lanes.active >> (base + i)) & 1) && deposited<bool>(lanes, base + i)) << i;
  return votes;
}
// A source outside the quad gives the lane its own value.
template <class T>
METAL_FUNC T quad_shuffled(const T& value, int within) {
  const unsigned source = within < 0 || within > 3 ? this_lane() : quad_base() + static_cast<unsigned>(within);
  return shuffled(value, source, rt::op_quad);
}
METAL_FUNC int quad_lane() { return static_cast<int>(this_lane() & 3); }
METAL_FUNC unsigned quad_first(const rt::Lanes& lanes) {
  return quad_base() + static_cast<unsigned>(__builtin_ctz(static_cast<unsigned>(lanes.active >> quad_base()) & 15));
}
// As in a simdgroup (shuffle.h), with quads in its place.
template <class T>
METAL_FUNC T quad_filled(const T& data, const T& filling, int within, int modulo) {
  const rt::Lanes lanes = deposit(filled<T>{data, filling}, rt::op_quad);
  const int base = quad_lane() / modulo * modulo;
  const bool inside = within >= base && within < base + modulo;
  const unsigned source = quad_base() + static_cast<unsigned>(base + (within - base + modulo) % modulo);
  const filled<T> got = read_lane(lanes, source, filled<T>{data, filling}, rt::op_quad);
  return inside ? got.data : got.filling;
}

}  // namespace detail

#define MSL_QUAD(name, call) \
  template <class T, class V = detail::simd_t<T>> METAL_FUNC V name(T value) { return call; }
MSL_QUAD(quad_sum, detail::quad_reduce<detail::add>(V(value)))
MSL_QUAD(quad_product, detail::quad_reduce<detail::multiply>(V(value)))
MSL_QUAD(quad_min, detail::quad_reduce<detail::minimum>(V(value)))
MSL_QUAD(quad_max, detail::quad_reduce<detail::maximum>(V(value)))
MSL_QUAD(quad_and, detail::quad_reduce<detail::conjoin>(V(value)))
MSL_QUAD(quad_or, detail::quad_reduce<detail::disjoin>(V(value)))
MSL_QUAD(quad_xor, detail::quad_reduce<detail::differ>(V(value)))
MSL_QUAD(quad_prefix_inclusive_sum, (detail::quad_scan<detail::add, true>(V(value))))
MSL_QUAD(quad_prefix_exclusive_sum, (detail::quad_scan<detail::add, false>(V(value))))
MSL_QUAD(quad_prefix_inclusive_product, (detail::quad_scan<detail::multiply, true>(V(value))))
MSL_QUAD(quad_prefix_exclusive_product, (detail::quad_scan<detail::multiply, false>(V(value))))
#undef MSL_QUAD

#define MSL_QUAD_SHUFFLE(name, source) \
  template <class T, class V = detail::simd_t<T>> METAL_FUNC V name(T value, ushort n) {               \
    return detail::quad_shuffled(V(value), source);                                                    \
  }
MSL_QUAD_SHUFFLE(quad_broadcast, n)
MSL_QUAD_SHUFFLE(quad_shuffle, n)
MSL_QUAD_SHUFFLE(quad_shuffle_xor, detail::quad_lane() ^ n)
MSL_QUAD_SHUFFLE(quad_shuffle_up, detail::quad_lane() - n)
MSL_QUAD_SHUFFLE(quad_shuffle_down, detail::quad_lane() + n)
MSL_QUAD_SHUFFLE(quad_shuffle_rotate_up, (detail::quad_lane() - n) & 3)
MSL_QUAD_SHUFFLE(quad_shuffle_rotate_down, (detail::quad_lane() + n) & 3)
#undef MSL_QUAD_SHUFFLE

#define MSL_QUAD_FILL(name, source) \
  template <class T, class V = detail::simd_t<T>>                                                      \
  METAL_FUNC V name(T data, detail::identity_t<detail::simd_t<T>> filling, ushort delta, ushort modulo = 4) { \
    return detail::quad_filled(V(data), V(filling), source, modulo);                                   \
  }
MSL_QUAD_FILL(quad_shuffle_and_fill_up, detail::quad_lane() - delta)
MSL_QUAD_FILL(quad_shuffle_and_fill_down, detail::quad_lane() + delta)
#undef MSL_QUAD_FILL

// The lowest lane of the quad that takes part.
template <class T, class V = detail::simd_t<T>>
METAL_FUNC V quad_broadcast_first(T value) {
  const rt::Lanes lanes = detail::deposit(V(value), rt::op_quad);
  return detail::deposited<V>(lanes, detail::quad_first(lanes));
}
METAL_FUNC bool quad_is_first() { return detail::this_lane() == detail::quad_first(detail::deposit(true, rt::op_quad)); }

struct quad_vote {
  using vote_t = uint;
  vote_t votes;
  constexpr explicit quad_vote(vote_t votes) : votes(votes) {}
  constexpr explicit operator vote_t() const { return votes; }
  constexpr bool all() const { return votes == 15; }
  constexpr bool any() const { return votes != 0; }
};
METAL_FUNC quad_vote quad_ballot(bool predicate) { return quad_vote(detail::quad_ballot_bits(predicate)); }
METAL_FUNC quad_vote quad_active_threads_mask() { return quad_vote(detail::quad_ballot_bits(true)); }
METAL_FUNC bool quad_any(bool predicate) { return detail::quad_ballot_bits(predicate) != 0; }
METAL_FUNC bool quad_all(bool predicate) { return detail::quad_ballot_bits(!predicate) == 0; }

}  // namespace metal
