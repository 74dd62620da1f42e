"""A writer killed at any moment (SIGKILL: no handler, no cleanup) never loses or breaks an accepted golden.

A server process, which has imported everything, forks the writers that are killed: at random moments while they stage
and accept one golden after another, and at every single line of the code that touches files. A writer says which golden
it has accepted; after its death exactly that one must be there, or the next.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from goldens import store, workflow
from goldens.trace import Trace

KILLS = 120
SERVER = """
import os, signal, sys
import numpy as np
from goldens import files, store, workflow
from goldens.trace import Trace

def traces(number):
    values = np.random.default_rng(number).standard_normal((4, 64)).astype(np.float32)
    tokens = np.full(4, number, np.int32)
    return [Trace(case=case, tokens=tokens, probes={"logits": values}, provenance={"seed": number}) for case in "ab"]

def cycle(path, number):
    workflow.stage(path, traces(number))
    workflow.accept(path)
    os.write(1, f"accepted {number}\\n".encode())

def die_at(line):
    seen = 0
    def trace(frame, event, _):
        nonlocal seen
        if frame.f_code.co_filename not in (files.__file__, workflow.__file__):
            return None
        seen += event == "line"
        if seen == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)

for request in sys.stdin:
    path, number, line = request.split()
    pid = os.fork()
    if pid == 0:
        number = int(number)
        if int(line):
            die_at(int(line))
            cycle(path, number)
            os._exit(0)
        while True:
            cycle(path, number)
            number += 1
    os.write(1, f"writer {pid}\\n".encode())
    _, status = os.waitpid(pid, 0)
    os.write(1, f"died {status}\\n".encode())
"""


class Server:
    """Starts one writer at a time, and keeps what the last one said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.accepted = 0
        self.writer = 0

    def _line(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def start(self, path: Path, number: int, line: int = 0) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{path} {number} {line}\n")
        self.process.stdin.flush()
        self.writer = 0
        while not self.writer:
            self._heard()

    def wait(self) -> int:
        """The status with which the writer died; `accepted` is then the last golden that it had accepted."""
        while (status := self._heard()) is None:
            pass
        return status

    def _heard(self) -> int | None:
        word, number = self._line()
        if word == "died":
            return int(number)
        if word == "writer":
            self.writer = int(number)
        else:
            self.accepted = int(number)
        return None


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=Path(store.__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Server(process)


def number(path: Path) -> int:
    """Which golden is at `path`; it must open, and hold what the writer of that number meant to store."""
    golden = store.open(path)
    found = int(golden.trace.tokens[0])
    expected = np.random.default_rng(found).standard_normal((4, 64)).astype(np.float32)
    assert list(golden.cases) == ["a", "b"]
    assert all((case.probes["logits"] == expected).all() for case in golden.cases.values())
    return found


def left(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir()} - {path.name, f"{path.name}.lock"}


def first(path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    tokens = np.zeros(4, np.int32)
    store.write(path, [Trace(case=case, tokens=tokens, probes={"logits": values}) for case in "ab"])


def test_a_hundred_kills_at_random_moments(tmp_path: Path, server: Server) -> None:
    path, rng = tmp_path / "g.h5", random.Random(7)
    first(path)
    accepted, interrupted = 0, 0
    for kill in range(KILLS):
        server.accepted = accepted
        server.start(path, accepted + 1)
        time.sleep(rng.uniform(0, 0.06))  # the moment is what's random here; whatever it is, the checks must hold
        os.kill(server.writer, signal.SIGKILL)
        assert server.wait() == signal.SIGKILL
        accepted = number(path)
        assert accepted in (server.accepted, server.accepted + 1), f"kill {kill}"
        if workflow.pending_path(path).exists():
            assert number(workflow.pending_path(path)) in (accepted, accepted + 1), f"kill {kill}"
        interrupted += bool(left(path))
    assert accepted > 0 and interrupted > 0, "the kills never met a writer at work"

    workflow.stage(path, [store.open(path).trace])
    workflow.accept(path)
    assert left(path) == set()


def test_a_kill_at_every_line_of_the_code_that_touches_files(tmp_path: Path, server: Server) -> None:
    path = tmp_path / "g.h5"
    first(path)
    accepted, line = 0, 0
    litter: set[str] = set()
    status = signal.SIGKILL.value
    while status == signal.SIGKILL:
        line += 1
        server.accepted = accepted
        server.start(path, accepted + 1, line)
        status = server.wait()
        accepted = number(path)
        assert accepted in (server.accepted, server.accepted + 1), f"line {line}"
        pending = workflow.pending_path(path)
        assert not pending.exists() or number(pending) in (accepted, accepted + 1), f"line {line}"
        litter |= {name.split(".")[-1] for name in left(path)}
    assert status == 0 and line > 50, "the last writer had fewer lines than its fatal one, and lived"
    assert litter == {"h5", "tmp"}, "no kill fell between a temporary file and its rename"
    assert accepted == server.accepted and left(path) == set(), "that writer swept what the killed ones had left"
