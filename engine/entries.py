"""A folder of files within a budget of bytes: each whole or absent, the least recently used out first.

New bytes go to a hidden temporary file, are flushed to the disk, and take their name by one rename; then the folder is
flushed. Whoever changes the folder holds flock(2) on its lock file, which the kernel releases when the holder dies: a
killed writer leaves at most a temporary file, and the next writer sweeps it. Readers take no lock: a file that they
have open stays whole, even evicted. The folder itself is all the state, so that several processes may share it.

A file's time of last use is its modification time. Files of other names are left alone and don't count.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LOCK = ".lock"


class Entries:
    """The files of `folder` whose names match `pattern`, together at most `max_bytes` on disk."""

    def __init__(self, folder: str | Path, *, pattern: str, max_bytes: int) -> None:
        """Makes the folder if there is none; raises ValueError if it can't be made or written."""
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}; at least 1 is expected")
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._name = re.compile(pattern)
        self._temporary = re.compile(rf"\.(?:{pattern})\.[0-9a-f]{{16}}\.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._sweep()
        except OSError as error:
            why = error.strerror or error
            raise ValueError(
                f"{self.folder}: no store can be there ({why}); name a folder that can be written"
            ) from error

    def names(self) -> list[str]:
        """The entries' names, whatever is in them."""
        try:
            return [name for name in os.listdir(self.folder) if self._name.fullmatch(name)]  # noqa: PTH208 - names alone
        except OSError:
            return []

    @property
    def nbytes(self) -> int:
        """The real size of all entries, in bytes."""
        return sum(size for _, _, size in self._used())

    def open(self, name: str) -> BinaryIO | None:
        """The entry for reading; None when it's absent, unreadable or no regular file."""
        try:
            # Without blocking: a pipe of that name would wait for its writer.
            fd = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            return None
        return os.fdopen(fd, "rb")

    def touch(self, file: BinaryIO) -> None:
        """Note that the open entry was used now."""
        with contextlib.suppress(OSError):
            os.utime(file.fileno(), ns=(time.time_ns(),) * 2)

    def write(self, name: str, data: bytes) -> bool:
        """Make `data` the entry `name`, after evicting what must go for it; False when it wasn't written.

        More than max_bytes is refused and evicts nothing. The entry itself is never its own victim: it isn't there yet.
        """
        if len(data) > self.max_bytes:
            return False
        temporary = self.folder / f".{name}.{secrets.token_hex(8)}.tmp"
        try:
            with self._locked():
                self._sweep()
                self._evict(len(data), replacing=name)
                try:
                    _write_through(temporary, data)
                    temporary.replace(self.folder / name)
                    _flush(self.folder)
                finally:
                    temporary.unlink(missing_ok=True)
        except OSError:
            return False
        return True

    def remove(self, name: str, is_it: Callable[[BinaryIO], bool]) -> bool:
        """Remove the entry `name` if `is_it` says so of the file that has the name now; whether it was removed."""
        try:
            with self._locked():
                file = self.open(name)
                if file is None:
                    return False
                with file:
                    if not is_it(file):
                        return False
                (self.folder / name).unlink(missing_ok=True)
                return True
        except OSError:
            return False

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _used(self) -> list[tuple[int, str, int]]:
        """(time of last use, name, bytes) of every entry that is a file."""
        found = []
        for name in self.names():
            with contextlib.suppress(OSError):
                status = os.lstat(self.folder / name)
                if stat.S_ISREG(status.st_mode):
                    found.append((status.st_mtime_ns, name, status.st_size))
        return found

    def _evict(self, incoming: int, *, replacing: str) -> None:
        """Remove entries until `incoming` bytes fit: first the one to be replaced, then the least recently used."""
        used = sorted(self._used(), key=lambda entry: (entry[1] != replacing, *entry))
        total = sum(size for _, _, size in used)
        for _, name, size in used:
            if total + incoming <= self.max_bytes:
                return
            (self.folder / name).unlink(missing_ok=True)
            total -= size
        if total + incoming > self.max_bytes:
            raise OSError("no room")

    def _sweep(self) -> None:
        """Remove what killed writers left: while the lock is held, no live writer has a temporary file."""
        for name in os.listdir(self.folder):  # noqa: PTH208 - as above
            if self._temporary.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)


def _write_through(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        # The kernel's own stamp is coarser than `touch`'s, and could put a new entry before one used earlier.
        os.utime(file.fileno(), ns=(time.time_ns(),) * 2)
        os.fsync(file.fileno())
        if sys.platform == "darwin":  # there fsync leaves the data in the drive's cache (fsync(2) of macOS)
            with contextlib.suppress(OSError):  # not every file system has it
                fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)


def _flush(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
