// metal_array and small class templates: array, uniform, pair, coherent, os_log.
#pragma once

#include "traits.h"

// A storage qualifier, and one with arguments: neither changes anything on the host.
#define coherent(...)

namespace metal {

template <class T, size_t N>
struct array {
  T elements[N > 0 ? N : 1];
  constexpr T& operator[](size_t i) { return elements[i]; }
  constexpr const T& operator[](size_t i) const { return elements[i]; }
  constexpr size_t size() const { return N; }
  constexpr bool empty() const { return N == 0; }
  constexpr T* data() { return elements; }
  constexpr const T* data() const { return elements; }
  constexpr T* begin() { return elements; }
  constexpr T* end() { return elements + N; }
  constexpr const T* begin() const { return elements; }
  constexpr const T* end() const { return elements + N; }
  constexpr T& front() { return elements[0]; }
  constexpr T& back() { return elements[N - 1]; }
  constexpr void fill(const T& value) {
    for (T& element : *this) element = value;
  }
};

// A promise that all threads hold the same value: here just the value.
template <class T>
struct uniform {
  T value;
  uniform() = default;
  template <class U, enable_if_t<is_convertible_v<U, T>, int> = 0>
  constexpr uniform(U value) : value(static_cast<T>(value)) {}
  constexpr operator T() const { return value; }
};
template <class T> constexpr uniform<T> make_uniform(T value) { return uniform<T>(value); }

template <class A, class B>
struct pair {
  using first_type = A;
  using second_type = B;
  A first;
  B second;
};
template <class A, class B> constexpr pair<A, B> make_pair(A a, B b) { return {a, b}; }

// Logging from a kernel is accepted and dropped.
struct os_log {
  constexpr os_log(const char*, const char*) {}
  template <class... A> constexpr void log(A&&...) const {}
  template <class... A> constexpr void log_debug(A&&...) const {}
  template <class... A> constexpr void log_info(A&&...) const {}
  template <class... A> constexpr void log_error(A&&...) const {}
  template <class... A> constexpr void log_fault(A&&...) const {}
};
inline constexpr os_log os_log_default("", "");

}  // namespace metal
