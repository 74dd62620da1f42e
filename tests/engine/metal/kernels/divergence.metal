// Barriers and simdgroup functions that not all threads reach, and a loop that never ends.
#include <metal_stdlib>
using namespace metal;

#ifdef FIXED
#define PLANT(faulty, fixed) fixed
#else
#define PLANT(faulty, fixed) faulty
#endif

kernel void conditional_barrier(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                                uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];
    if (PLANT(t < 32, true)) {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // expect: barrier-divergence
    }
    out[i] = tile[t];
}

kernel void two_barriers(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                         threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                         uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];
    if (PLANT(t < 32, true)) {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // expect: barrier-divergence
        out[i] = tile[t];
    } else {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // expect: barrier-divergence
        out[i] = -tile[t];
    }
}

kernel void return_before_barrier(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                  threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                                  uint t [[thread_index_in_threadgroup]]) {
    PLANT(if (t >= 60) return;, )
    tile[t] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);  // expect: barrier-divergence
    out[i] = tile[min(63 - t + 0, 59u)];
}

kernel void shuffle_from_a_lane_that_left(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                          uint i [[thread_position_in_grid]],
                                          uint lane [[thread_index_in_simdgroup]]) {
    PLANT(if (lane >= 16) return;, )
    out[i] = simd_shuffle(in[i], ushort(31 - lane));  // expect: simdgroup-divergence
}

kernel void shuffle_from_a_lane_elsewhere(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                          uint i [[thread_position_in_grid]],
                                          uint lane [[thread_index_in_simdgroup]]) {
    float value = in[i];
    if (PLANT(lane < 16, true)) {
        value = simd_shuffle_xor(value, ushort(16));  // expect: simdgroup-divergence
    }
    out[i] = value;
}

kernel void simdgroup_barrier_for_half(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                       uint i [[thread_position_in_grid]],
                                       uint lane [[thread_index_in_simdgroup]]) {
    if (PLANT(lane < 16, true)) {
        simdgroup_barrier(mem_flags::mem_threadgroup);  // expect: simdgroup-divergence
    }
    out[i] = in[i];
}

// simd_sum is over the active lanes (MSL specification, SIMD-group functions), so lanes that have left are no fault.
kernel void sum_of_active_lanes(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
    if (lane >= 16) return;
    out[i] = simd_sum(in[i]);
}

kernel void endless_loop(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                         device uint* counter [[buffer(5)]], uint i [[thread_position_in_grid]]) {
    volatile device uint* flag = counter;
    while (PLANT(flag[0] == 0, false)) {  // expect: timeout
    }
    out[i] = in[i];
}

// Two branches, each with a sum over the lanes in it: defined, as is one after half of the lanes have ended.
kernel void sums_in_branches(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                             uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
    float sum = lane < 8 ? simd_sum(in[i]) : -simd_sum(in[i]);
    if (lane % 2) {
        out[i] = sum;
        return;
    }
    out[i] = simd_max(sum) + simd_prefix_exclusive_sum(in[i]);
}

kernel void broadcast_from_a_lane_that_returned(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                                uint i [[thread_position_in_grid]],
                                                uint lane [[thread_index_in_simdgroup]]) {
    out[i] = 0;
    PLANT(if (lane == 5) return;, )
    out[i] = simd_broadcast(in[i], ushort(5));  // expect: simdgroup-divergence
}

// A loop whose turns differ by thread: some wait at its barrier while others are behind the loop.
kernel void barrier_in_an_uneven_loop(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                      threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                                      uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];
    for (uint k = 0; k < PLANT(1 + t / 32, 2); k++) {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // expect: barrier-divergence
    }
    out[i] = tile[t];
}

kernel void matrix_load_by_half(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                uint simdgroup [[simdgroup_index_in_threadgroup]],
                                uint lane [[thread_index_in_simdgroup]], uint group [[threadgroup_position_in_grid]]) {
    if (simdgroup == 1) return;
    simdgroup_float8x8 m(0);
    if (PLANT(lane < 16, true)) simdgroup_load(m, in, 8);  // expect: simdgroup-divergence
    simdgroup_store(m, out + 64 * group, 8);
}

kernel void matrix_product_in_an_uneven_loop(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                             uint simdgroup [[simdgroup_index_in_threadgroup]],
                                             uint lane [[thread_index_in_simdgroup]],
                                             uint group [[threadgroup_position_in_grid]]) {
    if (simdgroup == 1) return;
    simdgroup_float8x8 m;
    simdgroup_load(m, in, 8);
    for (uint k = 0; k < PLANT(1 + lane % 2, 2); k++) {
        simdgroup_multiply_accumulate(m, m, m, m);  // expect: simdgroup-divergence
    }
    simdgroup_store(m, out + 64 * group, 8);
}

kernel void matrix_after_a_lane_returned(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                         uint simdgroup [[simdgroup_index_in_threadgroup]],
                                         uint lane [[thread_index_in_simdgroup]],
                                         uint group [[threadgroup_position_in_grid]]) {
    if (simdgroup == 1 || PLANT(lane == 31, false)) return;
    simdgroup_float8x8 m;
    simdgroup_load(m, in, 8);  // expect: simdgroup-divergence
    simdgroup_store(m, out + 64 * group, 8);
}

kernel void matrix_store_before_a_barrier(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                          threadgroup float* tile [[threadgroup(0)]],
                                          uint i [[thread_position_in_grid]],
                                          uint t [[thread_index_in_threadgroup]]) {
    simdgroup_float8x8 m;
    simdgroup_load(m, in, 8);
    if (t < PLANT(8, 32)) simdgroup_store(m, tile, 8);  // expect: simdgroup-divergence
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = tile[t];
}

// Clean in both forms: lanes that part and meet again do their matrix operations together, though not at one time.
kernel void matrix_among_diverged_lanes(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                        uint i [[thread_position_in_grid]],
                                        uint simdgroup [[simdgroup_index_in_threadgroup]],
                                        uint lane [[thread_index_in_simdgroup]],
                                        uint group [[threadgroup_position_in_grid]]) {
    if (simdgroup == 1) return;
    float sum = in[i];
    if (lane < 7) sum = simd_sum(sum);
    simdgroup_float8x8 m, step(0.5f);
    simdgroup_load(m, in, 8);
    if (lane > 20) sum += simd_max(sum);
    for (uint k = 0; k < 600; k++) simdgroup_multiply_accumulate(m, step, m, m);
    simdgroup_store(m, out + 64 * group, 8);
    if (lane > 3 && sum < 0) out[64 * group] = simd_min(sum);
}
