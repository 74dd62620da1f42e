// Included after the user's source: makes a Kernel of `&f<…>`. C++ knows the parameters' types, the parser their attributes.
// compiler.py's registration of each kernel asked for is an Entry and a Registration.
#pragma once
#include "layout.h"
#include "runtime.h"

namespace rt {

template <class T> struct Bare { using type = T; };
template <class T> struct Bare<const T> { using type = T; };
template <class T> struct Bare<volatile T> { using type = T; };
template <class T> struct Bare<const volatile T> { using type = T; };

template <class T> struct IsConst { static constexpr bool value = false; };
template <class T> struct IsConst<const T> { static constexpr bool value = true; };
template <class T> struct IsConst<const volatile T> { static constexpr bool value = true; };

template <class T> struct SizeOf { static constexpr uint32_t size = sizeof(T), align = alignof(T); };
template <> struct SizeOf<void> { static constexpr uint32_t size = 1, align = 1; };

// The numbers of a buffer that holds nothing else. Bytes and structs are raw: any array has those.
template <class T> struct ElementOf { static constexpr char kind = 'r'; static constexpr uint8_t size = 1; };
template <> struct ElementOf<float> { static constexpr char kind = 'f'; static constexpr uint8_t size = 4; };
template <> struct ElementOf<_Float16> { static constexpr char kind = 'f'; static constexpr uint8_t size = 2; };
template <> struct ElementOf<metal::bfloat> { static constexpr char kind = 'b'; static constexpr uint8_t size = 2; };
template <class T> requires(__is_integral(T) && sizeof(T) > 1)
struct ElementOf<T> { static constexpr char kind = 'i'; static constexpr uint8_t size = sizeof(T); };
template <class T, int N> struct ElementOf<metal::vec<T, N>> : ElementOf<T> {};
template <class T, int N> struct ElementOf<metal::packed_vec<T, N>> : ElementOf<T> {};
template <class T> struct ElementOf<metal::atomic<T>> : ElementOf<T> {};
template <class T, size_t N> struct ElementOf<T[N]> : ElementOf<T> {};
template <class T, size_t N> struct ElementOf<const T[N]> : ElementOf<T> {};
template <class T>
constexpr ParameterInfo points_to(bool is_const, bool pointer) {
  return {SizeOf<T>::size, SizeOf<T>::align, is_const, pointer, !pointer, ElementOf<T>::kind, ElementOf<T>::size, checked_layout<T>};
}

// How parameter type P is filled from an address or a builtin value.
template <class P>
struct Passing {
  using T = typename Bare<P>::type;
  static constexpr ParameterInfo info = {SizeOf<T>::size, SizeOf<T>::align, IsConst<P>::value, false, false, 'r', 1, nullptr};
  template <class E> static RT_INLINE void set(E& element, uint32_t value) { element = static_cast<E>(value); }
  static RT_INLINE T builtin(Vec3 value) {
    if constexpr (__is_integral(T)) {
      return static_cast<T>(value.x);
    } else {
      T result{};
      constexpr unsigned elements = sizeof(T) / sizeof(result[0]);   // 4 for a vector of three
      set(result[0], value.x);
      set(result[1], value.y);
      if constexpr (elements > 2) set(result[2], value.z);
      return result;
    }
  }
  static RT_INLINE T pass(Parameter parameter, void*, const Thread& thread) {
    return builtin(builtin_value(parameter.builtin, thread));
  }
};
template <class T>
struct Passing<T*> {
  using B = typename Bare<T>::type;
  static constexpr ParameterInfo info = points_to<B>(IsConst<T>::value, true);
  static RT_INLINE T* pass(Parameter, void* address, const Thread&) { return static_cast<T*>(address); }
};
template <class T> struct Passing<T* const> : Passing<T*> {};
template <class T>
struct Passing<T&> {
  using B = typename Bare<T>::type;
  static constexpr ParameterInfo info = points_to<B>(IsConst<T>::value, false);
  static RT_INLINE T& pass(Parameter, void* address, const Thread&) { return *static_cast<T*>(address); }
};

template <auto F, auto& Parameters> struct Entry;
template <class... P, void (*F)(P...), auto& Parameters>
struct Entry<F, Parameters> {
  static_assert(sizeof...(P) == Parameters.count, "the parser and the compiler disagree about the number of parameters");
  static constexpr ParameterInfo infos[sizeof...(P) + 1] = {Passing<P>::info..., {}};
  template <unsigned... I> struct Indices {};
  template <unsigned N, unsigned... I> struct Make : Make<N - 1, N - 1, I...> {};
  template <unsigned... I> struct Make<0, I...> { using type = Indices<I...>; };
  template <unsigned... I>
  static RT_INLINE void spread(void* const* addresses, const Thread& thread, Indices<I...>) {
    F(Passing<P>::pass(Parameters.at[I], addresses[I], thread)...);
  }
  static void invoke(void* const* addresses, const Thread& thread) {
    spread(addresses, thread, typename Make<sizeof...(P)>::type{});
  }
};

template <unsigned N>
struct Parameters {
  static constexpr unsigned count = N;
  Parameter at[N + 1];
};

struct Registration {
  explicit Registration(const Kernel& kernel) { register_kernel(kernel); }
};

}  // namespace rt
