"""What the runtime itself reports in checked mode, and what becomes of worker processes and the cache."""

import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from engine.metal import compiler
from engine.metal.errors import MetalError
from engine.metal.library import Library, compile

SOURCE = """
#include <metal_stdlib>
using namespace metal;
kernel void early(device int* p, constant int& n, ushort i [[thread_position_in_threadgroup]]) {
  if (i >= n) return;
  threadgroup_barrier(mem_flags::mem_none);
  p[i] = i;
}
kernel void half_fence(device int* p, ushort i [[thread_index_in_simdgroup]]) {
  if (i < 16)
    simdgroup_barrier(mem_flags::mem_none);
  p[i] = i;
}
kernel void unwritten(device float* p, ushort i [[thread_position_in_threadgroup]]) {
  threadgroup float first[8], second[8];
  first[i] = 1;
  p[i] = first[i] + second[i];
}
kernel void copy(device const float* in, constant float* scale, device float* out,
    threadgroup float* t [[threadgroup(0)]], ushort i [[thread_position_in_threadgroup]]) {
  t[i] = in[i] * scale[0];
  out[i] = t[i];
}
kernel void past(device int* p, ushort i [[thread_position_in_threadgroup]]) { p[i + 2] = i; }
"""


def line_of(text: str) -> int:
    return SOURCE[: SOURCE.index(text)].count("\n") + 1


@pytest.fixture(scope="module")
def lib() -> Iterator[Library]:
    library = compile(SOURCE, checked=True)
    library.build(library.kernels)
    yield library
    library.close()


def test_a_barrier_that_some_threads_never_reach(lib: Library) -> None:
    p = np.zeros(64, np.int32)
    assert lib["early"].launch({0: p, 1: np.int32(64)}, threadgroups=1, threads=64).faults == ()
    (fault,) = lib["early"].launch({0: p, 1: np.int32(50)}, threadgroups=1, threads=64).faults
    assert (fault.kind, fault.line, fault.other_thread) == (
        "barrier-divergence",
        line_of("threadgroup_barrier"),
        (50, 0, 0),
    )
    assert "thread (50, 0, 0) has ended" in fault.message


def test_an_operation_that_needs_every_lane(lib: Library) -> None:
    (fault,) = lib["half_fence"].launch({0: np.zeros(32, np.int32)}, threadgroups=1, threads=32).faults
    assert (fault.kind, fault.line) == ("simdgroup-divergence", line_of("simdgroup_barrier"))
    assert fault.other_thread is not None
    assert fault.other_thread[0] >= 16


def test_memory_declared_in_a_body_is_named(lib: Library) -> None:
    (fault,) = lib["unwritten"].launch({0: np.zeros(8, np.float32)}, threadgroups=1, threads=8).faults
    assert (fault.kind, fault.buffer, fault.variable, fault.line) == (
        "uninitialised-read",
        None,
        "second",
        line_of("p[i] = first"),
    )
    assert "second" in fault.message
    assert fault.message.startswith(f"unwritten, program_source:{fault.line}: ")


def test_loads_and_stores_are_counted(lib: Library) -> None:
    x, y = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    buffers = {0: x, 1: np.float32(2), 2: y}
    run = lib["copy"].launch(buffers, threadgroups=1, threads=32, threadgroup_memory={0: 128})
    assert run.faults == ()
    assert run.stats.stores == {"device": 32, "constant": 0, "threadgroup": 32}
    assert sum(run.stats.loads.values()) in (64, 96)  # the optimiser may keep t[i] in a register
    np.testing.assert_array_equal(y, 2 * x)


def test_what_a_checker_saw_is_not_reported_again_by_the_guard_gap(lib: Library) -> None:
    (fault,) = lib["past"].launch({0: np.zeros(4, np.int32)}, threadgroups=1, threads=4).faults
    assert (fault.kind, fault.buffer, fault.offset, fault.line) == (
        "out-of-bounds-write",
        0,
        16,
        line_of("kernel void past"),
    )


def test_closing_or_forgetting_a_library_ends_its_process() -> None:
    library = compile(SOURCE)
    library["past"].launch({0: np.zeros(8, np.int32)}, threadgroups=1, threads=4)
    assert library._running is not None
    process = library._running._process
    library.close()
    assert process.poll() is not None
    library["past"].launch({0: np.zeros(8, np.int32)}, threadgroups=1, threads=4)
    process = library._running._process
    assert process.poll() is None
    del library
    gc.collect()
    assert process.poll() is not None


def test_a_worker_does_not_outlive_its_caller() -> None:
    code = (
        "import os, sys\nsys.path.insert(0, sys.argv[1])\nimport numpy as np\n"
        "from engine.metal.library import compile\n"
        "from tests.engine.metal.test_core_checked import SOURCE\nlib = compile(SOURCE)\n"
        "lib['past'].launch({0: np.zeros(8, np.int32)}, threadgroups=1, threads=4)\n"
        "print(lib._running._process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    root = str(Path(__file__).parents[3])
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return  # ended; whoever adopted it has not asked yet
        time.sleep(0.01)
    pytest.fail(f"worker {pid} still runs")


def test_the_cache_is_keyed_by_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []
    run = compiler._run

    def watched(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        asked.append(tuple(arguments))
        return run(arguments)

    monkeypatch.setattr(compiler, "_run", watched)
    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path))
    compiler._empty_headers.cache_clear()
    text = "kernel void f(device int* p) { p[0] = N; }"
    try:
        for value, compiles in ((1, 1), (1, 0), (2, 1), (1, 0)):
            asked.clear()
            library = compile(text, defines={"N": value})
            library["f"]
            assert sum("-c" in arguments for arguments in asked) == compiles
    finally:
        compiler._empty_headers.cache_clear()
    assert len(list(tmp_path.glob("*.so"))) == 2
    assert not list(tmp_path.glob("making-*"))


def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASSAY_CXX", raising=False)
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    with pytest.raises(MetalError, match="pip install ziglang"):
        compile(SOURCE)


def test_the_cache_of_another_checkout_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its modules name the shim's files by another path, so that faults inside the shim would count as the user's."""
    here = compiler._key("text")
    monkeypatch.setattr(compiler, "HOST", tmp_path / "host")
    shutil.copytree(Path(compiler.__file__).parent / "host", tmp_path / "host")
    compiler._host_text.cache_clear()
    try:
        assert compiler._key("text") != here
    finally:
        monkeypatch.undo()
        compiler._host_text.cache_clear()
    assert compiler._key("text") == here
