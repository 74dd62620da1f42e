"""What the checkers remember and what they say, beyond one planted fault at a time."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from engine.metal.library import compile as compile_metal

SOURCE = """#include <metal_stdlib>
using namespace metal;
#define THREAD uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]]

kernel void counted(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                    constant float& scale [[buffer(2)]], threadgroup float* tile [[threadgroup(0)]], THREAD) {
    tile[t] = in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = tile[31 - t] * scale;
}

// Every round is ordered; only the last reads without a barrier when `last` says so.
kernel void rounds(device uint* out [[buffer(0)]], constant uint& count [[buffer(1)]],
                   constant uint& last [[buffer(2)]], threadgroup uint* tile [[threadgroup(0)]], THREAD) {
    uint sum = 0;
    for (uint round = 0; round < count; round++) {
        tile[t] = round + t;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sum += tile[t ^ 1];
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (last) tile[t] = sum;
    out[t] = tile[t ^ 1];
}

kernel void written_long_ago(device uint* out [[buffer(0)]], device uint* scratch [[buffer(1)]],
                             constant uint& count [[buffer(2)]], uint group [[threadgroup_position_in_grid]]) {
    if (group == 0) scratch[0] = 5;
    for (uint round = 0; round < count; round++) simdgroup_barrier(mem_flags::mem_threadgroup);
    if (group == 1) out[0] = scratch[0];
}

kernel void bytes_then_word(device uint* out [[buffer(0)]], constant uint& ordered [[buffer(1)]],
                            threadgroup uchar* tile [[threadgroup(0)]], THREAD) {
    tile[t] = uchar(t);
    threadgroup_barrier(ordered ? mem_flags::mem_threadgroup : mem_flags::mem_none);
    if (t < 8) out[t] = ((threadgroup uint*)tile)[t];
}

kernel void halves_then_vectors(device float4* out [[buffer(0)]], threadgroup half* tile [[threadgroup(0)]], THREAD) {
    tile[t] = half(t);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (t < 8) out[t] = float4(((threadgroup half4*)tile)[t]);
}

kernel void accumulates(device float* out [[buffer(0)]], constant uint& clear [[buffer(1)]], THREAD) {
    if (clear) out[i] = 0;
    out[i] += 1;
}

struct Six {
    float v[6];
};
kernel void copies_what_is_missing(device float* out [[buffer(0)]], threadgroup Six* from [[threadgroup(0)]],
                                   threadgroup Six* to [[threadgroup(1)]], constant uint& missing [[buffer(1)]],
                                   THREAD) {
    for (uint k = 0; k < 6; k++) if (k != missing) from[t].v[k] = k;
    to[t] = from[t];
    out[i] = to[t].v[3];
}

kernel void writes_what_it_is_given(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                                    uint t [[thread_index_in_threadgroup]],
                                    uint group [[threadgroup_position_in_grid]]) {
    if (t == 0) out[0] = in[group];
}

kernel void two_writers(device float* out [[buffer(0)]], THREAD) {
    if (t == 3) out[0] = 3;
    if (t == 5) out[0] = 5;
}

kernel void count_and_look(device uint* count [[buffer(0)]], device uint* out [[buffer(1)]], THREAD) {
    atomic_fetch_add_explicit((device atomic_uint*)count, 1u, memory_order_relaxed);
    out[i] = count[0];
}

kernel void scan_in_place(device float* out [[buffer(0)]], THREAD) {
    threadgroup float tile[32];
    tile[t] = i;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float before = t ? tile[t - 1] : 0;
    tile[t] += before;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = tile[t];
}

kernel void one_line_many_times(device float* out [[buffer(0)]], THREAD) {
    threadgroup float tile[16][32];
    tile[0][t] = i;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float sum = 0;
    for (uint k = 0; k < 16; k++) sum += tile[k][t];
    out[i] = sum;
}

kernel void past_a_volume(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                          uint3 at [[thread_position_in_grid]], uint3 whole [[threads_per_grid]]) {
    uint i = (at.z * whole.y + at.y) * whole.x + at.x;
    out[i] = in[i + 1];
}

kernel void writes_before_another_reads(device float* out [[buffer(0)]], device float* sum [[buffer(1)]],
                                        uint3 at [[thread_position_in_grid]]) {
    if (at.z == 1 && at.x == 4) out[0] = 1;
    if (at.x == 0 && at.z == 0) sum[0] = out[0];
}

kernel void looks_to_the_right(device float* out [[buffer(0)]], THREAD) { out[i] = simd_shuffle_down(float(i), 1); }

kernel void simd_barriers(device float* out [[buffer(0)]], threadgroup float* tile [[threadgroup(0)]],
                          constant uint& fenced [[buffer(1)]], THREAD) {
    tile[t] = i;
    simdgroup_barrier(fenced ? mem_flags::mem_threadgroup : mem_flags::mem_none);
    out[i] = tile[t ^ 1];
}
"""


@cache
def library() -> Any:
    made = compile_metal(SOURCE, checked=True)
    made.build(made.kernels)
    return made


def launch(kernel: str, buffers: dict[int, Any], *, threads: int = 32, groups: int = 1, **more: Any) -> Any:
    return library()[kernel].launch(buffers, threads=threads, threadgroups=groups, **more)


def kinds(run: Any) -> set[str]:
    return {fault.kind for fault in run.faults}


def test_counts_accesses_by_address_space() -> None:
    data, out = np.ones(64, np.float32), np.zeros(64, np.float32)
    run = launch("counted", {0: data, 1: out, 2: np.float32(2)}, groups=2, threadgroup_memory={0: 128})
    assert run.faults == ()
    assert run.stats.loads == {"device": 64, "constant": 64, "threadgroup": 64}
    assert run.stats.stores == {"device": 64, "constant": 0, "threadgroup": 64}


# A shadow cell's stamp has 19 bits: this many barriers make it start again.
MANY = 300_000


@pytest.mark.parametrize(("last", "expected"), [(0, set()), (1, {"race"})])
def test_order_outlasts_the_stamps(last: int, expected: set[str]) -> None:
    out = np.zeros(2, np.uint32)
    buffers = {0: out, 1: np.uint32(MANY), 2: np.uint32(last)}
    assert kinds(launch("rounds", buffers, threads=2, threadgroup_memory={0: 8})) == expected


def test_other_threadgroups_are_known_after_the_stamps_start_again() -> None:
    out, scratch = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    run = launch("written_long_ago", {0: out, 1: scratch, 2: np.uint32(2 * MANY)}, threads=1, groups=2)
    assert [(fault.kind, fault.buffer, fault.threadgroup) for fault in run.faults] == [("race", 1, (1, 0, 0))]


@pytest.mark.parametrize(("ordered", "expected"), [(1, set()), (0, {"race"})])
def test_bytes_of_several_threads_in_one_word(ordered: int, expected: set[str]) -> None:
    out = np.zeros(8, np.uint32)
    run = launch("bytes_then_word", {0: out, 1: np.uint32(ordered)}, threads=64, threadgroup_memory={0: 64})
    assert kinds(run) == expected


def test_halves_of_several_threads_in_one_vector() -> None:
    out = np.zeros(32, np.float32)
    assert launch("halves_then_vectors", {0: out}, threadgroup_memory={0: 64}).faults == ()
    assert np.array_equal(out, np.arange(32))


@pytest.mark.parametrize("elements", [40, 20_000], ids=["part of a page", "many pages"])
def test_outputs_hold_nothing_before_they_are_written(elements: int) -> None:
    out = np.zeros(elements, np.float32)
    groups = elements // 8
    run = launch("accumulates", {0: out, 1: np.uint32(0)}, threads=8, groups=groups, outputs=(0,))
    assert [(fault.kind, fault.buffer, fault.offset) for fault in run.faults] == [("uninitialised-read", 0, 0)]
    assert launch("accumulates", {0: out, 1: np.uint32(1)}, threads=8, groups=groups, outputs=(0,)).faults == ()
    assert launch("accumulates", {0: out, 1: np.uint32(0)}, threads=8, groups=groups).faults == ()
    assert np.array_equal(out, np.full(elements, 2))


@pytest.mark.parametrize(("missing", "expected"), [(3, {"uninitialised-read"}), (2, set()), (6, set())])
def test_a_copy_carries_what_was_never_written(missing: int, expected: set[str]) -> None:
    out = np.zeros(32, np.float32)
    memory = {0: 24 * 32, 1: 24 * 32}
    run = launch("copies_what_is_missing", {0: out, 1: np.uint32(missing)}, threadgroup_memory=memory)
    assert kinds(run) == expected


@pytest.mark.parametrize(("values", "expected"), [((4, 4, 4), set()), ((4, 4, 5), {"race"}), ((4, 5, 4), {"race"})])
def test_threadgroups_may_write_one_value_but_not_two(values: tuple[int, ...], expected: set[str]) -> None:
    data, out = np.array(values, np.float32), np.zeros(1, np.float32)
    for seed in (None, 1, 2, 3):
        assert kinds(launch("writes_what_it_is_given", {0: data, 1: out}, groups=3, schedule_seed=seed)) == expected


@pytest.mark.parametrize(("fenced", "expected"), [(1, set()), (0, {"race"})])
def test_simdgroup_barrier_fences_what_its_flags_say(fenced: int, expected: set[str]) -> None:
    out = np.zeros(32, np.float32)
    assert kinds(launch("simd_barriers", {0: out, 1: np.uint32(fenced)}, threadgroup_memory={0: 128})) == expected


def test_a_race_names_both_lines() -> None:
    (fault,) = launch("two_writers", {0: np.zeros(1, np.float32)}).faults
    first = next(n for n, text in enumerate(SOURCE.splitlines(), 1) if "out[0] = 3;" in text)
    assert (fault.other_line, fault.line) == (first, first + 1)
    assert (fault.other_thread, fault.thread) == ((3, 0, 0), (5, 0, 0))


def test_a_fault_comes_back_with_each_launch() -> None:
    for _ in range(3):
        assert kinds(launch("two_writers", {0: np.zeros(1, np.float32)})) == {"race"}


def test_messages_say_who_did_what_where_and_with_whom() -> None:
    out = np.zeros(32, np.float32)
    (fault,) = launch("simd_barriers", {0: out, 1: np.uint32(0)}, threadgroup_memory={0: 128}).faults
    line = next(n for n, text in enumerate(SOURCE.splitlines(), 1) if "out[i] = tile[t ^ 1];" in text)
    assert fault.line == line
    assert fault.other_line == line - 2
    assert "thread (0, 0, 0) of threadgroup (0, 0, 0) reads 4 bytes at threadgroup(0)+4" in fault.message
    assert "race with the write by thread (1, 0, 0): no barrier with mem_threadgroup in between" in fault.message
    assert (fault.thread, fault.other_thread, fault.threadgroup) == ((0, 0, 0), (1, 0, 0), (0, 0, 0))
    assert (fault.address_space, fault.buffer, fault.offset, fault.size) == ("threadgroup", 0, 4, 4)
    assert f" (line {line - 2}); both threads are of simdgroup 0: a kernel that relies on lockstep" in fault.message


def test_a_race_names_the_place_of_the_reader_that_it_names() -> None:
    """The thread that writes has read there too, after the other one."""
    reads = next(n for n, text in enumerate(SOURCE.splitlines(), 1) if "float before = t ?" in text)
    for seed in range(6):
        run = launch("scan_in_place", {0: np.zeros(32, np.float32)}, schedule_seed=seed)
        assert run.faults
        for fault in run.faults:
            assert {fault.line, fault.other_line} == {reads, reads + 1}, fault.message


def test_a_race_with_atomics_names_both_threads() -> None:
    run = launch("count_and_look", {0: np.zeros(1, np.uint32), 1: np.zeros(32, np.uint32)})
    line = next(n for n, text in enumerate(SOURCE.splitlines(), 1) if "out[i] = count[0];" in text)
    assert {(f.kind, f.line, f.other_line, f.thread, f.other_thread) for f in run.faults} == {
        ("race", line, line - 1, (1, 0, 0), (0, 0, 0)),  # read after the other thread's atomic
        ("race", line - 1, line, (1, 0, 0), (0, 0, 0)),  # atomic after the other thread's read
    }


def test_a_line_is_reported_once_however_it_is_unrolled() -> None:
    (fault,) = launch("one_line_many_times", {0: np.zeros(32, np.float32)}).faults
    assert (fault.kind, fault.offset, fault.thread) == ("uninitialised-read", 128, (0, 0, 0))


def test_a_line_with_many_faults_leaves_room_for_others() -> None:
    sums = " + ".join(f"tile[{k}][i]" for k in range(1, 128))
    text = f"""kernel void sums(device float* out, uint i [[thread_index_in_threadgroup]]) {{
        threadgroup float tile[128][32];
        tile[0][i] = i;
        out[i + 32] = {sums};
    }}"""
    kernel = compile_metal(text, checked=True)["sums"]
    run = kernel.launch({0: np.zeros(32, np.float32)}, threads=32, threadgroups=1)
    assert [fault.kind for fault in run.faults] == ["uninitialised-read", "out-of-bounds-write"]


@pytest.mark.parametrize(
    ("grid", "threads", "thread", "group"),
    [
        ((5, 3, 2), (2, 2, 2), (0, 0, 1), (2, 1, 0)),
        ((5, 3, 3), (4, 2, 2), (0, 0, 0), (1, 1, 1)),
        ((3, 5), (2, 4), (0, 0, 0), (1, 1, 0)),
        ((7, 3), (4, 3), (2, 2, 0), (1, 0, 0)),
    ],
)
def test_threads_of_smaller_threadgroups_at_the_edge_of_a_grid(
    grid: tuple[int, ...], threads: tuple[int, ...], thread: tuple[int, ...], group: tuple[int, ...]
) -> None:
    data = np.zeros(np.prod(grid), np.float32)
    run = library()["past_a_volume"].launch({0: data, 1: np.zeros_like(data)}, grid=grid, threads=threads)
    (fault,) = run.faults
    assert (fault.thread, fault.threadgroup, fault.offset) == (thread, group, data.nbytes)
    assert f"thread {thread} of threadgroup {group}" in fault.message


def test_the_other_thread_of_a_smaller_threadgroup() -> None:
    out, total = np.zeros(1, np.float32), np.zeros(1, np.float32)
    for seed in range(8):
        run = library()["writes_before_another_reads"].launch(
            {0: out, 1: total}, grid=(5, 1, 2), threads=(2, 1, 2), schedule_seed=seed
        )
        (fault,) = run.faults
        parties = {(fault.thread, fault.threadgroup), (fault.other_thread, None)}
        writer, reader = (0, 0, 1), (0, 0, 0)
        assert parties in ({(reader, (0, 0, 0)), (writer, None)}, {(writer, (2, 0, 0)), (reader, None)})
        assert f"thread {fault.other_thread} of threadgroup" in fault.message


def test_a_lane_that_the_last_simdgroup_does_not_have() -> None:
    (fault,) = launch("looks_to_the_right", {0: np.zeros(48, np.float32)}, threads=48).faults
    assert (fault.kind, fault.thread, fault.other_thread) == ("simdgroup-divergence", (47, 0, 0), None)
    assert "needs lane 16, which this simdgroup doesn't have" in fault.message


def test_a_race_between_simdgroups_is_not_said_to_be_within_one() -> None:
    text = """kernel void k(device float * out, threadgroup float * s [[threadgroup(0)]],
                            uint i [[thread_index_in_threadgroup]]) { s[i] = i; out[i] = s[i ^ FLIP]; }"""
    for flip, of_one in ((32, False), (1, True)):
        kernel = compile_metal(text, checked=True, defines={"FLIP": flip})["k"]
        memory, out = {0: 256}, np.zeros(64, np.float32)
        faults = kernel.launch({0: out}, threads=64, threadgroups=1, threadgroup_memory=memory, poison=False).faults
        raced = {"lockstep" in fault.message for fault in faults if fault.kind == "race"}
        assert raced == {of_one}


def test_a_line_is_reported_once_and_64_lines_at_most() -> None:
    lines = "\n".join(f"    out[i + {k}] = {k};" for k in range(32, 132))
    text = f"kernel void f(device int* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {{\n{lines}\n}}\n"
    out = np.zeros(32, np.int32)
    faults = compile_metal(text, checked=True)["f"].launch({0: out}, threads=32, threadgroups=2).faults
    assert {fault.kind for fault in faults} <= {"out-of-bounds-write", "race"}
    assert len(faults) == 64
    assert len({(fault.kind, fault.line) for fault in faults}) == 64
