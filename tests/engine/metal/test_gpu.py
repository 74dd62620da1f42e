"""engine.metal.gpu against a stand-in for PyObjC's Metal: what it asks of the framework. Not a test of a GPU."""

import platform
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from engine.metal import gpu
from engine.metal.errors import MetalError
from engine.metal.library import Kernel, compile
from tests.engine.metal import fake_metal
from tests.engine.metal.test_devices import CONSTANTS, SOURCE


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Puts the stand-in in place; the selectors whose metadata is registered."""
    found: list[bytes] = []
    objc = SimpleNamespace(registerMetaDataForSelector=lambda cls, selector, metadata: found.append(selector))
    monkeypatch.setitem(sys.modules, "Metal", fake_metal.module())
    monkeypatch.setitem(sys.modules, "objc", objc)
    monkeypatch.setattr(gpu, "unavailable", lambda: "")
    return found


@pytest.fixture
def copy(registered: list[bytes]) -> Kernel:
    return compile(SOURCE, device="gpu", constants=CONSTANTS)["copy"]


X, ARGS = np.arange(32, dtype=np.float32), struct.pack("if", 32, 2.0)


def test_a_launch(copy: Kernel) -> None:
    out = np.zeros(32, np.float32)
    run = copy.launch({0: X, 1: out, 2: ARGS}, threadgroups=1, threads=32)
    np.testing.assert_array_equal(out, 2 * X)
    assert (run.device, run.faults, run.stats.seconds) == ("gpu (a fake)", (), 0.5)


def test_function_constants_have_their_types(registered: list[bytes]) -> None:
    lib = compile(SOURCE, device="gpu", constants=CONSTANTS)
    data, out = np.arange(32, dtype=np.int32), np.zeros(8, np.float32)
    lib["specialised"].launch({0: data}, threadgroups=1, threads=32)
    np.testing.assert_array_equal(data, -(np.arange(32) + 7))
    lib["dotted"].launch({0: X, 1: out}, threadgroups=1, threads=8)
    np.testing.assert_array_equal(out, X.reshape(8, 4) @ np.array([1, 2, 3, 4], np.float32))
    assert registered == [b"setConstantValue:type:atIndex:"]


def test_outputs_grids_and_threadgroup_memory(registered: list[bytes]) -> None:
    lib = compile(SOURCE, device="gpu", constants=CONSTANTS)
    out, sums = np.zeros((5, 7), np.uint32), np.zeros(1, np.float32)
    lib["place"].launch({0: out}, grid=(7, 5), threads=(4, 4))
    np.testing.assert_array_equal(out, np.arange(5)[:, None] * 1000 + np.arange(7))
    lib["group_sum"].launch({0: X, 1: sums}, threadgroups=1, threads=32, threadgroup_memory={0: 130}, outputs=(1,))
    assert sums[0] == X.sum()
    lib["untouched"].launch({0: sums}, threadgroups=1, threads=1, outputs=(0,))
    assert np.isnan(sums[0])


def test_one_array_at_two_indices_is_one_buffer(registered: list[bytes]) -> None:
    both = np.arange(32, dtype=np.float32)
    compile(SOURCE, device="gpu")["copy"].launch({0: both, 1: both, 2: ARGS}, threadgroups=1, threads=32)
    np.testing.assert_array_equal(both, 2 * X)


def test_arrays_that_overlap_are_one_buffer_at_two_offsets(registered: list[bytes]) -> None:
    both = np.arange(64, dtype=np.float32)
    compile(SOURCE, device="gpu")["copy"].launch({0: both[:40], 1: both[32:], 2: ARGS}, threadgroups=1, threads=32)
    np.testing.assert_array_equal(both[32:], 2 * X)
    np.testing.assert_array_equal(both[:32], X)


def test_missing_buffers_are_named(copy: Kernel) -> None:
    with pytest.raises(MetalError, match=r"copy: nothing is bound to buffer\(1\)"):
        copy.launch({0: X, 2: ARGS}, threadgroups=1, threads=32)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"ends": fake_metal.Failure("page fault", 3)}, "crash", "page fault"),
        ({"ends": fake_metal.Failure("too long", fake_metal.ERROR_TIMEOUT)}, "timeout", "too long"),
        ({"hangs": True}, "timeout", "not done after 0.01 s"),
    ],
)
def test_a_failed_command_buffer_is_a_fault(
    copy: Kernel, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], kind: str, words: str
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(fake_metal.Command, name, value)
    out = np.full(32, 5, np.float32)
    run = copy.launch({0: X, 1: out, 2: ARGS}, threadgroups=1, threads=32, timeout=0.01)
    assert [fault.kind for fault in run.faults] == [kind]
    assert words in run.faults[0].message
    assert (out == 5).all()


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ({"threads": 544}, "544.*at most 512 threads"),
        ({"threads": 32, "schedule_seed": 1}, "schedule_seed"),
        ({"threads": 32, "outputs": (0,)}, "outputs"),
    ],
)
def test_what_it_cannot_launch(copy: Kernel, launch: dict[str, object], words: str) -> None:
    with pytest.raises(MetalError, match=words):
        copy.launch({0: X, 1: np.zeros(32, np.float32), 2: ARGS}, threadgroups=1, **launch)  # type: ignore[arg-type]


def test_reasons_for_having_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert "needs macOS" in gpu.unavailable()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert "pip install 'assay[gpu]'" in gpu.unavailable()
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "Metal", SimpleNamespace(MTLCreateSystemDefaultDevice=lambda: None))
    assert "finds no GPU" in gpu.unavailable()
    monkeypatch.setitem(sys.modules, "Metal", fake_metal.module())
    assert gpu.unavailable() == ""
