// simdgroup_matrix<T, 8, 8>: a matrix that the 32 lanes of a simdgroup own together.
//
// Each lane constructs its own object by running the same code. Normally lane 0's object holds all 64 values and lane
// 0 alone loads, multiplies and stores, the others skip: no rendezvous. Only thread_elements() spreads the values
// over the lanes, two each, in the layout that MLX's mma.h relies on; an operation on operands that are all spread
// stays spread (one rendezvous, every lane computes its two results), any other one first gathers what is spread into
// lane 0. Whether an object is gathered or spread is the same in every lane, since lanes run these operations
// together. A source that names thread_elements() may do so in a branch that some lanes don't take, where nothing can be
// exchanged: with MSL_SPREAD_MATRICES, which compiler.py then defines, every object is spread from the start. Values are kept as floats that T can represent: half and bfloat are exact in it. Multiplication
// accumulates over k = 0 … 7 in order, rounding to the result's type after each step; Apple's order is not known.
#pragma once

#include "shuffle.h"
#include "vec_types.h"

namespace metal {
template <class T, int Columns, int Rows = Columns> struct simdgroup_matrix;

namespace detail {

typedef float row8 __attribute__((vector_size(32), aligned(16)));

// The row, and the first of the two columns, that a lane holds.
#ifdef MSL_SPREAD_MATRICES
inline constexpr bool always_spread = true;
#else
inline constexpr bool always_spread = false;
#endif
constexpr int fragment_row(int lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
constexpr int fragment_column(int lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }
constexpr int fragment_lane(int row, int column) {
  return (row & 4) * 4 + (column & 4) * 2 + (row % 4) * 2 + (column % 4) / 2;
}
static_assert(fragment_lane(fragment_row(27), fragment_column(27)) == 27, "the inverse of the layout");

template <class T> METAL_FUNC void round_row(row8& row) {
  if constexpr (!is_same_v<T, float>)
    for (int i = 0; i < 8; ++i) row[i] = static_cast<float>(static_cast<T>(row[i]));
}

// d = a b + c, row by row; d may be any of the operands.
template <class T>
inline void multiply_add(float* d, const float* a, const float* b, const float* c) {
  row8 rows[8], result[8];
  for (int k = 0; k < 8; ++k) __builtin_memcpy(&rows[k], b + 8 * k, sizeof(row8));
  for (int r = 0; r < 8; ++r) {
    if (c) __builtin_memcpy(&result[r], c + 8 * r, sizeof(row8));
    else result[r] = row8{};
    for (int k = 0; k < 8; ++k) {
      result[r] += a[8 * r + k] * rows[k];
      round_row<T>(result[r]);
    }
  }
  __builtin_memcpy(d, result, sizeof result);
}

// Where lane 0 leaves gathered values for the others to pick up: two areas a simdgroup in turn, since lanes that are
// still reading one have not arrived at the exchange that the next but one needs. A host thread runs one threadgroup,
// of at most 32 simdgroups, at a time.
struct spreading { float values[2][64]; unsigned turn; };
inline __thread spreading spread_areas[rt::kMaxThreads / rt::kSimdWidth];

struct fragments { float a[2], b[2]; };

// Every lane passes here with each operation that lane 0 executes for all: checked runs see who does not.
METAL_FUNC void take_part() {
#if __has_feature(thread_sanitizer)
  rt::matrix_op_reached();
#endif
}

}  // namespace detail

template <class T>
struct simdgroup_matrix<T, 8, 8> {
  static_assert(is_floating_point_v<T>, "simdgroup_matrix holds float, half or bfloat");

