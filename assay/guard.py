"""A candidate may end or hang the process it runs in; then an audit must not look like a pass, or like nothing.

The command forks: the child does everything, and says on a pipe what it is at; the parent only watches. A child that
ends without having said that it is done, or says nothing for long, was ended by the candidate.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

SILENCE = 300.0  # seconds without a new case after which the candidate is taken to hang
GRACE = 1.0  # seconds after which an interrupt that the child hasn't heard of is passed on
DONE = b"done "
_pipe: int | None = None


def watch() -> None:
    """Return in a child that does the work; the parent waits here and exits as the child did, or with 1."""
    global _pipe
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _pipe = writing
        return
    os.close(writing)
    signal.signal(signal.SIGINT, lambda *_: _pass_on(child))
    signal.signal(signal.SIGTERM, lambda *_: _terminate(child))
    _wait(child, reading)


def _pass_on(child: int) -> None:
    """Interrupt the child, and let it say so: at once by the terminal, or here if the signal was meant for one."""
    timer = threading.Timer(GRACE, lambda: _kill(child, signal.SIGINT))
    timer.daemon = True
    timer.start()


def _terminate(child: int) -> NoReturn:
    _kill(child, signal.SIGTERM)
    os._exit(128 + signal.SIGTERM)


def _kill(child: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(child, number)


def note(text: str) -> None:
    """Tell the watching parent, if there is one, what is being done."""
    _write(b"at " + text.replace("\n", " ").encode(errors="replace"))


def done(code: int) -> None:
    """Tell the watching parent, if there is one, that all is done, and the exit code that the process will have."""
    _write(DONE + str(code).encode())


def _write(data: bytes) -> None:
    if _pipe is not None:
        os.write(_pipe, data + b"\n")


def _wait(child: int, reading: int) -> NoReturn:
    last, rest = b"at its start", b""
    while True:
        ready, _, _ = select.select([reading], [], [], SILENCE)
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            _fail(f"has not come back for {SILENCE:g} s", last)
        data = os.read(reading, 65536)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        last = lines[-1] if lines else last
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if last.startswith(DONE):
        os._exit(int(last.removeprefix(DONE)))  # whatever a candidate may have done at exit
    if code == -signal.SIGINT:  # a second Ctrl-C, while the first was being said
        os._exit(128 + signal.SIGINT)
    _fail(f"ended the process ({f'signal {-code}' if code < 0 else f'exit code {code}'})", last)


def _fail(what: str, last: bytes) -> NoReturn:
    """Say what the candidate did, and at which case."""
    print(f"assay: FAIL: the candidate {what}, {last.decode(errors='replace')}", file=sys.stderr)
    os._exit(1)
