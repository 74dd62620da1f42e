// Simdgroup functions, matrices and atomics; each kernel writes what every lane got.
#include <metal_stdlib>
using namespace metal;

#define REDUCE(T)                                                                                                  \
  kernel void reduce_##T(device const T* in [[buffer(0)]], device T* out [[buffer(1)]],                            \
                         uint t [[thread_position_in_grid]]) {                                                     \
    const T x = in[t];                                                                                             \
    device T* to = out + t * 8;                                                                                    \
    to[0] = simd_sum(x), to[1] = simd_product(x), to[2] = simd_min(x), to[3] = simd_max(x);                        \
    to[4] = simd_prefix_inclusive_sum(x), to[5] = simd_prefix_exclusive_sum(x);                                    \
    to[6] = simd_prefix_inclusive_product(x), to[7] = quad_sum(x);                                                 \
  }
REDUCE(float) REDUCE(half) REDUCE(bfloat) REDUCE(int) REDUCE(ushort) REDUCE(long)

kernel void shuffle(device const int* in [[buffer(0)]], device int* out [[buffer(1)]], uint t [[thread_position_in_grid]]) {
  const int x = in[t];
  device int* to = out + t * 16;
  to[0] = simd_shuffle(x, 31 - t), to[1] = simd_shuffle_xor(x, 5), to[2] = simd_shuffle_up(x, 3), to[3] = simd_shuffle_down(x, 3);
  to[4] = simd_shuffle_rotate_up(x, 3), to[5] = simd_shuffle_rotate_down(x, 3);
  to[6] = simd_shuffle_and_fill_up(x, -x, 3), to[7] = simd_shuffle_and_fill_down(x, -x, 3, 8);
  to[8] = simd_broadcast(x, 7), to[9] = simd_broadcast_first(x);
  to[10] = int(ulong(simd_ballot(x % 3 == 0))), to[11] = simd_any(x == 5) + 2 * simd_all(x >= 0);
  to[12] = quad_shuffle_xor(x, 1), to[13] = quad_broadcast(x, 2), to[14] = simd_sum(int2(x, 1)).y, to[15] = simd_or(x) ^ simd_and(x);
}

// The lanes below 8 alone: the others' values must not count.
kernel void partial(device const int* in [[buffer(0)]], device int* out [[buffer(1)]], uint t [[thread_position_in_grid]]) {
  if (t >= 8 || t == 2) return;
  const int x = in[t];
  out[t * 4] = simd_sum(x), out[t * 4 + 1] = simd_max(-x), out[t * 4 + 2] = simd_prefix_exclusive_sum(x);
  out[t * 4 + 3] = int(ulong(simd_active_threads_mask()));
}

#define MULTIPLY(A, D)                                                                                              \
  kernel void multiply_##A##_##D(device const A* a [[buffer(0)]], device const A* b [[buffer(1)]],                 \
                                 device D* out [[buffer(2)]], device D* elements [[buffer(3)]],                    \
                                 uint lane [[thread_index_in_simdgroup]]) {                                        \
    simdgroup_matrix<A, 8, 8> ma, mb[2];                                                                            \
    simdgroup_matrix<D, 8, 8> c = make_filled_simdgroup_matrix<D, 8, 8>(D(0.5f)), spread;                           \
    simdgroup_load(ma, a, 16, ulong2(8, 1));                                                                        \
    simdgroup_load(mb[0], b, 8, 0, true);                                                                           \
    mb[1] = mb[0];                                                                                                  \
    simdgroup_multiply_accumulate(c, ma, mb[1], c);                                                                 \
    simdgroup_store(c, out, 8);                                                                                     \
    simdgroup_matrix<A, 8, 8> x = ma, y = mb[0];                                                                    \
    x.thread_elements(), y.thread_elements();                                                                       \
    simdgroup_multiply(spread, x, y);                                                                               \
    simdgroup_store(spread, out + 64, 8, ulong2(0, 0), true);                                                       \
    simdgroup_multiply(spread, x, mb[0]);                                                                           \
    elements[2 * lane] = c.thread_elements()[0], elements[2 * lane + 1] = c.thread_elements()[1];                   \
    c.thread_elements() *= D(2);                                                                                    \
    simdgroup_store(c, out + 128, 8);                                                                               \
    simdgroup_store(spread, out + 192, 8);                                                                          \
  }
MULTIPLY(float, float) MULTIPLY(half, float) MULTIPLY(half, half) MULTIPLY(bfloat, float)

kernel void atomics(device atomic_uint* counts [[buffer(0)]], device atomic_float* sums [[buffer(1)]], device atomic_int* extremes [[buffer(2)]],
                    uint t [[thread_position_in_grid]]) {
  atomic_fetch_add_explicit(&counts[0], 1, memory_order_relaxed);
  atomic_fetch_or_explicit(&counts[1], 1u << (t % 32), memory_order_relaxed);
  atomic_fetch_xor_explicit(&counts[2], t, memory_order_relaxed);
  atomic_fetch_sub_explicit(&counts[3], 2, memory_order_relaxed);
  uint seen = atomic_load_explicit(&counts[4], memory_order_relaxed);
  while (!atomic_compare_exchange_weak_explicit(&counts[4], &seen, seen + t, memory_order_relaxed, memory_order_relaxed)) {}
  atomic_fetch_add_explicit(&sums[0], 0.5f, memory_order_relaxed);
  atomic_fetch_max_explicit(&sums[1], float(t), memory_order_relaxed);
  atomic_fetch_min_explicit(&extremes[0], -int(t), memory_order_relaxed);
  atomic_fetch_max_explicit(&extremes[1], int(t), memory_order_relaxed);
}
