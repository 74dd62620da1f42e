// Routed mixture-of-experts projections over quantised experts, expert-major for prefill and by vector for decode.
//
// n tokens, each routed to top_k distinct experts of E. A pair is token·top_k + slot. Weights are blocks [E, M, K] (M
// rows of K elements, K a whole number of blocks), outputs float [n, top_k, M]: the row of a pair is the pair itself.
// The right-hand side x is [n, x_slots, K], x_slots 1 (all slots of a token read one row) or top_k (a row for each).
// Everything is contiguous.

#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include "blocks.h"

using namespace metal;

struct MapArgs {
    int n_tokens;
    int top_k;
};

struct MatmulArgs {
    int K;
    int M;
    int n_tokens;
    int top_k;
    int x_slots;
};

// Sizes of the expert-major matmul. A threadgroup of four simdgroups computes NR1 tokens by NR0 weight rows, NK elements
// a step; the simdgroups stand 2×2, so each has NR1/2 tokens by NR0/2 rows, which is NR1/16 by 4 accumulators of 8×8.
constant constexpr short NR0 = 64;
constant constexpr short NK = 32;

// One expert's pairs in ascending token order, for one simdgroup an expert.
inline void map_experts(MapArgs args, device const int * experts, device uint * counts, device uint * pairs,
                        uint expert, ushort lane) {
    uint count = 0;
    for (int first = 0; first < args.n_tokens; first += 32) {
        const int token = first + lane;
        int slot = -1;
        if (token < args.n_tokens) {
            for (int k = 0; k < args.top_k; ++k) {
                slot = experts[token * args.top_k + k] == int(expert) ? k : slot;
            }
        }
        const uint here = slot >= 0 ? 1 : 0;
        const uint place = count + simd_prefix_exclusive_sum(here);
        if (here) {
            pairs[ulong(expert) * args.n_tokens + place] = token * args.top_k + slot;
        }
        count += simd_sum(here);
    }
    if (lane == 0) {
        counts[expert] = count;
    }
}

