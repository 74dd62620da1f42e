"""Time limits, interrupts and ends: no launch leaves a process, a file, memory or a descriptor behind."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.metal.library import Kernel, Library, compile

SOURCE = """
kernel void twice(device float* x, uint i [[thread_position_in_grid]]) { x[i] *= 2; }
kernel void forever(device int* p) { while (p[0] == 0) p[1] += 1; }
"""
ROOT = Path(__file__).parents[3]
LINUX = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors and sizes are read from /proc")


@pytest.fixture
def lib() -> Iterator[Library]:
    library = compile(SOURCE)
    library.build(library.kernels)
    yield library
    library.close()


def doubles(kernel: Kernel, value: float = 3.0) -> bool:
    x = np.full(8, value, np.float32)
    run = kernel.launch({0: x}, threadgroups=1, threads=8)
    return run.faults == () and bool((x == 2 * value).all())


def wait_until(met: object, seconds: float = 10.0) -> None:
    limit = time.monotonic() + seconds
    while not met():  # type: ignore[operator]
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.01)


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")  # of a zombie: ended, but whoever adopted it has not asked yet
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def worker_of(lib: Library) -> int:
    assert lib._running is not None
    return lib._running._process.pid


@pytest.mark.parametrize("limit", [0.1, 1.2])
def test_a_kernel_that_never_ends_is_stopped_in_time(lib: Library, limit: float) -> None:
    p = np.zeros(2, np.int32)
    began = time.perf_counter()
    run = lib["forever"].launch({0: p}, threads=1, threadgroups=1, timeout=limit)
    assert limit <= time.perf_counter() - began < limit + 5  # reading the lines of the fault takes a second at first
    assert [fault.kind for fault in run.faults] == ["timeout"]
    assert not run.completed
    assert not p.any()
    assert doubles(lib["twice"])


def test_a_worker_that_does_not_stop_itself_is_killed(lib: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.metal.worker.GRACE_SECONDS", 0.1)
    assert doubles(lib["twice"])
    os.kill(worker_of(lib), signal.SIGSTOP)
    run = lib["forever"].launch({0: np.zeros(2, np.int32)}, threads=1, threadgroups=1, timeout=0.1)
    assert [fault.kind for fault in run.faults] == ["timeout"]
    assert doubles(lib["twice"])


def test_an_interrupt_ends_the_launch_and_leaves_no_worker(lib: Library) -> None:
    assert doubles(lib["twice"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    pid = worker_of(lib)
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    p = np.zeros(2, np.int32)
    with pytest.raises(KeyboardInterrupt):
        lib["forever"].launch({0: p}, threads=1, threadgroups=1, timeout=30)
    signal.signal(signal.SIGINT, before)
    assert ended(pid)
    assert not p.any()
    assert doubles(lib["twice"])
    assert doubles(lib["twice"], 5)


def test_an_interrupt_from_a_terminal_does_not_reach_the_worker(lib: Library) -> None:
    assert doubles(lib["twice"])
    assert os.getpgid(worker_of(lib)) != os.getpgid(0)


def test_a_worker_killed_during_a_launch_is_a_crash(lib: Library) -> None:
    assert doubles(lib["twice"])
    threading.Timer(0.2, lambda pid: os.kill(pid, signal.SIGKILL), [worker_of(lib)]).start()
    p = np.zeros(2, np.int32)
    run = lib["forever"].launch({0: p}, threads=1, threadgroups=1, timeout=30)
    assert [fault.kind for fault in run.faults] == ["crash"]
    assert "the worker ended" in run.faults[0].message
    assert doubles(lib["twice"])


def test_a_worker_killed_between_launches_is_replaced(lib: Library) -> None:
    assert doubles(lib["twice"])
    pid = worker_of(lib)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ended(pid))
    assert doubles(lib["twice"]), "no launch of ours has crashed"


def test_launches_on_other_threads(lib: Library) -> None:
    done: list[bool] = []
    threads = [threading.Thread(target=lambda: done.extend(doubles(lib["twice"]) for _ in range(20))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [True] * 60
    assert doubles(lib["twice"]), "the thread that started the worker has ended"


# The program has one launch behind it (and one that would never end before it, if it is to be killed in the middle).
PROGRAM = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import numpy as np
from engine.metal.library import compile
from tests.engine.metal.test_core_lifetime import SOURCE
lib = compile(SOURCE)
lib["twice"].launch({0: np.zeros(8, np.float32)}, threadgroups=1, threads=8)
print(lib._running._process.pid, flush=True)
if sys.argv[2] == "exit":
    sys.exit(3)
if sys.argv[2] == "raise":
    raise RuntimeError
if sys.argv[2] == "wait":
    lib["forever"].launch({0: np.zeros(2, np.int32)}, threads=1, threadgroups=1, timeout=60)
"""


