// metal_atomic: atomic<T> over the compiler's atomic builtins. Every memory order is at least what was asked for.
//
// Only compare-exchange is used for what the hardware of the host lacks (floating-point sums, minima, maxima), so
// that checked builds see it.
#pragma once

#include "barrier.h"
#include "traits.h"

namespace metal {

enum memory_order {
  memory_order_relaxed, memory_order_acquire, memory_order_release, memory_order_acq_rel, memory_order_seq_cst
};

template <class T>
struct atomic {
  static_assert(__is_trivially_copyable(T) && sizeof(T) <= 8, "MSL has atomics of up to 64 bits");
  T value;
};
using atomic_bool = atomic<bool>;
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_long = atomic<long>;
using atomic_ulong = atomic<ulong>;
using atomic_float = atomic<float>;

namespace detail {

constexpr int strongest = __ATOMIC_SEQ_CST;

// Replaces the value by f(value) and returns what it was.
template <class T, class F>
METAL_FUNC T atomic_update(volatile atomic<T>* object, F f) {
  T old, next;
  __atomic_load(&object->value, &old, strongest);
  do {
    next = f(old);
  } while (!__atomic_compare_exchange(&object->value, &old, &next, true, strongest, strongest));
  return old;
}

}  // namespace detail

template <class T>
METAL_FUNC T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  T result;
  __atomic_load(&object->value, &result, detail::strongest);
  return result;
}
template <class T>
METAL_FUNC void atomic_store_explicit(volatile atomic<T>* object, detail::identity_t<T> value, memory_order) {
  __atomic_store(&object->value, &value, detail::strongest);
}
template <class T>
METAL_FUNC T atomic_exchange_explicit(volatile atomic<T>* object, detail::identity_t<T> value, memory_order) {
  T old;
  __atomic_exchange(&object->value, &value, &old, detail::strongest);
  return old;
}
// Compares bits, and fails only on a difference.
template <class T>
METAL_FUNC bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* object, T* expected,
                                                      detail::identity_t<T> desired, memory_order, memory_order) {
  return __atomic_compare_exchange(&object->value, expected, &desired, false, detail::strongest, detail::strongest);
}

#define MSL_ATOMIC_FETCH(name, builtin, expression)                                                             \
  template <class T>                                                                                            \
  METAL_FUNC T atomic_fetch_##name##_explicit(volatile atomic<T>* object, detail::identity_t<T> value, memory_order) { \
    if constexpr (__is_integral(T)) return builtin(&object->value, value, detail::strongest);                   \
    else return detail::atomic_update(object, [value](T old) { return expression; });                           \
  }
MSL_ATOMIC_FETCH(add, __atomic_fetch_add, old + value)
MSL_ATOMIC_FETCH(sub, __atomic_fetch_sub, old - value)
#undef MSL_ATOMIC_FETCH

#define MSL_ATOMIC_BITS(name)                                                                                   \
  template <class T>                                                                                            \
  METAL_FUNC T atomic_fetch_##name##_explicit(volatile atomic<T>* object, detail::identity_t<T> value, memory_order) { \
    return __atomic_fetch_##name(&object->value, value, detail::strongest);                                     \
  }
MSL_ATOMIC_BITS(and)
MSL_ATOMIC_BITS(or)
MSL_ATOMIC_BITS(xor)
#undef MSL_ATOMIC_BITS

// Without a result (ulong on Apple GPUs) and with it.
#define MSL_ATOMIC_EXTREME(name, test)                                                                          \
  template <class T>                                                                                            \
  METAL_FUNC T atomic_fetch_##name##_explicit(volatile atomic<T>* object, detail::identity_t<T> value, memory_order) { \
    return detail::atomic_update(object, [value](T old) { return test ? value : old; });                        \
  }                                                                                                             \
  template <class T>                                                                                            \
  METAL_FUNC void atomic_##name##_explicit(volatile atomic<T>* object, detail::identity_t<T> value, memory_order) { \
    detail::atomic_update(object, [value](T old) { return test ? value : old; });                               \
  }
MSL_ATOMIC_EXTREME(min, value < old)
MSL_ATOMIC_EXTREME(max, old < value)
#undef MSL_ATOMIC_EXTREME

METAL_FUNC void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {
  __atomic_thread_fence(detail::strongest);
}

}  // namespace metal

using metal::atomic_bool;
using metal::atomic_float;
using metal::atomic_int;
using metal::atomic_uint;
using metal::atomic_ulong;
