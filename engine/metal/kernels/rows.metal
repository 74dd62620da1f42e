// RMSNorm and softmax of rows, a threadgroup a row: float sums whatever T (float, half or bfloat) is.

#include <metal_stdlib>
#include "reduce.h"

using namespace metal;

struct RmsNormArgs {
    int D;
    float eps;
};

struct SoftmaxArgs {
    int S;
    int has_mask;
    float scale;
};

// kernel_rms_norm_{f32,f16,bf16}: out = x / sqrt(mean(x²) + eps) · weight, rounded once.
//   buffers      0 RmsNormArgs; 1 x T [n, D]; 2 weight T [D]; 3 out T [n, D]
//   threadgroups (n, 1, 1)   threads (128, 1, 1)   threadgroup bytes 128
template <typename T>
kernel void kernel_rms_norm(constant RmsNormArgs & args [[buffer(0)]],
                            device const T * x [[buffer(1)]],
                            device const T * weight [[buffer(2)]],
                            device T * out [[buffer(3)]],
                            threadgroup float * shared [[threadgroup(0)]],
                            uint row [[threadgroup_position_in_grid]],
                            ushort thread_index [[thread_index_in_threadgroup]],
                            ushort threads [[threads_per_threadgroup]],
                            ushort simdgroup [[simdgroup_index_in_threadgroup]],
                            ushort simdgroups [[simdgroups_per_threadgroup]],
                            ushort lane [[thread_index_in_simdgroup]]) {
    device const T * from = x + ulong(row) * args.D;
    device T * to = out + ulong(row) * args.D;
    float squares = 0.0f;
    for (int i = thread_index; i < args.D; i += threads) {
        const float value = float(from[i]);
        squares += value * value;
    }
    squares = threadgroup_sum(squares, shared, simdgroup, lane, simdgroups);
    const float factor = 1.0f / precise::sqrt(squares / float(args.D) + args.eps);
    for (int i = thread_index; i < args.D; i += threads) {
        to[i] = T(float(from[i]) * factor * float(weight[i]));
    }
}

// kernel_softmax_{f32,f16,bf16}: out = softmax(scale·x over the entries that the mask leaves), 0 elsewhere.
//   buffers      0 SoftmaxArgs; 1 x T [n, S]; 2 mask uchar [n, S], 0 hides (unused unless has_mask); 3 out T [n, S]
//   threadgroups (n, 1, 1)   threads (128, 1, 1)   threadgroup bytes 128
// A row with everything hidden is all zeros. −FLT_MAX stands for "nothing seen": it is below every finite score, and no
// arithmetic here meets an infinity, which fast math would be free to assume away.
template <typename T>
kernel void kernel_softmax(constant SoftmaxArgs & args [[buffer(0)]],
                           device const T * x [[buffer(1)]],
                           device const uchar * mask [[buffer(2)]],
                           device T * out [[buffer(3)]],
                           threadgroup float * shared [[threadgroup(0)]],
                           uint row [[threadgroup_position_in_grid]],
                           ushort thread_index [[thread_index_in_threadgroup]],
                           ushort threads [[threads_per_threadgroup]],
                           ushort simdgroup [[simdgroup_index_in_threadgroup]],
                           ushort simdgroups [[simdgroups_per_threadgroup]],
                           ushort lane [[thread_index_in_simdgroup]]) {
    device const T * from = x + ulong(row) * args.S;
    device const uchar * visible = mask + ulong(row) * args.S;
    device T * to = out + ulong(row) * args.S;
    float largest = -FLT_MAX;
    for (int i = thread_index; i < args.S; i += threads) {
        if (!args.has_mask || visible[i]) {
            largest = max(largest, args.scale * float(from[i]));
        }
    }
    largest = threadgroup_max(largest, shared, simdgroup, lane, simdgroups);
    float total = 0.0f;
    for (int i = thread_index; i < args.S; i += threads) {
        if (!args.has_mask || visible[i]) {
            total += precise::exp(args.scale * float(from[i]) - largest);
        }
    }
    total = threadgroup_sum(total, shared, simdgroup, lane, simdgroups);
    for (int i = thread_index; i < args.S; i += threads) {
        const bool shown = !args.has_mask || visible[i];
        to[i] = T(shown ? precise::exp(args.scale * float(from[i]) - largest) / total : 0.0f);
    }
}

#ifndef ASSAY_FUNCTIONS_ONLY

#define BY_TYPE(name, T)                                                                        \
    template [[host_name("kernel_rms_norm_" #name)]] [[kernel]]                                 \
    decltype(kernel_rms_norm<T>) kernel_rms_norm<T>;                                            \
    template [[host_name("kernel_softmax_" #name)]] [[kernel]]                                  \
    decltype(kernel_softmax<T>) kernel_softmax<T>;

BY_TYPE(f32, float)
BY_TYPE(f16, half)
BY_TYPE(bf16, bfloat)

#endif
