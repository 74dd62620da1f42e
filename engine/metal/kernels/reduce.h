// Sums and maxima over a threadgroup: simdgroup reductions, then one value a simdgroup through threadgroup memory.

#pragma once
#include <metal_stdlib>
#include <metal_simdgroup>

using namespace metal;

// `shared` has room for 32 floats, one for each simdgroup that a threadgroup can have. The leading barrier is what lets
// a second reduction use the same memory: all threads have read the first one's result by then. Every thread calls.
inline float threadgroup_sum(float value, threadgroup float * shared, ushort simdgroup, ushort lane, ushort simdgroups) {
    value = simd_sum(value);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0) {
        shared[simdgroup] = value;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return simd_sum(lane < simdgroups ? shared[lane] : 0.0f);
}

inline float threadgroup_max(float value, threadgroup float * shared, ushort simdgroup, ushort lane, ushort simdgroups) {
    value = simd_max(value);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0) {
        shared[simdgroup] = value;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return simd_max(shared[min(lane, ushort(simdgroups - 1))]);
}
