"""Staging, accepting and discarding; one writer at a time; and a fault at any step leaves the accepted golden whole."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from goldens import files, integrity, store, workflow
from goldens.errors import GoldenError
from goldens.trace import Trace

ROOT = Path(store.__file__).parents[1]
HOLD = """
import sys
from goldens import workflow
with workflow.lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def traces(value: float) -> list[Trace]:
    probes = {"logits": np.full((2, 3), value, np.float32)}
    return [Trace(case="c", tokens=np.array([1, 2], np.int32), probes=probes, provenance={"model_hash": "m"})]


def value(path: Path) -> float:
    return float(store.open(path).trace.probes["logits"][0, 0])


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    store.write(tmp_path / "g.h5", traces(1))
    return tmp_path / "g.h5"


def test_staging_leaves_the_golden_as_it_is(path: Path) -> None:
    before = path.read_bytes()
    assert workflow.stage(path, traces(2)) == path.with_name("g.pending.h5") == workflow.pending_path(path)
    assert path.read_bytes() == before
    assert value(workflow.pending_path(path)) == 2


def test_accepting_puts_the_pending_golden_in_its_place(path: Path) -> None:
    workflow.stage(path, traces(2))
    workflow.stage(path, traces(3))
    workflow.accept(path)
    assert value(path) == 3
    assert names(path.parent) == {"g.h5", "g.h5.lock"}


def test_the_first_golden_is_accepted_where_there_was_none(tmp_path: Path) -> None:
    workflow.stage(tmp_path / "new.h5", traces(4))
    assert not (tmp_path / "new.h5").exists()
    workflow.accept(tmp_path / "new.h5")
    assert value(tmp_path / "new.h5") == 4


def test_regenerating_twice_stages_the_same_content(path: Path) -> None:
    hashes = {store.open(workflow.stage(path, traces(2))).content_hash for _ in range(2)}
    assert len(hashes) == 1


def test_nothing_pending_is_nothing_to_accept(path: Path) -> None:
    with pytest.raises(GoldenError, match="nothing is pending; run `assay golden regenerate`"):
        workflow.accept(path)
    assert value(path) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "edited", "edited and sealed", "not a golden"])
def test_a_damaged_pending_golden_is_never_accepted(path: Path, damage: str) -> None:
    pending = workflow.stage(path, traces(2))
    data = bytearray(pending.read_bytes())
    if damage == "cut":
        pending.write_bytes(data[:-100])
    elif damage == "flipped":
        data[1000] ^= 1
        pending.write_bytes(data)
    elif damage == "not a golden":
        pending.write_text("hello")
    else:
        with h5py.File(pending, "r+") as file:
            file["c/logits"][0, 0] = 9
        if damage == "edited and sealed":
            pending.write_bytes(integrity.seal(pending.read_bytes()))
    with pytest.raises(GoldenError, match=r"g\.pending\.h5: "):
        workflow.accept(path)
    assert value(path) == 1 and pending.exists()


def test_discarding_removes_only_the_pending_golden(path: Path) -> None:
    workflow.stage(path, traces(2))
    workflow.discard(path)
    workflow.discard(path)
    assert names(path.parent) == {"g.h5", "g.h5.lock"} and value(path) == 1


def test_a_pending_golden_has_no_pending_golden(path: Path) -> None:
    with pytest.raises(GoldenError, match="is itself a pending golden"):
        workflow.stage(workflow.pending_path(path), traces(2))


def test_a_second_writer_is_refused_at_once_and_told_who_is_first(path: Path) -> None:
    pending = workflow.stage(path, traces(2))
    before = path.read_bytes(), pending.read_bytes()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        attempts: list[Any] = [
            lambda: store.write(path, traces(3)),
            lambda: store.write(pending, traces(3)),
            lambda: workflow.stage(path, traces(3)),
            lambda: workflow.accept(path),
            lambda: workflow.discard(path),
        ]
        for attempt in attempts:
            with pytest.raises(GoldenError, match=f"process {holder.pid} is writing it; wait") as caught:
                attempt()
            assert "\n" not in str(caught.value)
        assert value(path) == 1, "reading needs no lock"
        assert (path.read_bytes(), pending.read_bytes()) == before
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    workflow.accept(path)  # the kernel released the killed holder's lock
    assert value(path) == 2


