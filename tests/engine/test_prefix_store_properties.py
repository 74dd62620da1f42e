"""A drawn life of a store: what is put, found, damaged, mended and evicted, beside a model of what must be there."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.prefix_store import PrefixStore
from engine.prefixes import Checkpoint
from tests.engine.test_prefix_store import IDENTITY, TEXT, checkpoint, cold, equal, files

LENGTHS = (1, 2, 4, 7)
STEP = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(LENGTHS), st.integers(0, 2)),
    st.tuples(st.just("find"), st.integers(0, len(TEXT))),
    st.tuples(st.just("restore"), st.integers(0, len(TEXT))),
    st.tuples(st.just("flip"), st.sampled_from(LENGTHS), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("cut"), st.sampled_from(LENGTHS), st.floats(0, 1, exclude_max=True)),
    st.tuples(st.just("mend"), st.sampled_from(LENGTHS)),
    st.tuples(st.just("swap"), st.sampled_from(LENGTHS), st.sampled_from(LENGTHS)),
)


@cache
def made(n: int, seed: int) -> Checkpoint:
    return checkpoint(TEXT[:n], seed=seed)


@cache
def size(n: int) -> int:
    """Bytes of an entry of n tokens."""
    with tempfile.TemporaryDirectory() as folder:
        store = PrefixStore(folder, identity=IDENTITY, max_bytes=1 << 20)
        store.put(made(n, 0))
        return store.nbytes


@dataclass
class Entry:
    """A file that must be there: its bytes as they were written, and the checkpoint."""

    path: Path
    whole: bytes
    kept: Checkpoint

    @property
    def intact(self) -> bool:
        return self.path.read_bytes() == self.whole


class Model:
    """The store beside a dictionary of entries by length, in the order of their last use."""

    def __init__(self, folder: str, max_bytes: int) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.store = PrefixStore(folder, identity=IDENTITY, max_bytes=max_bytes)
        self.entries: dict[int, Entry] = {}

    def put(self, n: int, seed: int) -> None:
        before = {path: path.read_bytes() for path in files(self.folder)}
        if not self.store.put(made(n, seed)):
            assert {path: path.read_bytes() for path in files(self.folder)} == before, "nothing goes for what won't fit"
            assert size(n) > self.max_bytes
            return
        (path,) = [path for path in files(self.folder) if path.name.startswith(f"{n}-")]
        data = path.read_bytes()
        # Out of its place, and what it replaces out first; then the least recently used, until the new one fits.
        order = ([n] if n in self.entries else []) + [m for m in self.entries if m != n]
        left = sum(len(data) for data in before.values())
        while left + len(data) > self.max_bytes:
            gone = self.entries.pop(order.pop(0))
            left -= len(before[gone.path])
        self.entries.pop(n, None)
        self.entries[n] = Entry(path, data, made(n, seed))

    def _longest(self, limit: int) -> int | None:
        return max((n for n, entry in self.entries.items() if n < limit and entry.intact), default=None)

    def _used(self, n: int | None) -> None:
        if n is not None:
            self.entries[n] = self.entries.pop(n)

    def find(self, n: int) -> None:
        found, expected = self.store.find(TEXT[:n]), self._longest(n)
        assert (found and found.checkpoint.token_count) == expected
        assert found is None or equal(found.checkpoint, self.entries[found.checkpoint.token_count].kept)
        self._used(expected)

    def restore(self, n: int) -> None:
        warm, expected = self.store.restore(TEXT[:n], cold), self._longest(n)
        assert (warm and warm[1]) == expected
        assert warm is None or [layer.offset for layer in warm[0]] == [expected] * 2
        self._used(expected)

    def flip(self, n: int, where: float) -> None:
        if n in self.entries and (data := bytearray(self.entries[n].path.read_bytes())):
            data[int(where * len(data))] ^= 1 << int(8 * where)
            self._overwrite(n, bytes(data))

    def cut(self, n: int, where: float) -> None:
        if n in self.entries:
            data = self.entries[n].path.read_bytes()
            self._overwrite(n, data[: int(where * len(data))])

    def mend(self, n: int) -> None:
        if n in self.entries and self._room() >= len(self.entries[n].whole) - len(self.entries[n].path.read_bytes()):
            self._overwrite(n, self.entries[n].whole)

    def swap(self, n: int, m: int) -> None:
        """An entry's bytes under another's name: whole, and not what the name says."""
        if n in self.entries and m in self.entries and self._room() >= size(m):
            self._overwrite(n, self.entries[m].whole)

    def _room(self) -> int:
        return self.max_bytes - self.store.nbytes

    def _overwrite(self, n: int, data: bytes) -> None:
        self.entries[n].path.write_bytes(data)
        with self.entries[n].path.open("rb") as file:
            self.store.entries.touch(file)
        self._used(n)


@settings(max_examples=40)
@given(life=st.lists(STEP, min_size=5, max_size=30), places=st.sampled_from([0.5, 1.0, 2.2, 3.1, 9.0]))
def test_a_drawn_life_of_a_store(life: list[Any], places: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Model(folder, int(places * size(max(LENGTHS))))
        for name, *arguments in [*life, *(("find", n) for n in range(len(TEXT)))]:
            getattr(model, name)(*arguments)
            assert files(model.folder) == sorted(entry.path for entry in model.entries.values())
            assert model.store.nbytes <= model.max_bytes
