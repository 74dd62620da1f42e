// Accesses that nothing orders. Each kernel has one planted fault; -DFIXED takes it out again.
#include <metal_stdlib>
using namespace metal;

#ifdef FIXED
#define PLANT(faulty, fixed) fixed
#else
#define PLANT(faulty, fixed) faulty
#endif

kernel void no_barrier_before_use(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                  threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                                  uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];  // expect: race
    PLANT(, threadgroup_barrier(mem_flags::mem_threadgroup);)
    out[i] = tile[t ^ 32];  // expect: race
}

kernel void no_barrier_before_reuse(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                    threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                                    uint t [[thread_index_in_threadgroup]]) {
    float sum = 0;
    for (uint round = 0; round < 4; round++) {
        tile[t] = in[i] + round;  // expect: race
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sum += tile[63 - t];  // expect: race
        PLANT(, threadgroup_barrier(mem_flags::mem_threadgroup);)
    }
    out[i] = sum;
}

kernel void mem_none_is_no_fence(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                 threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                                 uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];  // expect: race
    threadgroup_barrier(PLANT(mem_flags::mem_none, mem_flags::mem_threadgroup));
    out[i] = tile[63 - t];  // expect: race
}

kernel void fence_of_the_other_memory(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                      threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                                      uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];  // expect: race
    threadgroup_barrier(PLANT(mem_flags::mem_device, mem_flags::mem_device | mem_flags::mem_threadgroup));
    out[i] = tile[63 - t];  // expect: race
}

kernel void device_memory_not_fenced(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                     device float* scratch [[buffer(4)]], uint i [[thread_position_in_grid]],
                                     uint t [[thread_index_in_threadgroup]]) {
    scratch[i] = in[i];  // expect: race
    threadgroup_barrier(PLANT(mem_flags::mem_threadgroup, mem_flags::mem_device));
    out[i] = scratch[i - t + 63 - t];  // expect: race
}

kernel void simdgroup_barrier_between_simdgroups(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                                 threadgroup float* tile [[threadgroup(0)]],
                                                 uint i [[thread_position_in_grid]],
                                                 uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];  // expect: race
    PLANT(simdgroup_barrier, threadgroup_barrier)(mem_flags::mem_threadgroup);
    out[i] = tile[63 - t];  // expect: race
}

// Lanes run in lockstep on some GPUs; nothing promises it.
kernel void lanes_without_barrier(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                  threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                                  uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];  // expect: race
    PLANT(, simdgroup_barrier(mem_flags::mem_threadgroup);)
    out[i] = tile[t ^ 1];  // expect: race
}

// A tree reduction whose last steps stay in one simdgroup.
kernel void reduction_without_lane_barriers(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                            threadgroup float* tile [[threadgroup(0)]],
                                            uint i [[thread_position_in_grid]],
                                            uint t [[thread_index_in_threadgroup]],
                                            uint group [[threadgroup_position_in_grid]]) {
    tile[t] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (t < 32) {
        for (uint step = 32; step > 0; step /= 2) {
            float other = t < step ? tile[t + step] : 0;  // expect: race
            PLANT(, simdgroup_barrier(mem_flags::mem_threadgroup);)
            if (t < step) tile[t] += other;  // expect: race
            PLANT(, simdgroup_barrier(mem_flags::mem_threadgroup);)
        }
    }
    if (t == 0) out[group] = tile[0];
}

kernel void all_threads_write_one_place(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                        uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]],
                                        uint group [[threadgroup_position_in_grid]]) {
    if (PLANT(true, t == 0)) out[group] = in[i];  // expect: race
}

kernel void threadgroups_write_one_place(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                         uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]],
                                         uint group [[threadgroup_position_in_grid]]) {
    if (t == 0) out[PLANT(0, group)] = in[i];  // expect: race
}

// Reads what another threadgroup may or may not have written yet.
kernel void threadgroups_are_not_ordered(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                         device float* scratch [[buffer(4)]], uint i [[thread_position_in_grid]],
                                         uint t [[thread_index_in_threadgroup]]) {
    scratch[i] = in[i];  // expect: race
    threadgroup_barrier(mem_flags::mem_device);
    out[i] = scratch[PLANT(i ^ 64, i - t + 63 - t)];  // expect: race
}

kernel void plain_counter(device float* out [[buffer(1)]], device uint* counter [[buffer(5)]],
                          uint i [[thread_position_in_grid]]) {
    PLANT(counter[0] += 1;, atomic_fetch_add_explicit((device atomic_uint*)counter, 1u, memory_order_relaxed);)  // expect: race
    out[i] = 0;
}