  simdgroup_matrix() : spread(true) {}
  // A scalar fills the diagonal.
  template <class S, enable_if_t<is_arithmetic_v<S>, int> = 0>
  explicit simdgroup_matrix(S diagonal) : spread(detail::always_spread) {
    const int lane = static_cast<int>(detail::this_lane());
    if constexpr (detail::always_spread) {
      const int beyond = detail::fragment_row(lane) - detail::fragment_column(lane);
      pair = vec<T, 2>(beyond == 0 ? static_cast<T>(diagonal) : T(0), beyond == 1 ? static_cast<T>(diagonal) : T(0));
    }
    if (detail::always_spread || lane != 0) return;
    for (int i = 0; i < 64; ++i) values[i] = i % 9 == 0 ? static_cast<float>(static_cast<T>(diagonal)) : 0.0f;
  }
  METAL_FUNC vec<T, 2>& thread_elements() {
    scatter();
    return pair;
  }
  METAL_FUNC const vec<T, 2>& thread_elements() const {
    scatter();
    return pair;
  }

  METAL_FUNC void gather() const {
    if (!spread) return;
    const rt::Lanes lanes = detail::deposit(pair, rt::op_matrix);
    spread = false;
    if (detail::this_lane() != 0) return;
    for (int lane = 0; lane < detail::simd_lanes; ++lane) {
      const vec<T, 2> got = detail::deposited<vec<T, 2>>(lanes, lane);
      float* at = values + 8 * detail::fragment_row(lane) + detail::fragment_column(lane);
      at[0] = static_cast<float>(got.e[0]), at[1] = static_cast<float>(got.e[1]);
    }
  }
  METAL_FUNC void scatter() const {
    if (spread) return;
    const unsigned lane = detail::this_lane();
    const float* area = nullptr;
    if (lane == 0) {
      detail::spreading& own = detail::spread_areas[rt::self().simdgroup];
      own.turn ^= 1;
      __builtin_memcpy(own.values[own.turn], values, sizeof values);
      area = own.values[own.turn];
    }
    const rt::Lanes lanes = detail::deposit(area, rt::op_matrix);
    area = detail::deposited<const float*>(lanes, 0);
    const float* at = area + 8 * detail::fragment_row(lane) + detail::fragment_column(lane);
    pair = vec<T, 2>(at[0], at[1]);
    spread = true;
  }

