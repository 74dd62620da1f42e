"""A forked child has a worker of its own, and leaves the parent's alone."""

import multiprocessing
import sys
from typing import Any

import numpy as np
import pytest

from engine.metal.errors import CompileError, MetalError
from engine.metal.library import compile

DOUBLE = "kernel void twice(device float *x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] = 2 * x[i]; }"
_kernel: Any = None


def launched(value: int) -> list[float]:
    x = np.full(8, value, np.float32)
    run = _kernel.launch({0: x}, threadgroups=1, threads=8)
    return [] if run.faults else x.tolist()


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS frameworks forbid work in a forked child")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_children_and_parent_launch_side_by_side() -> None:
    global _kernel
    _kernel = compile(DOUBLE)["twice"]
    assert launched(1) == [2.0] * 8
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pending = pool.map_async(launched, range(60))
        own = [launched(value) for value in range(60)]
        children = pending.get(timeout=60)
    assert own == children == [[2.0 * value] * 8 for value in range(60)]
    assert launched(3) == [6.0] * 8, "the children's end is not the end of the parent's worker"


def test_overloads_that_differ_by_address_space_alone_must_say_the_same() -> None:
    same = """
        inline float first(device const float *p) { return p[0]; }
        inline float first(threadgroup const float *p) { return p[0]; }
        kernel void k(device float *x [[buffer(0)]]) { x[0] = first(x); }"""
    assert compile(same)["k"].name == "k"
    with pytest.raises(CompileError, match=r"first differs from an earlier overload by address space alone") as refused:
        compile(
            same.replace("threadgroup const float *p) { return p[0]; }", "threadgroup const float *p) { return 2; }")
        )["k"]
    assert refused.value.line == 3


def test_a_constant_may_be_asked_about_in_a_constant_of_its_own() -> None:
    source = """
        constant short blk [[function_constant(7)]];
        constant bool use = is_function_constant_defined(blk);
        constant short B = use ? blk : 3;
        kernel void k(device float *x [[buffer(0)]]) { x[0] = B; }"""
    for constants, value in (({}, 3.0), ({7: 5}, 5.0)):
        x = np.zeros(1, np.float32)
        compile(source, constants=constants)["k"].launch({0: x}, threadgroups=1, threads=1)
        assert x[0] == value


def test_a_null_pointer_is_named_at_its_line() -> None:
    source = """
        kernel void k(device float *x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
            device float *p = nullptr;
            if (i == 3) { p[0] = x[i]; }
        }"""
    for checked in (False, True):
        run = compile(source, checked=checked)["k"].launch({0: np.zeros(8, np.float32)}, threadgroups=1, threads=8)
        (fault,) = run.faults
        assert (fault.kind, fault.thread, fault.line) == ("crash", (3, 0, 0), 4)


def test_a_cache_that_cannot_be_written_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_CACHE", "/dev/null/cache")
    with pytest.raises(MetalError, match="ASSAY_CACHE"):
        compile("kernel void never_compiled_before(device float *x [[buffer(0)]]) { x[0] = 41; }")[
            "never_compiled_before"
        ]


@pytest.mark.parametrize("threads", [64.0, "64", (1, 2.5), ()])
def test_sizes_that_are_no_whole_numbers_are_refused(threads: Any) -> None:
    with pytest.raises(MetalError, match="positive integers"):
        compile(DOUBLE)["twice"].launch({0: np.zeros(8, np.float32)}, threadgroups=1, threads=threads)
