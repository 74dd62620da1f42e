// Vectors at addresses that are no multiple of their size. Each kernel has one planted fault; -DFIXED takes it out again.
#include <metal_stdlib>
using namespace metal;

#ifdef FIXED
#define PLANT(faulty, fixed) fixed
#else
#define PLANT(faulty, fixed) faulty
#endif

kernel void misaligned_float4(device const float* in [[buffer(0)]], device float4* out [[buffer(1)]],
                              uint i [[thread_position_in_grid]]) {
    if (i >= 16) return;
    device const float* from = in + PLANT(2, 4) * i;
    out[i] = *(device const float4*)from;  // expect: misaligned
}

kernel void misaligned_half4(device const half* in [[buffer(0)]], device float4* out [[buffer(1)]],
                             uint i [[thread_position_in_grid]]) {
    if (i >= 16) return;
    out[i] = float4(*(device const half4*)(in + 4 * i + PLANT(2, 0)));  // expect: misaligned
}

kernel void misaligned_store(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                             uint i [[thread_position_in_grid]]) {
    if (i >= 8) return;
    *(device float2*)(out + 2 * i + PLANT(1, 0)) = float2(in[i]);  // expect: misaligned
}

// float3 takes 16 bytes; rows of three floats are packed_float3.
kernel void float3_over_packed_rows(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                    uint i [[thread_position_in_grid]]) {
    if (i >= 16) return;
    float3 row = *(device const PLANT(float3, packed_float3)*)(in + 3 * i);  // expect: misaligned
    out[i] = row.x + row.y + row.z;
}

kernel void misaligned_in_threadgroup(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                      threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                                      uint t [[thread_index_in_threadgroup]]) {
    tile[t] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float4 row = *(threadgroup float4*)(tile + PLANT(1, 4) * (t % 8));  // expect: misaligned
    out[i] = row.x + row.w;
}

kernel void misaligned_float2(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                              uint i [[thread_position_in_grid]]) {
    if (i >= 8) return;
    float2 pair = *(device const float2*)(in + 2 * i + PLANT(1, 0));  // expect: misaligned
    out[i] = pair.x + pair.y;
}

kernel void misaligned_atomic(device float* out [[buffer(1)]], device uchar* bytes [[buffer(4)]],
                              uint i [[thread_position_in_grid]]) {
    out[i] = 0;
    if (i != 3) return;
    atomic_fetch_add_explicit((device atomic_uint*)(bytes + 4 * i + PLANT(2, 0)), 1u, memory_order_relaxed);  // expect: misaligned
}