def test_the_lock_is_of_one_golden_and_not_re_entrant(path: Path) -> None:
    with workflow.lock(path):
        store.write(path.with_name("other.h5"), traces(2))
        with pytest.raises(GoldenError, match=f"process {os.getpid()} is writing it"), workflow.lock(path):
            pass
    with workflow.lock(path):
        pass
    assert (path.parent / "g.h5.lock").read_bytes() == b""


def test_the_next_writer_sweeps_what_killed_writers_left_and_nothing_else(path: Path) -> None:
    stale = {f".g.h5.{'0a' * 8}.tmp", f".g.pending.h5.{'1b' * 8}.tmp"}
    others = {f".g.h5.x.h5.{'0a' * 8}.tmp", f".other.h5.{'0a' * 8}.tmp", ".g.h5.tmp", "g.h5.orig", "notes.tmp"}
    for name in stale | others:
        (path.parent / name).write_bytes(b"half")
    store.write(path, traces(2))
    assert names(path.parent) == {"g.h5", "g.h5.lock"} | others


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="can't be locked for writing"):
        workflow.stage(tmp_path / "none" / "g.h5", traces(1))


def test_a_file_system_without_locks_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", fail)
    with pytest.raises(GoldenError, match=r"No locks available.*use a local disk"):
        store.write(path, traces(2))


class Full:
    """A file on a full disk: it takes half of the bytes."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def plant(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, nth: int = 1) -> None:
    """Let the `nth` call of `holder.name` fail."""
    original, calls = getattr(holder, name), []

    def fail(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            raise OSError(errno.EIO, "Input/output error")
        return original(*arguments, **named)

    monkeypatch.setattr(holder, name, fail)


FAULTS: dict[str, tuple[Any, str, int]] = {
    "HDF5 creating a dataset": (h5py.Group, "create_dataset", 2),
    "opening the temporary file": (os, "fdopen", 1),
    "flushing the data": (os, "fsync", 1),
    "flushing before the rename": (os, "fsync", 2),
    "renaming": (os, "replace", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_writing_leaves_the_old_golden_and_no_junk(
    path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()
    with monkeypatch.context() as planted:
        plant(planted, *FAULTS[fault])
        with pytest.raises(GoldenError, match="Input/output error"):
            store.write(path, traces(2))
    assert path.read_bytes() == before and names(path.parent) == {"g.h5", "g.h5.lock"}
    store.write(path, traces(2))
    assert value(path) == 2


def test_a_full_disk_leaves_the_old_golden_and_no_junk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, fdopen = path.read_bytes(), os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda *arguments: Full(fdopen(*arguments)))
    for write in (store.write, workflow.stage):
        with pytest.raises(GoldenError, match=r"No space left on device\); check the disk and try again"):
            write(path, traces(2))
    assert path.read_bytes() == before and names(path.parent) == {"g.h5", "g.h5.lock"}


def test_a_fault_after_the_rename_is_told_and_leaves_the_new_golden_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, os, "fsync", 3)  # of the folder
    with pytest.raises(GoldenError, match="Input/output error"):
        store.write(path, traces(2))
    assert value(path) == 2


@pytest.mark.parametrize(("function", "nth"), [("fsync", 1), ("replace", 1)])
def test_a_fault_while_accepting_leaves_both(
    path: Path, function: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = workflow.stage(path, traces(2))
    with monkeypatch.context() as planted:
        plant(planted, os, function, nth)
        with pytest.raises(GoldenError, match=r"can't be replaced .*g\.pending\.h5 is still there"):
            workflow.accept(path)
    assert (value(path), value(pending)) == (1, 2)
    workflow.accept(path)
    assert value(path) == 2


def test_hdf5_storing_something_else_is_noticed_before_the_file_is_touched(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = h5py.Group.create_dataset

    def wrong(group: Any, name: str, data: Any, **how: Any) -> Any:
        return original(group, name, data=data + 1, **how)

    before = path.read_bytes()
    with monkeypatch.context() as planted:
        planted.setattr(h5py.Group, "create_dataset", wrong)
        with pytest.raises(GoldenError, match="'c/tokens' doesn't match its sha256"):
            store.write(path, traces(2))
    assert path.read_bytes() == before
