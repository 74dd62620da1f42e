// RoPE and the clamped SwiGLU: one thread an element (RoPE: a pair), float arithmetic, one rounding at the end.

#include <metal_stdlib>

using namespace metal;

struct RopeArgs {
    int T;
    int H;
    int D;
    float theta;
};

struct SwigluArgs {
    int rows;
    int F;
    int has_limit;
    int has_weights;
    float limit;
};

// kernel_rope_{f32,f16,bf16}: rotates the pairs (j, j + D/2) of each head by position·theta^(−2j/D).
//   buffers      0 RopeArgs; 1 x [T, H, D]; 2 positions int [T]; 3 out [T, H, D]; D even
//   threadgroups (⌈D/2/32⌉, H, T)   threads (32, 1, 1)   threadgroup bytes 0
// Positions and angles are float: half can't hold a position above 2048, bfloat one above 256.
template <typename X>
kernel void kernel_rope(constant RopeArgs & args [[buffer(0)]],
                        device const X * x [[buffer(1)]],
                        device const int * positions [[buffer(2)]],
                        device X * out [[buffer(3)]],
                        uint3 at [[thread_position_in_grid]]) {
    const int j = at.x;
    const int pairs = args.D / 2;
    if (j >= pairs) {
        return;
    }
    const float angle = float(positions[at.z]) * precise::pow(args.theta, -float(j) / float(pairs));
    const float c = precise::cos(angle);
    const float s = precise::sin(angle);
    const ulong head = (ulong(at.z) * args.H + at.y) * args.D;
    const float a = float(x[head + j]);
    const float b = float(x[head + j + pairs]);
    out[head + j] = X(a * c - b * s);
    out[head + j + pairs] = X(a * s + b * c);
}

// kernel_swiglu_{f32,f16,bf16}: out = silu(min(gate, limit)) · clamp(up, ±limit) · weight of the row.
//   buffers      0 SwigluArgs; 1 gate [rows, F]; 2 up [rows, F]; 3 weights float [rows] (unused unless has_weights);
//                4 out [rows, F]
//   threadgroups (⌈F/128⌉, rows, 1)   threads (128, 1, 1)   threadgroup bytes 0
// The quotient is of e^−|g| alone, which can't overflow.
template <typename X>
kernel void kernel_swiglu(constant SwigluArgs & args [[buffer(0)]],
                          device const X * gate [[buffer(1)]],
                          device const X * up [[buffer(2)]],
                          device const float * weights [[buffer(3)]],
                          device X * out [[buffer(4)]],
                          uint2 position [[thread_position_in_grid]]) {
    if (int(position.x) >= args.F) {
        return;
    }
    const ulong at = ulong(position.y) * args.F + position.x;
    float g = float(gate[at]);
    float u = float(up[at]);
    if (args.has_limit) {
        g = min(g, args.limit);
        u = clamp(u, -args.limit, args.limit);
    }
    const float e = precise::exp(-abs(g));
    const float silu = g * (g < 0.0f ? e : 1.0f) / (1.0f + e);
    out[at] = X(silu * u * (args.has_weights ? weights[position.y] : 1.0f));
}

#ifndef ASSAY_FUNCTIONS_ONLY

#define BY_TYPE(name, X)                                                                        \
    template [[host_name("kernel_rope_" #name)]] [[kernel]]                                     \
    decltype(kernel_rope<X>) kernel_rope<X>;                                                    \
    template [[host_name("kernel_swiglu_" #name)]] [[kernel]]                                   \
    decltype(kernel_swiglu<X>) kernel_swiglu<X>;

BY_TYPE(f32, float)
BY_TYPE(f16, half)
BY_TYPE(bf16, bfloat)

#endif