  alignas(16) mutable float values[64];  // in lane 0, while gathered
  mutable vec<T, 2> pair;                // in every lane, while spread
  mutable bool spread;
};

template <class T, int Columns, int Rows = Columns, class S>
inline simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(S value) {
  simdgroup_matrix<T, Columns, Rows> result;
  result.spread = detail::always_spread;
  if constexpr (detail::always_spread) result.pair = vec<T, 2>(static_cast<T>(value));
  else if (detail::this_lane() == 0)
    for (float& v : result.values) v = static_cast<float>(static_cast<T>(value));
  return result;
}
template <class T, int Columns, int Rows = Columns>
inline simdgroup_matrix<T, Columns, Rows> make_diagonal_simdgroup_matrix(detail::identity_t<T> value) {
  return simdgroup_matrix<T, Columns, Rows>(value);
}

// matrix_origin is (column, row) in the source; a transposed matrix takes its columns from the source's rows.
template <class T>
METAL_FUNC void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, const volatile T* source, ulong elements_per_row = 8,
                               ulong2 matrix_origin = 0, bool transpose_matrix = false) {
  d.spread = detail::always_spread;
  detail::take_part();
  const int lane = static_cast<int>(detail::this_lane());
  if (lane == 0) rt::count_matrix_op();
  else if (!detail::always_spread) return;
  const long origin = static_cast<long>(matrix_origin.y * elements_per_row + matrix_origin.x);
  const T* base = const_cast<const T*>(source) + origin;
  const long across = transpose_matrix ? static_cast<long>(elements_per_row) : 1;
  const long down = transpose_matrix ? 1 : static_cast<long>(elements_per_row);
  if constexpr (detail::always_spread) {
    base += detail::fragment_row(lane) * down + detail::fragment_column(lane) * across;
    d.pair = vec<T, 2>(base[0], base[across]);
    return;
  }
  for (long r = 0; r < 8; ++r)
    for (long c = 0; c < 8; ++c) d.values[8 * r + c] = static_cast<float>(base[r * down + c * across]);
}

template <class T>
METAL_FUNC void simdgroup_store(const simdgroup_matrix<T, 8, 8>& a, volatile T* destination, ulong elements_per_row = 8,
                                ulong2 matrix_origin = 0, bool transpose_matrix = false) {
  if (!detail::always_spread) a.gather();
  detail::take_part();
  const int lane = static_cast<int>(detail::this_lane());
  if (lane == 0) rt::count_matrix_op();
  else if (!detail::always_spread) return;
  const long origin = static_cast<long>(matrix_origin.y * elements_per_row + matrix_origin.x);
  T* base = const_cast<T*>(destination) + origin;
  const long across = transpose_matrix ? static_cast<long>(elements_per_row) : 1;
  const long down = transpose_matrix ? 1 : static_cast<long>(elements_per_row);
  if constexpr (detail::always_spread) {
    base += detail::fragment_row(lane) * down + detail::fragment_column(lane) * across;
    base[0] = a.pair.e[0], base[across] = a.pair.e[1];
    return;
  }
  for (long r = 0; r < 8; ++r)
    for (long c = 0; c < 8; ++c) base[r * down + c * across] = static_cast<T>(a.values[8 * r + c]);
}

namespace detail {

// Every operand spread: each lane picks the row and the two columns it needs from the deposits.
template <class D, class A, class B, class C>
METAL_FUNC void multiply_spread(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>* c) {
  const fragments own = {{float(a.pair.e[0]), float(a.pair.e[1])}, {float(b.pair.e[0]), float(b.pair.e[1])}};
  const rt::Lanes lanes = deposit(own, rt::op_matrix);
  const int lane = static_cast<int>(this_lane()), row = fragment_row(lane), column = fragment_column(lane);
  if (lane == 0) rt::count_matrix_op();
  D sum[2] = {D(0), D(0)};
  if (c)
    for (int i = 0; i < 2; ++i) sum[i] = static_cast<D>(static_cast<float>(c->pair.e[i]));
  for (int k = 0; k < 8; ++k) {
    float left, right[2];
    const unsigned at = __builtin_offsetof(fragments, a) + 4 * (k % 2);
    __builtin_memcpy(&left, lanes.at(fragment_lane(row, k)) + at, sizeof left);
    __builtin_memcpy(right, lanes.at(fragment_lane(k, column)) + __builtin_offsetof(fragments, b), sizeof right);
    for (int i = 0; i < 2; ++i) sum[i] = static_cast<D>(static_cast<float>(sum[i]) + left * right[i]);
  }
  d.pair = vec<D, 2>(sum[0], sum[1]);
  d.spread = true;
}

template <class D, class A, class B, class C>
METAL_FUNC void multiply_any(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                             const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>* c) {
  if (always_spread || (a.spread && b.spread && (!c || c->spread))) return multiply_spread(d, a, b, c);
  a.gather(), b.gather();
  if (c) c->gather();
  d.spread = false;
  take_part();
  if (this_lane() != 0) return;
  rt::count_matrix_op();
  multiply_add<D>(d.values, a.values, b.values, c ? c->values : nullptr);
}

}  // namespace detail

template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                              const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c) {
  detail::multiply_any(d, a, b, &c);
}
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b) {
  detail::multiply_any(d, a, b, static_cast<const simdgroup_matrix<D, 8, 8>*>(nullptr));
}
template <class A, class B>
METAL_FUNC simdgroup_matrix<A, 8, 8> operator*(const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_matrix<A, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}

}  // namespace metal

namespace metal {
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;
}  // namespace metal
using metal::simdgroup_bfloat8x8;
using metal::simdgroup_float8x8;
using metal::simdgroup_half8x8;