// Weights and x are rounded to half and multiplied; sums are kept in float. `staging` holds NK elements of NR0 weight
// rows and of NR1 tokens while summing (64·(NR0 + NR1) bytes), then the whole tile in float (256·NR1 bytes, the larger).
template <typename Block, typename X, short NR1>
void mul_mm_id(MatmulArgs args, device const Block * weights, device const X * x, device const uint * counts,
               device const uint * pairs, device float * out, threadgroup uchar * staging,
               uint3 tile, ushort thread_index, ushort simdgroup, ushort lane) {
    const uint expert = tile.z;
    const uint count = counts[expert];
    const uint first_token = tile.x * NR1;
    const uint first_row = tile.y * NR0;
    if (first_token >= count) {
        return;
    }
    const short tokens = min(uint(NR1), count - first_token);
    const short rows = min(uint(NR0), uint(args.M) - first_row);
    device const uint * own = pairs + ulong(expert) * args.n_tokens + first_token;

    // 8×8 tiles, each contiguous: weights as [element][row], so that no load is transposed, and x as [token][element].
    threadgroup half * a = (threadgroup half *) staging;
    threadgroup half * b = a + NR0 * NK;

    // Two threads stage a weight row, sixteen elements each. Past the last row the last one is staged again: whatever
    // it adds to is not stored, and nothing outside the weights is read.
    const short a_row = min(short(thread_index / 2), short(rows - 1));
    const ushort a_half = thread_index % 2;
    const ulong row_blocks = args.K / Block::elements;
    device const Block * row_start = weights + (ulong(expert) * args.M + first_row + a_row) * row_blocks;

    // Four threads stage a token, eight elements each: a band of 32 tokens at a time, NR1/32 bands.
    const ushort b_quarter = thread_index % 4;
    device const X * x_rows[NR1 / 32];
    for (short band = 0; band < NR1 / 32; ++band) {
        const uint pair = own[min(short(32 * band + thread_index / 4), short(tokens - 1))];
        const ulong row = ulong(pair / args.top_k) * args.x_slots + (pair % args.top_k) % args.x_slots;
        x_rows[band] = x + row * args.K + 8 * b_quarter;
    }

    simdgroup_float8x8 sums[NR1 / 4];
    for (short i = 0; i < NR1 / 4; ++i) {
        sums[i] = make_filled_simdgroup_matrix<float, 8>(0.0f);
    }

    for (int k = 0; k < args.K; k += NK) {
        half values[16];
        dequantize(row_start + k / Block::elements, ushort((k % Block::elements) / 16 + a_half), values);
        // Every simdgroup has read the previous step's tiles.
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const short column = thread_index / 2;
        for (short i = 0; i < 16; ++i) {
            a[64 * (8 * (2 * a_half + i / 8) + column / 8) + 8 * (i % 8) + column % 8] = values[i];
        }
        for (short band = 0; band < NR1 / 32; ++band) {
            const short token = 32 * band + thread_index / 4;
            threadgroup half * to = b + 64 * ((NR1 / 8) * b_quarter + token / 8) + 8 * (token % 8);
            for (short i = 0; i < 8; ++i) {
                to[i] = half(x_rows[band][k + i]);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        threadgroup const half * a_tiles = a + 64 * 4 * (simdgroup % 2);
        threadgroup const half * b_tiles = b + 64 * (NR1 / 16) * (simdgroup / 2);
        for (short step = 0; step < NK / 8; ++step) {
            simdgroup_half8x8 weight_tile[4];
            simdgroup_half8x8 x_tile;
            for (short i = 0; i < 4; ++i) {
                simdgroup_load(weight_tile[i], a_tiles + 64 * i, 8);
            }
            for (short j = 0; j < NR1 / 16; ++j) {
                simdgroup_load(x_tile, b_tiles + 64 * j, 8);
                for (short i = 0; i < 4; ++i) {
                    simdgroup_multiply_accumulate(sums[4 * j + i], x_tile, weight_tile[i], sums[4 * j + i]);
                }
            }
            a_tiles += 64 * (NR0 / 8);
            b_tiles += 64 * (NR1 / 8);
        }
    }

    // The tile goes over the staging that the last step was read from.
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup float * result = (threadgroup float *) staging;
    threadgroup float * corner = result + NR0 * (NR1 / 2) * (simdgroup / 2) + (NR0 / 2) * (simdgroup % 2);
    for (short i = 0; i < NR1 / 4; ++i) {
        simdgroup_store(sums[i], corner + NR0 * 8 * (i / 4) + 8 * (i % 4), NR0);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (short token = simdgroup; token < tokens; token += 4) {
        device float * to = out + ulong(own[token]) * args.M + first_row;
        for (short row = lane; row < rows; row += 32) {
            to[row] = result[NR0 * token + row];
        }
    }
}

// One simdgroup a row: lanes take runs of sixteen elements in turn. Weights stay float here, products and sums too.
template <typename Block, typename X>
void mul_mv_id(MatmulArgs args, device const Block * weights, device const X * x, device const int * experts,
               device float * out, uint row, uint pair, ushort lane) {
    if (row >= uint(args.M)) {
        return;
    }
    const ulong row_blocks = args.K / Block::elements;
    device const Block * blocks = weights + (ulong(experts[pair]) * args.M + row) * row_blocks;
    const ulong x_row = ulong(pair / args.top_k) * args.x_slots + (pair % args.top_k) % args.x_slots;
    device const X * vector = x + x_row * args.K;
    float sum = 0.0f;
    for (int k = 16 * lane; k < args.K; k += 16 * 32) {
        float values[16];
        dequantize(blocks + k / Block::elements, ushort((k % Block::elements) / 16), values);
        for (short i = 0; i < 16; ++i) {
            sum += values[i] * float(vector[k + i]);
        }
    }
    sum = simd_sum(sum);
    if (lane == 0) {
        out[ulong(pair) * args.M + row] = sum;
    }
}

// kernel_mul_mm_id_map: which pairs each expert has.
//   buffers      0 MapArgs; 1 experts int [n, top_k], distinct in a row; 2 counts uint [E] (out);
//                3 pairs uint [E, n] (out; pairs[e, i] for i < counts[e], by ascending token, the rest is left alone)
//   threadgroups (E, 1, 1)   threads (32, 1, 1)   threadgroup bytes 0
kernel void kernel_mul_mm_id_map(constant MapArgs & args [[buffer(0)]],
                                 device const int * experts [[buffer(1)]],
                                 device uint * counts [[buffer(2)]],
                                 device uint * pairs [[buffer(3)]],
                                 uint expert [[threadgroup_position_in_grid]],
                                 ushort lane [[thread_index_in_simdgroup]]) {
    map_experts(args, experts, counts, pairs, expert, lane);
}

// kernel_mul_mm_id_{q8_0,q4_K,q2_K,iq2_xxs}_{f32,f16}_{n32,n64,n128}: x of the pairs of each expert by its weights.
//   buffers      0 MatmulArgs; 1 weights blocks [E, M, K]; 2 x float or half [n, x_slots, K]; 3 counts uint [E];
//                4 pairs uint [E, n]; 5 out float [n, top_k, M]
//   threadgroups (⌈n/tile⌉, ⌈M/64⌉, E)   threads (128, 1, 1)   threadgroup bytes 256·tile: 8192, 16384, 32768
// A float x beyond ±65504 becomes infinite, as its products then do. Names without a tile are the n32 kernels.
template <typename Block, typename X, short NR1>
kernel void kernel_mul_mm_id(constant MatmulArgs & args [[buffer(0)]],
                             device const Block * weights [[buffer(1)]],
                             device const X * x [[buffer(2)]],
                             device const uint * counts [[buffer(3)]],
                             device const uint * pairs [[buffer(4)]],
                             device float * out [[buffer(5)]],
                             threadgroup uchar * staging [[threadgroup(0)]],
                             uint3 tile [[threadgroup_position_in_grid]],
                             ushort thread_index [[thread_index_in_threadgroup]],
                             ushort simdgroup [[simdgroup_index_in_threadgroup]],
                             ushort lane [[thread_index_in_simdgroup]]) {
    mul_mm_id<Block, X, NR1>(args, weights, x, counts, pairs, out, staging, tile, thread_index, simdgroup, lane);
}

template <typename Block, typename X>
kernel void kernel_mul_mm_id_default(constant MatmulArgs & args [[buffer(0)]],
                                     device const Block * weights [[buffer(1)]],
                                     device const X * x [[buffer(2)]],
                                     device const uint * counts [[buffer(3)]],
                                     device const uint * pairs [[buffer(4)]],
                                     device float * out [[buffer(5)]],
                                     threadgroup uchar * staging [[threadgroup(0)]],
                                     uint3 tile [[threadgroup_position_in_grid]],
                                     ushort thread_index [[thread_index_in_threadgroup]],
                                     ushort simdgroup [[simdgroup_index_in_threadgroup]],
                                     ushort lane [[thread_index_in_simdgroup]]) {
    mul_mm_id<Block, X, 32>(args, weights, x, counts, pairs, out, staging, tile, thread_index, simdgroup, lane);
}

// kernel_mul_mv_id_{q8_0,q4_K,q2_K,iq2_xxs}_{f32,f16}: the same result for few tokens, straight from the router's ids.
//   buffers      0 MatmulArgs; 1 weights blocks [E, M, K]; 2 x float or half [n, x_slots, K];
//                3 experts int [n, top_k]; 4 out float [n, top_k, M]
//   threadgroups (⌈M/4⌉, n·top_k, 1)   threads (128, 1, 1)   threadgroup bytes 0
template <typename Block, typename X>
kernel void kernel_mul_mv_id(constant MatmulArgs & args [[buffer(0)]],
                             device const Block * weights [[buffer(1)]],
                             device const X * x [[buffer(2)]],
                             device const int * experts [[buffer(3)]],
                             device float * out [[buffer(4)]],
                             uint3 group [[threadgroup_position_in_grid]],
                             ushort simdgroup [[simdgroup_index_in_threadgroup]],
                             ushort lane [[thread_index_in_simdgroup]]) {
    mul_mv_id<Block, X>(args, weights, x, experts, out, 4 * group.x + simdgroup, group.y, lane);
}

#ifndef ASSAY_FUNCTIONS_ONLY

#define MUL_MM_ID(format, name, X, tile)                                                   \
    template [[host_name("kernel_mul_mm_id_" #format "_" #name "_n" #tile)]] [[kernel]]    \
    decltype(kernel_mul_mm_id<block_##format, X, tile>) kernel_mul_mm_id<block_##format, X, tile>;

#define BY_TYPE(format, name, X)                                                           \
    MUL_MM_ID(format, name, X, 32)                                                         \
    MUL_MM_ID(format, name, X, 64)                                                         \
    MUL_MM_ID(format, name, X, 128)                                                        \
    template [[host_name("kernel_mul_mm_id_" #format "_" #name)]] [[kernel]]               \
    decltype(kernel_mul_mm_id_default<block_##format, X>) kernel_mul_mm_id_default<block_##format, X>; \
    template [[host_name("kernel_mul_mv_id_" #format "_" #name)]] [[kernel]]               \
    decltype(kernel_mul_mv_id<block_##format, X>) kernel_mul_mv_id<block_##format, X>;

#define BY_FORMAT(format)                                                                  \
    BY_TYPE(format, f32, float)                                                            \
    BY_TYPE(format, f16, half)

BY_FORMAT(q8_0)
BY_FORMAT(q4_K)
BY_FORMAT(q2_K)
BY_FORMAT(iq2_xxs)

#endif
