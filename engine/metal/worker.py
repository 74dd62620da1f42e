"""The caller's end of a worker process: shared memory for the data, a pipe for commands, and what to do when it dies.

The memory is a file without a name that both sides map: a control page (host/protocol.h, mirrored here), then the
buffers with guard gaps. A launch is one byte over a pipe each way; nothing is copied but the arrays themselves.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

from engine.metal.errors import MetalError

CONTROL_BYTES = 192 * 1024
PAGE = mmap.PAGESIZE
GAP_BYTES = max(8 * 1024, PAGE)
MOST_BUFFERS = 31
MOST_FAULTS = 256
FRAMES = 12
PROTOCOL = 2
FLAG_POISON, FLAG_SEEDED, FLAG_FRESH_LAYOUT = 1, 2, 4
# The worker's exit code when the control page has the fault that ended it (host/worker.h).
_REPORTED = 70
# How much longer than the worker's own limit the caller waits: it stops itself first, and says where it was.
GRACE_SECONDS = 2.0


class Vec3(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32))


class Binding(ctypes.Structure):
    _fields_ = (
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("room", ctypes.c_uint64),
        ("owner", ctypes.c_uint32),
        ("present", ctypes.c_uint32),
        ("writable", ctypes.c_uint32),
        ("initialised", ctypes.c_uint32),
        ("constant", ctypes.c_uint32),
    )


class Counts(ctypes.Structure):
    _fields_ = (
        ("threadgroups", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
        ("matrix_ops", ctypes.c_uint64),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("loads", ctypes.c_uint64 * 3),
        ("stores", ctypes.c_uint64 * 3),
        ("nanoseconds", ctypes.c_uint64),
    )


class FaultRecord(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("space", ctypes.c_uint32),
        ("buffer", ctypes.c_int32),
        ("op", ctypes.c_int32),
        ("offset", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("bound", ctypes.c_int64),
        ("thread", ctypes.c_int32),
        ("other_thread", ctypes.c_int32),
        ("threadgroup", ctypes.c_int32),
        ("other_threadgroup", ctypes.c_int32),
        ("pcs", ctypes.c_uint64 * FRAMES),
        ("other_pcs", ctypes.c_uint64 * FRAMES),
        ("message", ctypes.c_char * 320),
    )


class Control(ctypes.Structure):
    _fields_ = (
        ("protocol", ctypes.c_uint32),
        ("kernel", ctypes.c_uint32),
        ("threadgroups", Vec3),
        ("threads", Vec3),
        ("grid", Vec3),
        ("flags", ctypes.c_uint32),
        ("host_threads", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("timeout_microseconds", ctypes.c_uint64),
        ("buffers", Binding * MOST_BUFFERS),
        ("threadgroup_memory", ctypes.c_uint32 * MOST_BUFFERS),
        ("fault_count", ctypes.c_uint32),
        ("counts", Counts),
        ("faults", FaultRecord * MOST_FAULTS),
    )


Kernels = dict[str, tuple[int, list[tuple[int, ...]]]]


def _end(process: subprocess.Popen[bytes], descriptors: list[int]) -> None:
    process.kill()
    process.wait()
    for descriptor in descriptors:
        os.close(descriptor)


def _shared_file() -> int:
    """A descriptor of a file without a name. Not in /dev/shm, whose size containers limit: a write beyond it kills."""
    if sys.platform == "linux":
        return os.memfd_create("assay-buffers")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


# Every Worker there is: two processes that use one pipe and one memory after a fork would take each other's answers.
_ALIVE: weakref.WeakSet[Worker] = weakref.WeakSet()


def _after_fork() -> None:
    for worker in list(_ALIVE):
        worker.after_fork()


os.register_at_fork(after_in_child=_after_fork)


class Worker:
    """One worker process and the memory that it shares with this one. Starts when first needed, again after a crash."""

    def __init__(self, executable: Path) -> None:
        self._executable = executable
        self._ending: weakref.finalize[..., Any] | None = None
        self._share()
        _ALIVE.add(self)

    def _share(self) -> None:
        self._file = _shared_file()
        weakref.finalize(self, os.close, self._file)
        self._memory: mmap.mmap | None = None
        self.layout: tuple[Any, ...] | None = None
        self.reserve(CONTROL_BYTES + (1 << 20))

    def after_fork(self) -> None:
        """In a forked child: leave the process and the memory to the parent, and start anew with the next launch."""
        if self._ending is not None:
            self._ending.detach()
            self._ending = None
            os.close(self._commands)
            os.close(self._answers)
        self._share()

    # ---- memory ---------------------------------------------------------------------------------------------------

    def reserve(self, size: int) -> None:
        """Have at least `size` bytes of shared memory; it only ever grows."""
        if self._memory is not None and len(self._memory) >= size:
            return
        size = max(size, 2 * len(self._memory) if self._memory is not None else 0)
        size = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        os.ftruncate(self._file, size)
        self._memory = mmap.mmap(self._file, size)
        self.control = Control.from_buffer(self._memory)
        self.layout = None

    @property
    def memory(self) -> mmap.mmap:
        assert self._memory is not None
        return self._memory

    # ---- process --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        commands_out, self._commands = os.pipe()
        self._answers, answers_in = os.pipe()
        arguments = [str(self._executable), str(self._file), str(commands_out), str(answers_in)]
        try:
            process = subprocess.Popen(
                arguments,
                pass_fds=(self._file, commands_out, answers_in),
                stdin=subprocess.DEVNULL,
                process_group=0,  # an interrupt from the terminal is the caller's to handle
            )
        except OSError as error:
            raise MetalError(f"the worker {self._executable} does not start: {error}") from None
        finally:
            os.close(commands_out)
            os.close(answers_in)
        self._process = process
        self._poll = select.poll()
        self._poll.register(self._answers, select.POLLIN)
        self._ending = weakref.finalize(self, _end, process, [self._commands, self._answers])
        self._loaded: dict[Path, Kernels] = {}
        self.layout = None

    def stop(self) -> None:
        """End the process; the next launch starts another."""
        if self._ending is not None:
            self._ending()
            self._ending = None

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = os.read(self._answers, count - len(data))
            if not more:
                raise MetalError(f"the worker ended with code {self._process.wait()} while it loaded a kernel")
            data += more
        return data

    def _ask(self, command: bytes, text: bytes) -> bytes:
        os.write(self._commands, command + struct.pack("=I", len(text)) + text)
        return self._read(struct.unpack("=I", self._read(4))[0])

    def load(self, module: Path) -> Kernels:
        """Load a module: host name → (kernel number, facts of each parameter: ParameterInfo in host/runtime.h)."""
        if self._ending is not None and self._process.poll() is not None:
            self.stop()  # somebody ended it between two launches
        if self._ending is None:
            self._start()
        if module in self._loaded:
            return self._loaded[module]
        try:
            text = self._ask(b"L", os.fsencode(module)).decode()
        except BaseException:
            self.stop()
            raise
        if text.startswith("error "):
            raise MetalError(f"the compiled kernel does not load: {text[6:]}")
        kernels: Kernels = {}
        for line in text.splitlines():
            number, name, *infos = line.split("\t")
            kernels[name] = (int(number), [tuple(map(int, info.split(":"))) for info in infos])
        self._loaded[module] = kernels
        return kernels

    def run(self, timeout: float) -> str | None:
        """Run the launch in the control page. Returns None, or how the worker ended: "timeout", "crash", or "reported"
        when the control page has the fault that ended it. Interrupted, it ends the worker with the launch."""
        try:
            return self._run(timeout)
        except BaseException:
            self.stop()
            raise

    def _run(self, timeout: float) -> str | None:
        try:
            os.write(self._commands, b"R")
        except BrokenPipeError:
            self.stop()
            return "crash"
        if not self._poll.poll((timeout + GRACE_SECONDS) * 1000):
            self.stop()
            return "timeout"
        if os.read(self._answers, 1) == b"D":
            return None
        code = self._process.wait()
        self.stop()
        return "reported" if code == _REPORTED else "timeout" if code == -signal.SIGALRM else "crash"
