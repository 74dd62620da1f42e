"""A candidate may end or hang the process it runs in; then an audit must not look like a pass, or like nothing.

The command forks: the child does everything, and says on a pipe what it is at; the parent only watches. A child that
ends without having said that it is done, or says nothing for long, was ended by the candidate.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from typing import NoReturn

SILENCE = 300.0  # seconds without a new case after which the candidate is taken to hang
DONE = "done"
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child is interrupted too, and says so
    _wait(child, reading)


def note(text: str) -> None:
    """Tell the watching parent, if there is one, what is being done."""
    if _pipe is not None:
        os.write(_pipe, text.replace("\n", " ").encode(errors="replace")[:500] + b"\n")


def _wait(child: int, reading: int) -> NoReturn:
    last, rest = "its start", b""
    while True:
        ready, _, _ = select.select([reading], [], [], SILENCE)
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            print(f"assay: FAIL: the candidate has not come back for {SILENCE:g} s, at {last}", file=sys.stderr)
            os._exit(1)
        data = os.read(reading, 65536)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        last = lines[-1].decode(errors="replace") if lines else last
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if last == DONE or code in (
        2,
        130,
        141,
    ):  # the child's own ends: a report, a complaint, an interrupt, a closed pipe
        os._exit(code)
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    print(f"assay: FAIL: the candidate ended the process ({how}), at {last}", file=sys.stderr)
    os._exit(1)
