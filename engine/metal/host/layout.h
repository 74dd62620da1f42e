// Where a type has padding, for the checkers: a struct's copy loads it with the rest, though no store writes it.
//
// A struct is taken apart by structured bindings with a pack (C++26, in clang since 21, in older modes too); what can't be
// (unions, private members, bit fields, an older compiler) counts as all values.
#pragma once
#include "runtime.h"

namespace rt {

// Sets the bytes of `used` that hold the values of `object`, which lies in the memory that begins at `base`.
template <class T>
__attribute__((no_sanitize("thread", "alignment"))) bool mark_values(bool* used, size_t size, const char* base, const T& object) {
  size_t at = size_t(reinterpret_cast<const char*>(&object) - base), bytes = sizeof(T);
  if (at > size || bytes > size - at) return false;           // a bit field was copied
  if constexpr (__is_array(T)) {
    bool whole = true;
    for (const auto& element : object) whole &= mark_values(used, size, base, element);
    return whole;
  }
  if constexpr (requires { T::size_of_vec; }) bytes = T::size_of_vec * sizeof(typename T::element_type);
#if defined(__cpp_structured_bindings) && __cpp_structured_bindings >= 202411L && __has_builtin(__builtin_structured_binding_size)
  else if constexpr (__is_class(T) && requires { requires __builtin_structured_binding_size(T) > 0; }) {
    const auto& [... members] = object;
    return (mark_values(used, size, base, members) & ...);
  }
#endif
  for (size_t i = 0; i < bytes; i++) used[at + i] = true;
  return true;
}

template <class T> struct Element { using type = T; };
template <class T> struct Element<T[]> : Element<T> {};
template <class T, size_t N> struct Element<T[N]> : Element<T> {};

template <class T>
__attribute__((no_sanitize("thread", "alignment"))) Layout layout_of() {
  using E = __remove_cv(typename Element<T>::type);
  if constexpr (!__is_class(E)) {
    return {};
  } else {
    alignas(E) static char object[sizeof(E)];
    static bool used[sizeof(E)], padded, done;                // one host thread runs checked kernels
    if (!done) {
      bool known = mark_values(used, sizeof(E), object, reinterpret_cast<const E&>(object));
      for (bool value : used) padded |= known && !value;
      done = true;
    }
    return {padded ? used : nullptr, uint32_t(sizeof(E))};
  }
}

}  // namespace rt