def left_in(*folders: Path) -> set[Path]:
    return {path for folder in folders if folder.is_dir() for path in folder.iterdir()}


@pytest.mark.parametrize("way", ["end", "exit", "raise", "wait"])
def test_nothing_is_left_when_the_caller_ends(way: str, tmp_path: Path) -> None:
    watched = [Path("/dev/shm"), tmp_path]
    before = left_in(*watched)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(ROOT), way], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    if way == "wait":
        time.sleep(0.2)
        process.kill()
    process.wait(20)
    process.stdout.close()
    wait_until(lambda: ended(pid), 5)
    assert not {path for path in left_in(*watched) - before if path.parent == tmp_path or "assay" in path.name}


@LINUX
def test_memory_does_not_grow(lib: Library) -> None:
    def resident(pid: int | str) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    sizes = [np.zeros(n, np.float32) for n in (8, 4000, 70_000)]

    def some() -> None:
        for turn in range(200):
            lib["twice"].launch({0: sizes[turn % 3]}, threadgroups=1, threads=8)

    some()
    worker = worker_of(lib)
    before = resident("self"), resident(worker)
    some()
    some()
    assert worker_of(lib) == worker
    # 400 launches of up to 280 kB each; what a launch leaves would have to stay below 2 kB.
    assert resident("self") - before[0] < 800_000
    assert resident(worker) - before[1] < 800_000


SHORT_OF_SPACE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from engine.metal.library import compile
text = "kernel void far(device int* p, constant int& n, uint i [[thread_position_in_grid]]) { p[i == 3 ? n : i] = 1; }"
kernels = [compile(text, checked=checked)["far"] for checked in (False, True)]
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
for kernel in kernels:
    p = np.zeros(8, np.int32)
    assert kernel.launch({0: p, 1: np.int32(5)}, threads=8, threadgroups=1).stats.threadgroups == 1
    assert p.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    (fault,) = kernel.launch({0: p, 1: np.int32(1 << 17)}, threads=8, threadgroups=1).faults
    assert (fault.kind, fault.buffer, fault.offset) == ("out-of-bounds-write", 0, 4 << 17), fault
"""


@LINUX
def test_where_address_space_is_short_the_gaps_are_narrower() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_SPACE, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@LINUX
def test_descriptors_do_not_grow() -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def crashes(library: Library) -> None:
        for _ in range(5):
            library["forever"].launch({0: np.zeros(2, np.int32)}, threads=1, threadgroups=1, timeout=0.01)

    library = compile(SOURCE)
    crashes(library)
    gc.collect()
    before = descriptors()
    crashes(library)
    assert descriptors() <= before
    del library
    for turn in range(6):
        other = compile(SOURCE, defines={"TURN": turn % 2})
        assert doubles(other["twice"])
        del other
    gc.collect()  # a library and its kernels know each other
    assert descriptors() <= before


@LINUX
def test_two_hundred_compiles_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # What compiling does around the compiler, which would take half a second each time: it is given an object to copy.
    from engine.metal import compiler

    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("ASSAY_CACHE", folder)
        compiler._empty_headers.cache_clear()
        ready = compile(SOURCE)["twice"]._compiled.module.read_bytes()
        start = compiler._start

        def copied(words: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
            if "-E" in words:
                return start(words, text)
            Path(words[-1]).write_bytes(ready)
            return subprocess.CompletedProcess(words, 0, "", "")

        monkeypatch.setattr(compiler, "_start", copied)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for turn in range(200):
            compiler.module(f"int made_{turn};", checked=False)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        assert len(list(Path(folder).glob("*.so"))) == 201
        assert not list(Path(folder).glob("making-*"))
    compiler._empty_headers.cache_clear()
