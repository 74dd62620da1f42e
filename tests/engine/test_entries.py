"""The folder of entries: budget, order of eviction, and what is left after a death at any moment."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from engine.entries import LOCK, Entries

PATTERN = r"[a-z]\d*"
# Writes entries a0 … a9 over and over, each a run of one byte with its length in front, until it is killed.
WRITER = """
import itertools, sys
from engine.entries import Entries
entries = Entries(sys.argv[1], pattern=r"[a-z]\\d*", max_bytes=60_000)
for i in itertools.count():
    size = 5_000 + 37 * (i % 300)
    assert entries.write(f"a{i % 10}", size.to_bytes(8, "big") + bytes([i % 256]) * size)
    print("written", flush=True)
"""
# Dies, in a child of its own, at the n-th call that reaches the file system, for every n until a write gets through.
CRASHER = """
import os, sys
from engine.entries import Entries
folder = sys.argv[1]
entries = Entries(folder, pattern=r"[a-z]\\d*", max_bytes=250)
CALLS = {"open", "mkdir", "unlink", "replace", "rename", "fsync", "utime", "write", "close", "listdir", "lstat"}
for n in range(1, 200):
    child = os.fork()
    if child == 0:
        left = n
        def dying(call):
            def wrapped(*args, **kwargs):
                global left
                left -= 1
                if left == 0:
                    os._exit(9)
                return call(*args, **kwargs)
            return wrapped
        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        os._exit(0 if entries.write("b", b"B" * 100 if n % 2 else b"b" * 100) else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for name in entries.names():
        with entries.open(name) as file:
            data = file.read()
        assert len(data) == 100 and len(set(data)) == 1, (n, name, data)
    assert code in (0, 9), (n, code)
    again = Entries(folder, pattern=r"[a-z]\\d*", max_bytes=250)
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")], n
    assert again.write("a", b"a" * 100) and again.write("c", b"c" * 100)
    if code == 0:
        print("crashed", n - 1, "times")
        break
"""


def names(entries: Entries) -> list[str]:
    return sorted(entries.names())


def read(entries: Entries, name: str) -> bytes | None:
    file = entries.open(name)
    if file is None:
        return None
    with file:
        entries.touch(file)
        return file.read()


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def test_the_least_recently_used_go_first_and_bytes_are_real(tmp_path: Path) -> None:
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=100)
    for name in "abcd":
        assert entries.write(name, name.encode() * 25)
    assert entries.nbytes == on_disk(tmp_path) == 100
    assert read(entries, "a") == b"a" * 25
    assert entries.write("e", b"e" * 30)
    assert names(entries) == ["a", "d", "e"]
    assert entries.write("f", b"f" * 20)
    assert names(entries) == ["a", "d", "e", "f"]
    assert entries.nbytes == on_disk(tmp_path) == 100


def test_the_incoming_entry_is_never_its_own_victim(tmp_path: Path) -> None:
    """Written first and evicted after, an entry with an old clock would be the least recently used of all."""
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=100)
    for name in "ab":
        entries.write(name, b"x" * 50)
        os.utime(tmp_path / name, ns=(2**62, 2**62))
    assert entries.write("c", b"c" * 100)
    assert names(entries) == ["c"]


def test_an_oversized_entry_evicts_nothing(tmp_path: Path) -> None:
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=100)
    assert entries.write("a", b"a" * 40)
    assert entries.write("b", b"b" * 60)
    assert not entries.write("c", b"c" * 101)
    assert not entries.write("a", b"c" * 101)
    assert (read(entries, "a"), read(entries, "b")) == (b"a" * 40, b"b" * 60)


def test_an_entry_that_is_replaced_makes_room_itself(tmp_path: Path) -> None:
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=100)
    entries.write("a", b"a" * 40)
    entries.write("b", b"b" * 60)
    assert entries.write("b", b"B" * 55)
    assert (read(entries, "a"), read(entries, "b")) == (b"a" * 40, b"B" * 55)


def test_other_files_are_left_alone_and_dont_count(tmp_path: Path) -> None:
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=10)
    (tmp_path / "README").write_bytes(b"r" * 1000)
    (tmp_path / "a9x").write_bytes(b"r" * 1000)
    (tmp_path / ".other.0123456789abcdef.tmp").write_bytes(b"")
    (tmp_path / "b").mkdir()
    assert entries.write("a", b"a" * 10)
    assert not entries.write("b", b"b" * 10), "a folder has the name"
    assert entries.open("b") is None
    assert sorted(p.name for p in tmp_path.iterdir()) == [LOCK, ".other.0123456789abcdef.tmp", "README", "a9x", "b"]


def test_what_isnt_a_plain_file_is_a_miss_and_never_waits(tmp_path: Path) -> None:
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=10)
    os.mkfifo(tmp_path / "a")
    (tmp_path / "z").write_bytes(b"z")
    (tmp_path / "b").symlink_to(tmp_path / "z")
    assert [entries.open(name) for name in ("a", "b", "c")] == [None, None, None]


def test_a_reader_keeps_what_it_has_open(tmp_path: Path) -> None:
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=10)
    entries.write("a", b"a" * 10)
    file = entries.open("a")
    assert file is not None
    with file:
        entries.write("b", b"b" * 10)
        assert names(entries) == ["b"]
        assert file.read() == b"a" * 10


def test_remove_looks_at_the_file_that_is_there_now(tmp_path: Path) -> None:
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=100)
    entries.write("a", b"old")
    entries.write("a", b"new")
    entries.write("b", b"old")
    assert not entries.remove("a", lambda file: file.read() == b"old")
    assert not entries.remove("c", lambda file: True)
    assert names(entries) == ["a", "b"]
    assert entries.remove("a", lambda file: file.read() == b"new")
    assert names(entries) == ["b"]


def test_remove_looks_and_removes_in_one_go(tmp_path: Path) -> None:
    """While it looks, no writer can put a newer file under the name: the lock is taken."""
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=100)
    entries.write("a", b"old")

    def is_it(file: BinaryIO) -> bool:
        with (tmp_path / LOCK).open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True

    assert entries.remove("a", is_it)


def test_a_write_is_stamped_by_the_clock_of_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own stamp may be some milliseconds behind that clock: what was just written would be evicted first.
    Here it's years behind."""
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=100)
    entries.write("a", b"a")
    clock = itertools.count(2**61)
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    assert read(entries, "a") == b"a"
    entries.write("b", b"b")
    assert (tmp_path / "a").stat().st_mtime_ns < (tmp_path / "b").stat().st_mtime_ns


