// The router's top K of E experts and their weights, from float logits; a simdgroup a token.
//
// Scoring functions: 0 sqrtsoftplus and 1 sigmoid (independent scores; selected by score + bias, weighed by the score
// alone), 2 softmax over all experts, 3 softmax over the K selected. Slots are ordered by descending selection score,
// the lowest id first among equals; a NaN ranks below everything, so K distinct ids come out whatever the logits are.

#include <metal_stdlib>
#include <metal_simdgroup>

using namespace metal;

struct RouterArgs {
    int E;
    int K;
    int scoring;
    int has_bias;
    int normalise;
    float factor;  // routed_scaling_factor
};

// log(1 + y), 0 ≤ y. Below 1/4 by the series of 2·artanh(y/(2 + y)), whose next term is below 2⁻³³ of the sum: there
// 1 + y drops bits of y, and the usual correction for that is what fast math removes.
inline float log_of_one_plus(float y) {
    if (y >= 0.25f) {
        return precise::log(1.0f + y);
    }
    const float z = y / (2.0f + y);
    const float q = z * z;
    return 2.0f * z * (1.0f + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9)))));
}

// Above 20 softplus is x to the last bit. Below −20 it is eˣ; its root is taken as e^(x/2), which doesn't leave float's
// normal range before x = −174, so that cold experts keep distinct scores.
inline float sqrt_softplus(float x) {
    if (x > 20.0f) {
        return precise::sqrt(x);
    }
    if (x < -20.0f) {
        return precise::exp(0.5f * x);
    }
    return precise::sqrt(log_of_one_plus(precise::exp(x)));
}

inline float sigmoid(float x) {
    const float e = precise::exp(-abs(x));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// A float's bits as an integer, negative ones mirrored, are ordered as floats are, once −0 is made +0: NaN can be put last
// and subnormals stay distinct, whatever the compiler assumes of either.
inline int rank_of(float score) {
    const int bits = as_type<int>(score == 0.0f ? 0.0f : score);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return INT_MIN;
    }
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// kernel_router: buffers 0 RouterArgs; 1 logits float [n, E]; 2 bias float [E] (unused unless has_bias);
//                        3 experts int [n, K] (out); 4 weights float [n, K] (out).   K ≤ E, E ≤ 1024
//   threadgroups (n, 1, 1)   threads (32, 1, 1)   threadgroup bytes 4·E
kernel void kernel_router(constant RouterArgs & args [[buffer(0)]],
                          device const float * logits [[buffer(1)]],
                          device const float * bias [[buffer(2)]],
                          device int * experts [[buffer(3)]],
                          device float * weights [[buffer(4)]],
                          threadgroup float * scores [[threadgroup(0)]],
                          uint token [[threadgroup_position_in_grid]],
                          ushort lane [[thread_index_in_simdgroup]]) {
    device const float * row = logits + ulong(token) * args.E;
    // A lane writes and reads the scores of its own experts (lane, lane + 32, …) only: nothing to fence.
    float largest = -FLT_MAX;
    for (int e = lane; e < args.E; e += 32) {
        largest = max(largest, row[e]);
    }
    largest = simd_max(largest);
    float total = 0.0f;
    for (int e = lane; e < args.E; e += 32) {
        const float x = row[e];
        scores[e] = args.scoring == 0 ? sqrt_softplus(x)
                  : args.scoring == 1 ? sigmoid(x)
                  : args.scoring == 2 ? precise::exp(x - largest)
                                      : x;
        total += scores[e];
    }
    total = simd_sum(total);
    if (args.scoring == 2) {
        for (int e = lane; e < args.E; e += 32) {
            scores[e] /= total;
        }
    }

    uint taken = 0;  // bit i: expert lane + 32·i has a slot
    float sum = 0.0f;
    float first = 0.0f;
    for (int slot = 0; slot < args.K; ++slot) {
        int best = INT_MIN;
        int best_id = args.E;
        for (int e = lane; e < args.E; e += 32) {
            const int rank = rank_of(args.has_bias ? scores[e] + bias[e] : scores[e]);
            if (!((taken >> (e / 32)) & 1) && (best_id == args.E || rank > best)) {
                best = rank;
                best_id = e;
            }
        }
        const int top = simd_max(best);
        // Lanes that have nothing left hold args.E, which no candidate's id reaches.
        const int id = simd_min(best == top ? best_id : args.E);
        const ushort owner = id % 32;
        float weight = 0.0f;
        if (lane == owner) {
            taken |= 1u << (id / 32);
            weight = scores[id];
        }
        weight = simd_shuffle(weight, owner);
        if (args.scoring == 3) {
            first = slot == 0 ? weight : first;
            weight = precise::exp(weight - first);
        }
        sum += weight;
        if (lane == 0) {
            experts[ulong(token) * args.K + slot] = id;
            weights[ulong(token) * args.K + slot] = weight;
        }
    }

    // Lower limits of the divisor, as published: DeepSeek V4's (sqrtsoftplus) and V3's (sigmoid).
    float divisor = 1.0f;
    if (args.scoring == 3) {
        divisor = sum;
    } else if (args.normalise) {
        divisor = args.scoring == 0 ? max(sum, 6.1e-5f) : args.scoring == 1 ? sum + 1e-20f : sum;
    }
    if (lane == 0) {
        for (int slot = 0; slot < args.K; ++slot) {
            weights[ulong(token) * args.K + slot] *= args.factor / divisor;
        }
    }
}
