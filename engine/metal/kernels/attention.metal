// Attention of one query a sequence (decode): grouped heads, sinks, boolean mask, sliding window; online softmax.

#include <metal_stdlib>
#include <metal_simdgroup>

using namespace metal;

struct AttentionArgs {
    int Hq;
    int Hkv;
    int S;
    int Dk;
    int Dv;
    int window;  // 0: none. The query is at position S − 1 and sees keys j > S − 1 − window
    int has_mask;
    int has_sinks;
    float scale;
};

constant constexpr ushort SIMDGROUPS = 4;
constant constexpr ushort MOST_PER_LANE = 8;  // values of a head that a lane holds: Dk, Dv ≤ 256

// kernel_attention_{f32,f16,bf16}: out = softmax(scale·q·kᵀ [, sink]) · v; a sink is one more key that has no value.
//   buffers      0 AttentionArgs; 1 q T [B, Hq, Dk]; 2 k T [B, Hkv, S, Dk]; 3 v T [B, Hkv, S, Dv];
//                4 mask uchar [B, S], 0 hides (unused unless has_mask); 5 sinks float [Hq] (unused unless has_sinks);
//                6 out T [B, Hq, Dv]
//   threadgroups (Hq, B, 1)   threads (128, 1, 1)   threadgroup bytes 16·(Dv + 2)
// Simdgroup i takes keys i, i + 4, …; each keeps a maximum, the sum of its exponentials and a weighted sum of values,
// which the first then merges. A sum of 0 says that a simdgroup saw no key (its own maximum counts 1), so no infinity
// stands for it. With every key hidden the output is 0.
template <typename T>
kernel void kernel_attention(constant AttentionArgs & args [[buffer(0)]],
                             device const T * q [[buffer(1)]],
                             device const T * k [[buffer(2)]],
                             device const T * v [[buffer(3)]],
                             device const uchar * mask [[buffer(4)]],
                             device const float * sinks [[buffer(5)]],
                             device T * out [[buffer(6)]],
                             threadgroup float * shared [[threadgroup(0)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             ushort simdgroup [[simdgroup_index_in_threadgroup]],
                             ushort lane [[thread_index_in_simdgroup]]) {
    const int head = group.x;
    const ulong batch = group.y;
    const ulong kv_head = batch * args.Hkv + head / (args.Hq / args.Hkv);
    device const T * query = q + (batch * args.Hq + head) * args.Dk;
    device const T * keys = k + kv_head * args.S * args.Dk;
    device const T * values = v + kv_head * args.S * args.Dv;
    device const uchar * visible = mask + batch * args.S;

    float scaled[MOST_PER_LANE];
    float result[MOST_PER_LANE];
    for (ushort i = 0; i < MOST_PER_LANE; ++i) {
        const int at = lane + 32 * i;
        scaled[i] = at < args.Dk ? float(query[at]) * args.scale : 0.0f;
        result[i] = 0.0f;
    }

    float largest = 0.0f;
    float total = 0.0f;
    const int first = args.window > 0 ? max(0, args.S - args.window) : 0;
    for (int j = first + simdgroup; j < args.S; j += SIMDGROUPS) {
        if (args.has_mask && !visible[j]) {
            continue;
        }
        float score = 0.0f;
        for (ushort i = 0; lane + 32 * i < args.Dk; ++i) {
            score += scaled[i] * float(keys[ulong(j) * args.Dk + lane + 32 * i]);
        }
        score = simd_sum(score);
        const float bound = total > 0.0f ? max(largest, score) : score;
        const float kept = total > 0.0f ? precise::exp(largest - bound) : 0.0f;
        const float weight = precise::exp(score - bound);
        for (ushort i = 0; lane + 32 * i < args.Dv; ++i) {
            result[i] = kept * result[i] + weight * float(values[ulong(j) * args.Dv + lane + 32 * i]);
        }
        total = kept * total + weight;
        largest = bound;
    }

    threadgroup float * all_largest = shared;
    threadgroup float * all_total = shared + SIMDGROUPS;
    threadgroup float * all_result = shared + 2 * SIMDGROUPS;
    if (lane == 0) {
        all_largest[simdgroup] = largest;
        all_total[simdgroup] = total;
    }
    for (ushort i = 0; lane + 32 * i < args.Dv; ++i) {
        all_result[simdgroup * args.Dv + lane + 32 * i] = result[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup != 0) {
        return;
    }

    bool seen = args.has_sinks;
    float bound = args.has_sinks ? sinks[head] : 0.0f;
    for (ushort i = 0; i < SIMDGROUPS; ++i) {
        if (all_total[i] > 0.0f) {
            bound = seen ? max(bound, all_largest[i]) : all_largest[i];
            seen = true;
        }
    }
    float factor[SIMDGROUPS];
    float divisor = args.has_sinks ? precise::exp(sinks[head] - bound) : 0.0f;
    for (ushort i = 0; i < SIMDGROUPS; ++i) {
        factor[i] = all_total[i] > 0.0f ? precise::exp(all_largest[i] - bound) : 0.0f;
        divisor += factor[i] * all_total[i];
    }
    device T * to = out + (batch * args.Hq + head) * args.Dv;
    for (int at = lane; at < args.Dv; at += 32) {
        float sum = 0.0f;
        for (ushort i = 0; i < SIMDGROUPS; ++i) {
            sum += factor[i] * all_result[i * args.Dv + at];
        }
        to[at] = T(seen ? sum / divisor : 0.0f);
    }
}

#ifndef ASSAY_FUNCTIONS_ONLY

#define BY_TYPE(name, T)                                                                        \
    template [[host_name("kernel_attention_" #name)]] [[kernel]]                                \
    decltype(kernel_attention<T>) kernel_attention<T>;

BY_TYPE(f32, float)
BY_TYPE(f16, half)
BY_TYPE(bf16, bfloat)

#endif