def test_a_failed_write_leaves_the_old_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=100)
    entries.write("a", b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not entries.write("a", b"new")
    assert read(entries, "a") == b"old"
    assert not list(tmp_path.glob(".*.tmp"))


def test_bytes_are_on_the_disk_before_they_have_a_name_and_the_name_before_its_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of power keeps what was flushed, and may keep any of the rest: so the order is what protects an entry."""
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=100)
    flush, flushed = os.fsync, []

    def noted(fd: int) -> None:
        status = os.fstat(fd)
        what = "folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes"
        flushed.append((what, "named" if (tmp_path / "a").exists() else "unnamed"))
        flush(fd)

    monkeypatch.setattr(os, "fsync", noted)
    assert entries.write("a", b"a" * 40)
    assert flushed == [("40 bytes", "unnamed"), ("folder", "named")]


def test_the_next_writer_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=10)
    (tmp_path / ".b7.0123456789abcdef.tmp").write_bytes(b"half")
    assert entries.write("a", b"a")
    assert sorted(p.name for p in tmp_path.iterdir()) == [LOCK, "a"]


def test_writers_at_once_stay_within_the_budget(tmp_path: Path) -> None:
    peak = []

    def write(letter: str) -> None:
        entries = Entries(tmp_path, pattern=PATTERN, max_bytes=1000)
        for i in range(30):
            assert entries.write(f"{letter}{i % 7}", letter.encode() * 290)
            peak.append(entries.nbytes)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = Entries(tmp_path, pattern=PATTERN, max_bytes=1000)
    assert max(peak) <= 1000
    for name in names(entries):
        assert read(entries, name) == name[0].encode() * 290


def test_a_writer_that_is_killed_leaves_every_entry_whole_or_absent(tmp_path: Path) -> None:
    """Two processes share the folder; both are killed, each in the middle of whatever it does."""
    rng, found = random.Random(3), set()
    for _ in range(4):
        writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE) for _ in "ab"]
        for writer in writers:
            assert writer.stdout is not None
            # The writer goes on meanwhile, so the kill falls anywhere in one of the writes that follow.
            for _ in range(rng.randint(1, 12)):
                assert writer.stdout.readline() == b"written\n"
            writer.kill()
        for writer in writers:
            with writer:
                writer.wait()
        entries = Entries(tmp_path, pattern=PATTERN, max_bytes=60_000)
        assert not list(tmp_path.glob(".*.tmp"))
        for name in names(entries):
            data = read(entries, name)
            assert data is not None
            assert int.from_bytes(data[:8], "big") == len(data) - 8
            assert len(set(data[8:])) == 1
            found.add(data)
        assert on_disk(tmp_path) <= 60_000
    assert len(found) > 3


def test_death_at_every_call_leaves_every_entry_whole_or_absent(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CRASHER, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = int(done.stdout.split()[1])
    # At least: lock, list, sizes, evict, create, stamp, flush, rename, flush the folder.
    assert times >= 9, done.stdout


def test_a_folder_that_cant_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="name a folder") as error:
        Entries(tmp_path / "file", pattern=PATTERN, max_bytes=10)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="max_bytes"):
        Entries(tmp_path, pattern=PATTERN, max_bytes=0)
