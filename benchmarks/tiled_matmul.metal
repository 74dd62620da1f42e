// C = A·B for square float matrices of N, through tiles in threadgroup memory with two barriers a step: one text, which
// Metal and OpenCL both compile, so that executors of either are timed on the same work in the same order.
//
// A threadgroup computes ROWS × COLUMNS of C, DEPTH of the contraction a step; a thread computes DOWN × ACROSS of them.
// All seven names are given with -D; the tile divides N. Nothing is contracted to a fused multiply-add: Metal on the
// host rounds each operation, and results are compared bit by bit.
//   threads (COLUMNS/ACROSS, ROWS/DOWN, 1)   threadgroups (N/COLUMNS, N/ROWS, 1)

#ifdef __OPENCL_VERSION__

#pragma OPENCL FP_CONTRACT OFF
#define TILE __local float
#define BARRIER barrier(CLK_LOCAL_MEM_FENCE)

__kernel __attribute__((reqd_work_group_size(COLUMNS / ACROSS, ROWS / DOWN, 1)))
void tiled_matmul(__global const float * a, __global const float * b, __global float * c) {
    const int first_row = get_group_id(1) * ROWS, first_column = get_group_id(0) * COLUMNS;
    const int x = get_local_id(0), y = get_local_id(1);

#else

#include <metal_stdlib>
using namespace metal;
#define TILE threadgroup float
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)

kernel void tiled_matmul(device const float * a, device const float * b, device float * c,
                         uint2 group [[threadgroup_position_in_grid]], uint2 at [[thread_position_in_threadgroup]]) {
    const int first_row = group.y * ROWS, first_column = group.x * COLUMNS;
    const int x = at.x, y = at.y;

#endif

    TILE a_tile[ROWS][DEPTH];
    TILE b_tile[DEPTH][COLUMNS];
    const uint threads = (ROWS / DOWN) * (COLUMNS / ACROSS), me = y * (COLUMNS / ACROSS) + x;
    float sums[DOWN][ACROSS];
    for (int i = 0; i < DOWN; i++) {
        for (int j = 0; j < ACROSS; j++) {
            sums[i][j] = 0;
        }
    }
    for (int k = 0; k < N; k += DEPTH) {
        for (uint i = me; i < ROWS * DEPTH; i += threads) {
            a_tile[i / DEPTH][i % DEPTH] = a[(first_row + i / DEPTH) * N + k + i % DEPTH];
        }
        for (uint i = me; i < DEPTH * COLUMNS; i += threads) {
            b_tile[i / COLUMNS][i % COLUMNS] = b[(k + i / COLUMNS) * N + first_column + i % COLUMNS];
        }
        BARRIER;
        for (int d = 0; d < DEPTH; d++) {
            for (int i = 0; i < DOWN; i++) {
                for (int j = 0; j < ACROSS; j++) {
                    sums[i][j] += a_tile[y * DOWN + i][d] * b_tile[d][x * ACROSS + j];
                }
            }
        }
        BARRIER;
    }
    for (int i = 0; i < DOWN; i++) {
        for (int j = 0; j < ACROSS; j++) {
            c[(first_row + y * DOWN + i) * N + first_column + x * ACROSS + j] = sums[i][j];
        }
    }
}
