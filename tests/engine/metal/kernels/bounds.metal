// Accesses outside a buffer. Each kernel has one planted fault; -DFIXED takes it out again.
// "expect: KIND" marks the lines at which the checkers may report it.
#include <metal_stdlib>
using namespace metal;

#ifdef FIXED
#define PLANT(faulty, fixed) fixed
#else
#define PLANT(faulty, fixed) faulty
#endif

kernel void device_read_past_end(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                 constant uint& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    uint next = i + 1;
    PLANT(, if (next == n) next = 0;)
    out[i] = in[next];  // expect: out-of-bounds-read
}

kernel void device_read_before_begin(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                     constant uint& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    int last = int(i) - 1;
    PLANT(, if (last < 0) last = int(n) - 1;)
    out[i] = in[last];  // expect: out-of-bounds-read
}

kernel void device_write_past_end(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                  constant uint& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    PLANT(if (i > n) return;, if (i >= n) return;)
    out[i] = in[i % n];  // expect: out-of-bounds-write
}

kernel void device_write_before_begin(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                      constant uint& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    device float* shifted = out - PLANT(1, 0);
    shifted[i] = in[i];  // expect: out-of-bounds-write
}

kernel void vector_write_past_end(device const float* in [[buffer(0)]], device float4* out [[buffer(1)]],
                                  constant uint& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    PLANT(if (i > n / 4) return;, if (i >= n / 4) return;)
    out[i] = float4(in[i]);  // expect: out-of-bounds-write
}

kernel void constant_read_past_end(constant half* table [[buffer(3)]], device float* out [[buffer(1)]],
                                   uint i [[thread_position_in_grid]]) {
    out[i] = float(table[(i & 7) + PLANT(1, 0)]);  // expect: out-of-bounds-read
}

kernel void constant_read_before_begin(constant half* table [[buffer(3)]], device float* out [[buffer(1)]],
                                       uint i [[thread_position_in_grid]]) {
    out[i] = float(table[int(i & 7) - PLANT(1, 0)]);  // expect: out-of-bounds-read
}

kernel void threadgroup_read_past_end(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                      threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                                      uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = tile[PLANT(t + 1, (t + 1) % 64)];  // expect: out-of-bounds-read
}

kernel void threadgroup_write_past_end(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                       threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                                       uint t [[thread_index_in_threadgroup]]) {
    tile[t + PLANT(1, 0)] = in[i];  // expect: out-of-bounds-write
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = tile[max(t, 1u)];
}

kernel void threadgroup_read_before_begin(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                          threadgroup float* tile [[threadgroup(0)]],
                                          uint i [[thread_position_in_grid]],
                                          uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    int last = int(t) - 1;
    PLANT(, last = max(last, 0);)
    out[i] = tile[last];  // expect: out-of-bounds-read
}

kernel void threadgroup_write_before_begin(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                           threadgroup float* tile [[threadgroup(0)]],
                                           uint i [[thread_position_in_grid]],
                                           uint t [[thread_index_in_threadgroup]]) {
    threadgroup float* shifted = tile - PLANT(1, 0);
    shifted[t] = in[i];  // expect: out-of-bounds-write
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = tile[min(t, 62u)];
}

// Without gaps between allocations the last element would land in `second`.
kernel void overrun_into_neighbour(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                   uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
    threadgroup float first[63 + PLANT(0, 1)];
    threadgroup float second[64];
    second[t] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    first[t] = in[i];  // expect: out-of-bounds-write
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = first[min(t, 62u)] + second[t];
}

// A copy of 32 bytes, the last of which begins 16 bytes before the end.
struct Block {
    float values[8];
};
kernel void block_read_past_end(device const float* in [[buffer(0)]], device Block* out [[buffer(1)]],
                                uint i [[thread_position_in_grid]]) {
    if (i >= 16) return;
    device const Block& block = *(device const Block*)(in + i * 8 + PLANT(4, 0));
    out[i] = block;  // expect: out-of-bounds-read
}

kernel void far_pointer(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                        constant uint& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    ulong far = PLANT(ulong(n) << 36, 0);
    out[i] = in[i + far];  // expect: out-of-bounds-read
}

kernel void null_pointer(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                         constant uint& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    device const float* from = PLANT((device const float*)(ulong(n) - 128), in);
    out[i] = from[i & 3];  // expect: crash
}

// The last vector begins inside and ends outside: out has 126 elements.
kernel void vector_over_the_end(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                constant uint& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    if (i >= PLANT((n + 3) / 4, n / 4)) return;
    *(device float4*)(out + 4 * i) = *(device const float4*)(in + 4 * i);  // expect: out-of-bounds-write
}

kernel void vector_read_over_the_end(device const float* out [[buffer(1)]], device float* to [[buffer(4)]],
                                     constant uint& n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    if (i >= PLANT((n + 3) / 4, n / 4)) return;
    float4 v = *(device const float4*)(out + 4 * i);  // expect: out-of-bounds-read
    to[i] = v.x + v.y + v.z + v.w;
}

kernel void atomic_past_end(device atomic_uint* counts [[buffer(5)]], device float* out [[buffer(1)]],
                            uint i [[thread_position_in_grid]]) {
    out[i] = 0;
    if (i == 70) atomic_fetch_add_explicit(counts + PLANT(1, 0), 1u, memory_order_relaxed);  // expect: out-of-bounds-write
}

kernel void threadgroup_atomic_past_end(device float* out [[buffer(1)]], uint i [[thread_position_in_grid]],
                                        uint t [[thread_index_in_threadgroup]]) {
    threadgroup atomic_uint bins[8];
    if (t < 8) atomic_store_explicit(bins + t, 0u, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_add_explicit(bins + (i == 70 ? PLANT(8, 7) : 0), 1u, memory_order_relaxed);  // expect: out-of-bounds-write
    out[i] = 0;
}

kernel void declared_array_past_end(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                    uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]) {
    threadgroup float staged[64];
    staged[t] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = staged[t + (i == 70 ? PLANT(58, 57) : 0)];  // expect: out-of-bounds-read
}

kernel void threadgroup_far_past_end(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                     threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                                     uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = tile[i == 70 ? PLANT(1u << 22, 0) : t];  // expect: out-of-bounds-read
}

kernel void threadgroup_far_write(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                  threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                                  uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (i == 70) tile[PLANT(3000, 6)] = 1;  // expect: out-of-bounds-write
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = tile[t];
}

kernel void unsigned_underflow(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                               uint i [[thread_position_in_grid]]) {
    uint before = i - PLANT(1, 0);
    out[i] = in[before];  // expect: out-of-bounds-read
}

kernel void constant_far_past_end(constant half* table [[buffer(3)]], device float* out [[buffer(1)]],
                                  uint i [[thread_position_in_grid]]) {
    out[i] = float(table[i == 70 ? PLANT(1u << 24, 0) : 1]);  // expect: out-of-bounds-read
}

// The optimiser makes one load of the two, which then has no line of its own.
kernel void load_in_one_branch(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                               uint i [[thread_position_in_grid]]) {
    float value;
    if (i < 127) {
        value = in[i];  // expect: out-of-bounds-read
    } else {
        value = in[i + PLANT(1, 0)];  // expect: out-of-bounds-read
    }
    out[i] = value;
}


// Clean in both forms: an index may wrap around on its way, as long as the address is inside.
kernel void index_that_wraps_back(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                  uint i [[thread_position_in_grid]]) {
    uint under = i - 100;
    int over = int(i + 0x7fffffffu) - 0x7fffffff;
    out[i] = in[under + 100] + in[over];
}
