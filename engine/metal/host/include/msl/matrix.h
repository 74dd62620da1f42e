// matrix<T, Columns, Rows> (float4x4, half2x3 …): an array of columns, indexed [column][row].
#pragma once

#include "geometric.h"

namespace metal {

template <class T, int Columns, int Rows>
struct matrix {
  vec<T, Rows> columns[Columns];

  matrix() = default;
  // A scalar fills the diagonal.
  template <class S, enable_if_t<is_arithmetic_v<S>, int> = 0>
  constexpr explicit matrix(S diagonal) {
    for (int c = 0; c < Columns; ++c)
      for (int r = 0; r < Rows; ++r) columns[c].e[r] = c == r ? static_cast<T>(diagonal) : T(0);
  }
  template <class U, enable_if_t<!is_same_v<T, U>, int> = 0>
  constexpr explicit matrix(const matrix<U, Columns, Rows>& other) {
    for (int c = 0; c < Columns; ++c) columns[c] = vec<T, Rows>(other.columns[c]);
  }
  // Columns, or all elements one column after the other.
  template <class... A, enable_if_t<detail::fills<Columns * Rows, A...>, int> = 0>
  constexpr matrix(const A&... parts) {
    int next = 0;
    const auto append = [&](const auto& part) {
      constexpr int width = detail::width<__remove_cvref(decltype(part))>;
      for (int i = 0; i < width; ++i, ++next)
        columns[next / Rows].e[next % Rows] = static_cast<T>(detail::component(part, i));
    };
    (append(parts), ...);
  }
  constexpr vec<T, Rows>& operator[](size_t column) { return columns[column]; }
  constexpr const vec<T, Rows>& operator[](size_t column) const { return columns[column]; }
};

#define MSL_MATRIX_BINARY(op)                                                                   \
  template <class T, int C, int R>                                                              \
  constexpr matrix<T, C, R> operator op(const matrix<T, C, R>& a, const matrix<T, C, R>& b) {   \
    matrix<T, C, R> result;                                                                     \
    for (int c = 0; c < C; ++c) result.columns[c] = a.columns[c] op b.columns[c];               \
    return result;                                                                              \
  }                                                                                             \
  template <class T, int C, int R>                                                              \
  constexpr matrix<T, C, R>& operator op##=(matrix<T, C, R>& a, const matrix<T, C, R>& b) {     \
    return a = a op b;                                                                          \
  }
MSL_MATRIX_BINARY(+)
MSL_MATRIX_BINARY(-)
#undef MSL_MATRIX_BINARY

template <class T, int C, int R>
constexpr matrix<T, C, R> operator-(const matrix<T, C, R>& a) {
  matrix<T, C, R> result;
  for (int c = 0; c < C; ++c) result.columns[c] = -a.columns[c];
  return result;
}
template <class T, int C, int R, class S, enable_if_t<is_arithmetic_v<S>, int> = 0>
constexpr matrix<T, C, R> operator*(const matrix<T, C, R>& a, S scale) {
  matrix<T, C, R> result;
  for (int c = 0; c < C; ++c) result.columns[c] = a.columns[c] * scale;
  return result;
}
template <class T, int C, int R, class S, enable_if_t<is_arithmetic_v<S>, int> = 0>
constexpr matrix<T, C, R> operator*(S scale, const matrix<T, C, R>& a) { return a * scale; }

// A column vector to the right: the sum of the columns, first to last.
template <class T, int C, int R>
constexpr vec<T, R> operator*(const matrix<T, C, R>& a, const vec<T, C>& v) {
  vec<T, R> result = a.columns[0] * v.e[0];
  for (int c = 1; c < C; ++c) result += a.columns[c] * v.e[c];
  return result;
}
// A row vector to the left.
template <class T, int C, int R>
constexpr vec<T, C> operator*(const vec<T, R>& v, const matrix<T, C, R>& a) {
  vec<T, C> result;
  for (int c = 0; c < C; ++c) result.e[c] = dot(v, a.columns[c]);
  return result;
}
template <class T, int K, int R, int C>
constexpr matrix<T, C, R> operator*(const matrix<T, K, R>& a, const matrix<T, C, K>& b) {
  matrix<T, C, R> result;
  for (int c = 0; c < C; ++c) result.columns[c] = a * b.columns[c];
  return result;
}
template <class T, int C, int R, class B>
constexpr matrix<T, C, R>& operator*=(matrix<T, C, R>& a, const B& b) { return a = a * b; }

template <class T, int C, int R>
constexpr bool operator==(const matrix<T, C, R>& a, const matrix<T, C, R>& b) {
  bool same = true;
  for (int c = 0; c < C; ++c) same = same && all(a.columns[c] == b.columns[c]);
  return same;
}

template <class T, int C, int R>
constexpr matrix<T, R, C> transpose(const matrix<T, C, R>& a) {
  matrix<T, R, C> result;
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) result.columns[r].e[c] = a.columns[c].e[r];
  return result;
}

template <class T>
constexpr T determinant(const matrix<T, 2, 2>& a) {
  return static_cast<T>(a[0].e[0] * a[1].e[1] - a[1].e[0] * a[0].e[1]);
}
template <class T>
constexpr T determinant(const matrix<T, 3, 3>& a) { return dot(a[0], cross(a[1], a[2])); }
// Expansion along the first row.
template <class T>
constexpr T determinant(const matrix<T, 4, 4>& a) {
  T sum = T(0);
  for (int skipped = 0; skipped < 4; ++skipped) {
    matrix<T, 3, 3> minor;
    for (int c = 0, to = 0; c < 4; ++c)
      if (c != skipped) minor[to++] = a[c].yzw;
    const T term = static_cast<T>(a[skipped].e[0] * determinant(minor));
    sum = static_cast<T>(skipped % 2 == 0 ? sum + term : sum - term);
  }
  return sum;
}

}  // namespace metal

#define MSL_MATRIX_NAME(T, C, R)                       \
  namespace metal { using T##C##x##R = matrix<T, C, R>; } \
  using metal::T##C##x##R;
#define MSL_MATRIX_NAMES(T)                                                                   \
  MSL_MATRIX_NAME(T, 2, 2) MSL_MATRIX_NAME(T, 2, 3) MSL_MATRIX_NAME(T, 2, 4)                  \
  MSL_MATRIX_NAME(T, 3, 2) MSL_MATRIX_NAME(T, 3, 3) MSL_MATRIX_NAME(T, 3, 4)                  \
  MSL_MATRIX_NAME(T, 4, 2) MSL_MATRIX_NAME(T, 4, 3) MSL_MATRIX_NAME(T, 4, 4)
MSL_MATRIX_NAMES(float)
MSL_MATRIX_NAMES(half)
#undef MSL_MATRIX_NAMES
#undef MSL_MATRIX_NAME
