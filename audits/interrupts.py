"""Telling the user's Ctrl-C from a KeyboardInterrupt that a candidate raises, and from one that it swallows.

A handler notes each SIGINT before it raises, so that candidate code can neither end an audit as if the user had, nor
keep the user from ending it. Where the handler can't be installed (another thread, somebody else's handler), an
interrupt is taken for the user's.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_noted = False


def _note(number: int, frame: FrameType | None) -> None:
    global _noted
    _noted = True
    signal.default_int_handler(number, frame)


@contextmanager
def told_apart() -> Iterator[None]:
    """While it is open, SIGINT is noted, if Python's own handler had it till now."""
    global _noted
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _noted = False
    signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _note:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _noted = False


def by_user(error: BaseException | None) -> bool:
    """Whether the user has interrupted: a SIGINT was noted, or `error` is an interrupt that may come from one."""
    if _noted:
        return True
    return isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) not in (_note, signal.SIG_IGN)
