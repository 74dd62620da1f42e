// llama.cpp's block formats on the GPU: Q8_0, Q4_K, Q2_K and IQ2_XXS, read sixteen values at a time.
//
// A weight row is a whole number of blocks. A Format says how many elements a block has, and `dequantize` writes run
// `run` (elements 16·run to 16·run + 15 of a block) as T. Every product below is exact in float (11 bits of d, at most
// 6 of scale, 6 of code), so that only the subtraction of a K-quant's min rounds, then the conversion to T.
// Layouts: ggml-common.h of llama.cpp. Blocks are 2-byte aligned, so nothing here loads more than 2 bytes at once.

#pragma once
#include <metal_stdlib>
#include "iq2_tables.h"

using namespace metal;

struct block_q8_0 {
    half d;
    char qs[32];
    enum { elements = 32 };
};

struct block_q4_K {
    half d;
    half dmin;
    uchar scales[12];  // eight 6-bit scales and eight 6-bit mins
    uchar qs[128];     // 32 bytes: run pair 2j in the low nibbles, 2j + 1 in the high ones
    enum { elements = 256 };
};

struct block_q2_K {
    uchar scales[16];  // low nibble: scale, high nibble: min
    uchar qs[64];      // 32 bytes hold 128 elements, 32 at each of the shifts 0, 2, 4 and 6
    half d;
    half dmin;
    enum { elements = 256 };
};

struct block_iq2_xxs {
    half d;
    ushort qs[32];     // for every 32 elements: four grid ids of 8 bits, then a 32-bit word of signs and scale
    enum { elements = 256 };
};

template <typename T>
void dequantize(device const block_q8_0 * block, ushort run, thread T * values) {
    const float d = float(block->d);
    for (ushort i = 0; i < 16; ++i) {
        values[i] = T(d * float(block->qs[16 * run + i]));
    }
}

template <typename T>
void dequantize(device const block_q4_K * block, ushort run, thread T * values) {
    const ushort j = run / 2;  // which of the eight scales
    uchar scale, least;
    if (j < 4) {
        scale = block->scales[j] & 63;
        least = block->scales[j + 4] & 63;
    } else {
        // The low nibbles of scales and mins 4 to 7 are in the last four bytes, their tops above those of 0 to 3.
        scale = (block->scales[j + 4] & 15) | (block->scales[j - 4] >> 6) << 4;
        least = (block->scales[j + 4] >> 4) | (block->scales[j] >> 6) << 4;
    }
    const float step = float(block->d) * float(scale);
    const float offset = float(block->dmin) * float(least);
    device const uchar * codes = block->qs + 32 * (j / 2) + 16 * (run % 2);
    const ushort shift = 4 * (j % 2);
    for (ushort i = 0; i < 16; ++i) {
        values[i] = T(step * float((codes[i] >> shift) & 15) - offset);
    }
}

template <typename T>
void dequantize(device const block_q2_K * block, ushort run, thread T * values) {
    const float step = float(block->d) * float(block->scales[run] & 15);
    const float offset = float(block->dmin) * float(block->scales[run] >> 4);
    device const uchar * codes = block->qs + 32 * (run / 8) + 16 * (run % 2);
    const ushort shift = 2 * ((run / 2) % 4);
    for (ushort i = 0; i < 16; ++i) {
        values[i] = T(step * float((codes[i] >> shift) & 3) - offset);
    }
}

template <typename T>
void dequantize(device const block_iq2_xxs * block, ushort run, thread T * values) {
    device const ushort * group = block->qs + 4 * (run / 2);
    const uint word = uint(group[2]) | uint(group[3]) << 16;
    const float step = float(block->d) * (0.5f + float(word >> 28)) * 0.25f;
    const ushort ids = group[run % 2];
    for (ushort v = 0; v < 2; ++v) {
        const ushort point = iq2_points[(ids >> (8 * v)) & 255];
        const ushort signs = iq2_signs((word >> (7 * (2 * (run % 2) + v))) & 127);
        for (ushort i = 0; i < 8; ++i) {
            const float value = step * iq2_coordinate((point >> (2 * i)) & 3);
            values[8 * v + i] = T((signs >> i) & 1 ? -value : value);
        }
    }
}
