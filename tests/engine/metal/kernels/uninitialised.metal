// Reads of bytes that nobody has written. Each kernel has one planted fault; -DFIXED takes it out again.
#include <metal_stdlib>
using namespace metal;

#ifdef FIXED
#define PLANT(faulty, fixed) fixed
#else
#define PLANT(faulty, fixed) faulty
#endif

// Stages every second element only.
kernel void half_staged_tile(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                             threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                             uint t [[thread_index_in_threadgroup]]) {
    if (PLANT(t % 2 == 0, true)) tile[t] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = tile[t];  // expect: uninitialised-read
}

kernel void variable_never_written(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                   uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
    threadgroup float sums[2];
    if (t < PLANT(1, 2)) sums[t] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = sums[t % 2];  // expect: uninitialised-read
}

// `out` is named in outputs=: what the caller left in it means nothing.
kernel void output_read_modify_write(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                     uint i [[thread_position_in_grid]]) {
    PLANT(, out[i] = 0;)
    out[i] += in[i];  // expect: uninitialised-read
}

// Two of the four bytes are written.
kernel void half_of_a_float(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                            threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                            uint t [[thread_index_in_threadgroup]]) {
    threadgroup half* halves = (threadgroup half*)tile;
    halves[2 * t] = half(in[i]);
    PLANT(, halves[2 * t + 1] = half(in[i]);)
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = tile[t];  // expect: uninitialised-read
}

// Threadgroup memory does not outlive its threadgroup.
kernel void left_by_another_threadgroup(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                        threadgroup float* tile [[threadgroup(0)]],
                                        uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]],
                                        uint group [[threadgroup_position_in_grid]]) {
    if (PLANT(group == 0, true)) tile[t] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = tile[t];  // expect: uninitialised-read
}

kernel void counter_never_cleared(device float* out [[buffer(1)]], uint i [[thread_position_in_grid]],
                                  uint t [[thread_index_in_threadgroup]]) {
    threadgroup atomic_uint count;
    PLANT(, if (t == 0) atomic_store_explicit(&count, 0u, memory_order_relaxed);)
    PLANT(, threadgroup_barrier(mem_flags::mem_threadgroup);)
    atomic_fetch_add_explicit(&count, 1u, memory_order_relaxed);  // expect: uninitialised-read
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = float(atomic_load_explicit(&count, memory_order_relaxed));
}

// One row of the tile is missed: rows 0 to 6 of 8 are staged. The read is through simdgroup_load.
kernel void row_not_staged(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                           threadgroup float* tile [[threadgroup(0)]], uint t [[thread_index_in_threadgroup]]) {
    if (t < PLANT(56, 64)) tile[t] = in[t];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_float8x8 rows;
    if (t < 32) {
        simdgroup_load(rows, tile, 8);  // expect: uninitialised-read
        simdgroup_store(rows, out, 8);
    }
}

// A struct's padding, which nobody writes, may be carried along by a copy: not a fault.
struct Tagged {
    float values[5];
    uchar tag;
};
kernel void padding_is_copied(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                              uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
    threadgroup Tagged tagged[64];
    threadgroup Tagged copied[64];
    for (uint k = 0; k < 5; k++) tagged[t].values[k] = in[i] + k;
    tagged[t].tag = uchar(t);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    copied[t] = tagged[63 - t];
    out[i] = copied[t].values[3] + copied[t].tag;
}

// A struct of which one member is never written: copied as a whole it is no fault, until that member is used.
struct Pair {
    float first[4];
    float second;
};
kernel void missing_member_is_used(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                   uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
    threadgroup Pair pairs[64];
    threadgroup Pair copies[64];
    for (uint k = 0; k < 4; k++) pairs[t].first[k] = in[i];
    PLANT(, pairs[t].second = 1;)
    threadgroup_barrier(mem_flags::mem_threadgroup);
    copies[t] = pairs[63 - t];
    out[i] = copies[t].first[2] + copies[t].second;  // expect: uninitialised-read
}

kernel void missing_member_is_copied(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                     uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
    threadgroup Pair pairs[64];
    threadgroup Pair copies[64];
    for (uint k = 0; k < 4; k++) pairs[t].first[k] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    copies[t] = pairs[63 - t];
    out[i] = copies[t].first[2];
}

// A maximum kept by atomics, in memory that nobody has set to the least value.
kernel void maximum_never_cleared(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                  uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
    threadgroup atomic_uint most;
    PLANT(, if (t == 0) atomic_store_explicit(&most, 0u, memory_order_relaxed);)
    PLANT(, threadgroup_barrier(mem_flags::mem_threadgroup);)
    atomic_fetch_max_explicit(&most, uint(in[i]), memory_order_relaxed);  // expect: uninitialised-read
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = float(atomic_load_explicit(&most, memory_order_relaxed));
}

// Every second element of `out`, which is named in outputs=, stays as it was: NaNs for the caller to see, no fault.
kernel void output_partly_written(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                  uint i [[thread_position_in_grid]]) {
    if (i % 2 == 0) out[i] = in[i];
}

// Structs with padding, which is copied with the rest: declared, nested, and behind a pointer to a template's.
template <typename T>
struct Best {
    T value;
    ushort index;
};
kernel void padding_between_members(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                    threadgroup Best<float>* argument [[threadgroup(0)]],
                                    uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
    struct Nest {
        char a;
        Best<half> best;
        Best<float> two[2];
    };
    threadgroup Best<float> best[64];
    threadgroup Nest nests[8], copies[8];
    best[t] = {in[i], ushort(t)};
    if (t < 32) argument[t] = {in[i], ushort(t)};
    if (t < 8) {
        nests[t].a = 1;
        nests[t].best = {half(in[i]), 2};
        for (uint k = 0; k < 2; k++) nests[t].two[k] = {in[i], ushort(k)};
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint k = 32; k > 0; k /= 2) {
        if (t < k && best[t + k].value > best[t].value) best[t] = best[t + k];
        if (t < min(k, 16u)) argument[t] = argument[t + min(k, 16u)];
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (t < 8) copies[t] = nests[7 - t];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    Best<float> most = best[0];
    out[i] = most.value + most.index + argument[0].index + copies[t % 8].two[1].value + float(copies[t % 8].best.value);
}

kernel void member_beside_padding(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                  uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
    threadgroup Best<float> best[64], copies[64];
    best[t].index = ushort(t);
    if (PLANT(t != 5, true)) best[t].value = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    copies[t] = best[t ^ 1];  // expect: uninitialised-read
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = copies[t].value;
}
