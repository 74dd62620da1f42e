"""Accesses far outside a buffer: the buffer that was meant, how far, which way, and who, with and without checkers."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from engine.metal.library import compile

SOURCE = """#include <metal_stdlib>
using namespace metal;
kernel void reads(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                  constant long& by [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    out[i] = i == 40 ? in[i + by] : 1;  // read
}
kernel void writes(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                   constant long& by [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    out[i == 40 ? i + by : i] = in[i];  // write
}
kernel void wraps(device float4* out [[buffer(0)]], device float4* next [[buffer(1)]], constant uint& n [[buffer(2)]],
                  uint i [[thread_position_in_grid]]) {
    next[i] = 0;
    uint last = n - 1;
    if (i == 40) out[last] = float4(1);  // wrap
}
kernel void tables(constant half* table [[buffer(0)]], device float* out [[buffer(1)]],
                   constant int& by [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    out[i] = float(table[i == 40 ? by : 0]);  // table
}
kernel void staged(device float* out [[buffer(0)]], constant int& by [[buffer(1)]],
                   threadgroup float* tile [[threadgroup(0)]], uint i [[thread_position_in_grid]],
                   uint t [[thread_index_in_threadgroup]]) {
    tile[t] = i;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = tile[i == 40 ? int(t) + by : int(t)];  // tile
}
kernel void both(device float* out [[buffer(0)]], constant long& by [[buffer(1)]]) {
    float seen = out[by];  // first
    out[by] = seen + 1;  // second
}
kernel void everywhere(device float* out [[buffer(0)]], constant uint& pages [[buffer(1)]]) {
    for (uint i = 1; i <= pages; i++) out[i << 19] = 1;
}
kernel void adds(device atomic_uint* sums [[buffer(0)]], constant uint& by [[buffer(1)]],
                 uint i [[thread_position_in_grid]]) {
    atomic_fetch_add_explicit(sums + (i == 40 ? by : 0), 1u, memory_order_relaxed);  // add
}
kernel void copies(device const float4x4* in [[buffer(0)]], device float4x4* out [[buffer(1)]],
                   constant int& by [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    out[i] = in[i == 40 ? by : 0];  // copy
}
"""
N = 64
MODES = pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])
GiB = 2**30


@cache
def library(checked: bool) -> Any:
    made = compile(SOURCE, checked=checked)
    made.build(made.kernels)
    return made


def line_of(mark: str) -> int:
    return next(n for n, text in enumerate(SOURCE.splitlines(), 1) if text.endswith(f"// {mark}"))


def launch(checked: bool, kernel: str, buffers: dict[int, Any], **more: Any) -> Any:
    return library(checked)[kernel].launch(buffers, **{"threads": 32, "threadgroups": 2, **more})


def only(run: Any) -> Any:
    assert len(run.faults) == 1, [fault.message for fault in run.faults]
    return run.faults[0]


BY = [1 << 24, -(1 << 24), (1 << 32) - 41, -(1 << 31), 1 << 33]


@MODES
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize(("kernel", "buffer", "mark"), [("reads", 0, "read"), ("writes", 1, "write")])
def test_the_buffer_that_was_meant_is_named(checked: bool, by: int, kernel: str, buffer: int, mark: str) -> None:
    data, out = np.ones(N, np.float32), np.zeros(N, np.float32)
    run = launch(checked, kernel, {0: data, 1: out, 2: np.int64(by)})
    fault = only(run)
    assert (fault.kind, fault.address_space, fault.buffer) == (f"out-of-bounds-{mark}", "device", buffer)
    assert (fault.offset, fault.size) == (4 * (40 + by), 4 if checked else None)
    assert (fault.thread, fault.threadgroup) == ((8, 0, 0), (1, 0, 0))
    assert (fault.kernel, fault.line) == (kernel, line_of(mark))
    assert f"buffer({buffer}){fault.offset:+}" in fault.message
    assert "guess" not in fault.message
    # The kernel goes on, as on a GPU: what it reads there is no number.
    assert run.completed
    assert np.array_equal(np.delete(out, 40), np.ones(N - 1))
    assert np.isnan(out[40]) if kernel == "reads" else out[40] == 0


@MODES
def test_an_unsigned_index_below_zero_stays_with_its_buffer(checked: bool) -> None:
    out, following = np.zeros((N, 4), np.float32), np.ones((N, 4), np.float32)
    fault = only(launch(checked, "wraps", {0: out, 1: following, 2: np.uint32(0)}))
    assert (fault.kind, fault.buffer, fault.offset) == ("out-of-bounds-write", 0, 64 * GiB - 16)
    assert (fault.line, fault.thread, fault.threadgroup) == (line_of("wrap"), (8, 0, 0), (1, 0, 0))
    assert not out.any()
    assert not following.any()


@MODES
@pytest.mark.parametrize("by", [1 << 22, -(1 << 22)])
def test_constant_memory_is_called_that(checked: bool, by: int) -> None:
    table, out = np.ones(8, np.float16), np.zeros(N, np.float32)
    fault = only(launch(checked, "tables", {0: table, 1: out, 2: np.int32(by)}))
    assert (fault.kind, fault.address_space, fault.buffer) == ("out-of-bounds-read", "constant", 0)
    assert (fault.offset, fault.size, fault.line) == (2 * by, 2 if checked else None, line_of("table"))


@MODES
@pytest.mark.parametrize("by", [1 << 20, -(1 << 20), 1 << 30])
def test_far_outside_threadgroup_memory(checked: bool, by: int) -> None:
    run = launch(checked, "staged", {0: np.zeros(N, np.float32), 1: np.int32(by)}, threadgroup_memory={0: 128})
    fault = only(run)
    assert (fault.kind, fault.address_space, fault.buffer) == ("out-of-bounds-read", "threadgroup", 0)
    assert (fault.offset, fault.size, fault.line) == (4 * (8 + by), 4 if checked else None, line_of("tile"))
    assert (fault.thread, fault.threadgroup) == ((8, 0, 0), (1, 0, 0))


@MODES
@pytest.mark.parametrize("by", [1 << 43, -(1 << 41)])
def test_a_buffer_that_is_guessed_is_called_a_guess(checked: bool, by: int) -> None:
    out = np.zeros(N, np.float32)
    run = launch(checked, "writes", {0: np.ones(N, np.float32), 1: out, 2: np.int64(by)})
    fault = only(run)
    assert (fault.kind, fault.buffer, fault.offset) == ("out-of-bounds-write", 1, 4 * (40 + by))
    assert (fault.size, fault.line) == (4 if checked else None, line_of("write"))
    assert fault.message.endswith("far from every buffer, so this is a guess")
    assert not run.completed
    assert not out.any(), "the run ended there, so arrays are left as they were"
    assert launch(checked, "writes", {0: np.ones(N, np.float32), 1: out, 2: np.int64(0)}).faults == ()


def test_an_address_that_no_processor_has_is_known_to_the_checkers() -> None:
    run = launch(True, "writes", {0: np.ones(N, np.float32), 1: np.zeros(N, np.float32), 2: np.int64(1 << 60)})
    fault = only(run)
    assert (fault.kind, fault.size, fault.line) == ("out-of-bounds-write", 4, line_of("write"))


@MODES
def test_a_read_does_not_hide_the_write_to_the_same_place(checked: bool) -> None:
    run = launch(checked, "both", {0: np.zeros(N, np.float32), 1: np.int64(1 << 20)}, threads=1, threadgroups=1)
    assert [(fault.kind, fault.line) for fault in run.faults] == [
        ("out-of-bounds-read", line_of("first")),
        ("out-of-bounds-write", line_of("second")),
    ]


@MODES
def test_the_next_launch_finds_the_same_faults_again(checked: bool) -> None:
    for _ in range(3):
        run = launch(checked, "both", {0: np.zeros(N, np.float32), 1: np.int64(1 << 20)}, threads=1, threadgroups=1)
        assert len(run.faults) == 2


@MODES
def test_a_kernel_that_is_everywhere_is_ended(checked: bool) -> None:
    run = launch(checked, "everywhere", {0: np.zeros(N, np.float32), 1: np.uint32(5000)}, threads=1, threadgroups=1)
    assert [fault.kind for fault in run.faults] == ["out-of-bounds-write", "crash"]
    assert run.faults[0].offset == 4 << 19
    assert "more memory outside its buffers" in run.faults[1].message
    assert not run.completed


@MODES
def test_atomics_far_outside(checked: bool) -> None:
    fault = only(launch(checked, "adds", {0: np.zeros(N, np.uint32), 1: np.uint32(1 << 28)}))
    assert (fault.kind, fault.buffer, fault.offset, fault.line) == ("out-of-bounds-write", 0, GiB, line_of("add"))


@MODES
def test_copies_of_structs_far_outside(checked: bool) -> None:
    data, out = np.ones((4, 16), np.float32), np.zeros((N, 16), np.float32)
    fault = only(launch(checked, "copies", {0: data, 1: out, 2: np.int32(1 << 20)}))
    assert (fault.kind, fault.buffer, fault.line) == ("out-of-bounds-read", 0, line_of("copy"))
    assert fault.offset is not None
    assert 64 << 20 <= fault.offset < (64 << 20) + 64


@MODES
def test_threadgroups_side_by_side_report_one_fault_and_all_go_on(checked: bool) -> None:
    many = 64 * N
    data, out = np.ones(many, np.float32), np.zeros(many, np.float32)
    run = launch(checked, "reads", {0: data, 1: out, 2: np.int64(1 << 30)}, threadgroups=many // 32)
    assert only(run).offset == 4 * (40 + (1 << 30))
    assert np.isnan(out[40])
    assert np.array_equal(np.delete(out, 40), np.ones(many - 1))