kernel void plain_read_beside_atomics(device float* out [[buffer(1)]], device atomic_uint* counter [[buffer(5)]],
                                      uint i [[thread_position_in_grid]]) {
    atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);  // expect: race
    out[i] = PLANT(float(((device uint*)counter)[0]), 0);  // expect: race
}

// The threadgroup that comes last adds up what all of them left: it needs a fence on both sides of the counter.
kernel void last_threadgroup_sums(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                  device float* scratch [[buffer(4)]], device atomic_uint* counter [[buffer(5)]],
                                  uint t [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]],
                                  uint groups [[threadgroups_per_grid]]) {
    if (t != 0) return;
    scratch[group] = in[group];
    PLANT(, atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);)
    uint before = atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed);
    PLANT(, atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);)
    if (before + 1 < groups) return;
    float sum = 0;
    for (uint i = 0; i < groups; i++) sum += scratch[i];  // expect: race
    out[0] = sum;
}

// One side atomic, one plain, in threadgroup memory.
kernel void plain_store_beside_atomics(device float* out [[buffer(1)]], uint i [[thread_position_in_grid]],
                                       uint t [[thread_index_in_threadgroup]]) {
    threadgroup atomic_uint count;
    if (t == 0) atomic_store_explicit(&count, 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);  // expect: race
    PLANT(if (t == 40) *(threadgroup uint*)&count = 3;, )  // expect: race
    out[i] = 0;
}

// Both fences have a barrier's worth of mistakes: staging goes through device memory, the flag names threadgroup memory.
kernel void staged_through_both(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                device float* scratch [[buffer(4)]], threadgroup float* tile [[threadgroup(0)]],
                                uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];
    scratch[i] = in[i];  // expect: race
    threadgroup_barrier(PLANT(mem_flags::mem_threadgroup, mem_flags::mem_threadgroup | mem_flags::mem_device));
    out[i] = tile[63 - t] + scratch[i - t + 63 - t];  // expect: race
}

kernel void two_values_from_two_threadgroups(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                             uint t [[thread_index_in_threadgroup]],
                                             uint group [[threadgroup_position_in_grid]]) {
    if (t == 9) out[7] = PLANT(float(group), 1);  // expect: race
}

// The thread that clears the counter counts, too, and comes first without a seed.
kernel void counter_cleared_without_barrier(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                            uint i [[thread_position_in_grid]],
                                            uint t [[thread_index_in_threadgroup]]) {
    threadgroup uint count;
    if (t == 0) count = 0;  // expect: race
    PLANT(, threadgroup_barrier(mem_flags::mem_threadgroup);)
    atomic_fetch_add_explicit((threadgroup atomic_uint*)&count, uint(in[i]), memory_order_relaxed);  // expect: race
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = count;
}

// Two stores that an optimiser would make one of, whose line would be neither's.
kernel void conditional_stores(device float* out [[buffer(1)]], uint i [[thread_position_in_grid]],
                               uint t [[thread_index_in_threadgroup]]) {
    threadgroup int flag;
    if (t == 0)
        flag = 0;  // expect: race
    PLANT(, threadgroup_barrier(mem_flags::mem_threadgroup);)
    if (t > 31)
        flag = 1;  // expect: race
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = flag;
}

// In some orders the reader comes first: an uninitialised read, and still a race.
kernel void one_lane_writes_another_reads(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                          uint i [[thread_position_in_grid]],
                                          uint lane [[thread_index_in_simdgroup]]) {
    threadgroup float values[2];
    uint simdgroup = i / 32 % 2;
    if (lane == 5) values[simdgroup] = in[i];  // expect: race
    PLANT(, simdgroup_barrier(mem_flags::mem_threadgroup);)
    if (lane == 6) out[i] = values[simdgroup];  // expect: race
}


// ---- clean in both forms -------------------------------------------------------------------------------------------

kernel void same_value_from_everyone(device float* out [[buffer(1)]], device uint* counter [[buffer(5)]],
                                     uint i [[thread_position_in_grid]]) {
    counter[0] = 7;
    out[i] = 0;
}

kernel void neighbouring_bytes(device const float* in [[buffer(0)]], device uchar* out [[buffer(1)]],
                               threadgroup uchar* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                               uint t [[thread_index_in_threadgroup]]) {
    tile[t] = uchar(in[i]);
    out[i] = tile[t];
}

kernel void atomic_minimum(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                           device atomic_uint* counter [[buffer(5)]], uint i [[thread_position_in_grid]]) {
    atomic_fetch_min_explicit(counter, uint(in[i]), memory_order_relaxed);
    atomic_fetch_or_explicit(counter, 0u, memory_order_relaxed);
    out[i] = 0;
}
