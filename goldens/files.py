"""Replacing a golden on disk: one writer at a time, and whole or not at all.

The new bytes go to a hidden temporary file beside the target, are flushed to the disk, and take the target's name by
one rename; the folder is flushed last, so that the rename outlives a power cut. The lock is flock(2)'s, which the
kernel releases when its holder dies: a killed writer leaves no lock behind, at most a temporary file, which the next
writer sweeps. The lock file itself stays: unlinking it would let two writers lock two different files of one name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from goldens.errors import GoldenError

_PENDING = re.compile(r"\.pending(?=(\.[^.]*)?$)")


def pending_path(path: str | Path) -> Path:
    """Where the golden that may replace `path` waits: NAME.pending.h5 beside NAME.h5."""
    path = Path(path)
    if _PENDING.search(path.name):
        raise GoldenError(f"{path}: is itself a pending golden; name the golden that it's to replace")
    return path.with_name(f"{path.stem}.pending{path.suffix}")


@contextmanager
def lock(path: str | Path) -> Iterator[None]:
    """Hold the writer's lock of golden `path` (and of its pending file) and sweep what killed writers left.

    Raises GoldenError at once, naming the holder's process id, when another writer holds it. Not re-entrant.
    """
    golden = _golden(path)
    file = golden.with_name(f"{golden.name}.lock")
    try:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise GoldenError(f"{path}: can't be locked for writing ({error.strerror}: {file})") from error
    try:
        _acquire(fd, path)
        try:
            _sweep(golden)
            yield
        finally:
            os.ftruncate(fd, 0)  # no process id of a writer that has finished
    finally:
        os.close(fd)


def replace(path: Path, data: bytes) -> None:
    """Make `data` the contents of `path`, all or nothing; the caller holds the lock. Raises GoldenError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            _flush(file.fileno())
        rename(temporary, path)
    except OSError as error:
        raise GoldenError(
            f"{path}: can't be written ({error.strerror or error}); check the disk and try again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def rename(source: Path, path: Path) -> None:
    """Give the file `source`, flushed to the disk, the name `path` in the same folder; raises OSError."""
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _flush(fd)
    finally:
        os.close(fd)
    source.replace(path)
    fd = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _golden(path: str | Path) -> Path:
    path = Path(path)
    return path.with_name(_PENDING.sub("", path.name))


def _acquire(fd: int, path: str | Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 20, 0).decode(errors="replace").strip()
        who = f"process {holder}" if holder else "another process"
        raise GoldenError(f"{path}: {who} is writing it; wait until it has finished, or stop it") from None
    except OSError as error:
        raise GoldenError(f"{path}: can't be locked for writing ({error.strerror}); use a local disk") from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)


def _sweep(golden: Path) -> None:
    """Remove the temporary files of writers that were killed: while the lock is held, no live writer has any."""
    names = "|".join(re.escape(path.name) for path in (golden, pending_path(golden)))
    stale = re.compile(rf"\.({names})\.[0-9a-f]{{16}}\.tmp")
    for file in golden.parent.iterdir():
        if stale.fullmatch(file.name):
            file.unlink(missing_ok=True)


def _flush(fd: int) -> None:
    os.fsync(fd)
    if sys.platform == "darwin":  # there fsync leaves the data in the drive's cache (fsync(2) of macOS)
        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
