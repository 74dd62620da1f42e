"""Pieces of the caches' boundary corpora: programs by what they are after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Program = list[dict[str, Any]]


def feed(*sizes: int, on: int = 0, window: int | None = None, array: bool = False) -> Program:
    """Chunks of these sizes."""
    return [{"op": "feed", "on": on, "n": n, "window": window, "array": array} for n in sizes]


def op(name: str, on: int | None = 0, **fields: Any) -> Program:
    """One operation; a field called `into` is the number that it gives what it makes."""
    told = {"as" if key == "into" else "with" if key == "other" else key: value for key, value in fields.items()}
    return [{"op": name, **({} if on is None else {"on": on}), **told}]


def chunkings() -> Iterator[Program]:
    """Appending in any chunks, over the steps of 256 in which buffers grow."""
    yield feed(1, 1, 1, 1, 1)
    yield feed(7, 1, 1, 5, 1)
    for first in range(254, 259):
        yield feed(first, 1, 1, 1)
    yield feed(253, 5, 1)
    yield feed(300, 300)
    yield feed(3, 300)
    yield feed(200, 56, 1)
    yield feed(256, 256, 1)
    yield feed(255, 257, 2)
    yield feed(511, 1, 1)


def masks(total: int, windows: Iterable[int | None] = (None, 1, 3, 6, 1000)) -> Iterator[Program]:
    """A mask asked for in each way, before chunks and single tokens, with windows narrower and wider than what there
    is."""
    for window in windows:
        for array in (False, True):
            yield feed(total, 1, 3, 1, window=window, array=array)
            yield feed(1, 2, 1, total, 1, window=window, array=array)


def trims(sizes: Sequence[int] = (10, 256, 258)) -> Iterator[Program]:
    """Trimming, and using the cache again."""
    for size in sizes:
        for n in (1, 3, size - 1):
            yield [*feed(size), *op("trim", n=n), *feed(1, 4)]
        yield [*feed(size), *op("trim", n=size), *feed(3, 1)]
        yield [*feed(size, 1, 1), *op("trim", n=2), *op("trim", n=2), *feed(1, 1, 3, 1)]
    yield [*feed(4), *op("trim", n=9), *feed(2)]


def restores(sizes: Sequence[int] = (5, 255, 256, 257)) -> Iterator[Program]:
    """Save and restore, then go on with both."""
    for size in sizes:
        yield [*feed(size), *op("restore", into=1), *feed(1, on=1), *feed(3, 1), *feed(2, 1, on=1)]
        yield [*feed(size, 1), *op("restore", into=1), *feed(4, 1, on=1)]
    yield [*feed(8), *op("trim", n=3), *op("restore", into=1), *feed(1, 3, on=1), *feed(1)]
    yield [*feed(8), *op("restore", into=1), *op("trim", on=1, n=3), *feed(2, on=1), *feed(1)]


def padded() -> Iterator[Program]:
    """Batches behind left padding, from inside it to past the first growth of the buffer."""
    yield feed(1, 1, 1, 1, 1, 1, 1)
    yield feed(6, 1, 1)
    yield feed(4, 4, 1, 2, 1)
    yield feed(255, 1, 1, 1)
    yield feed(258, 1, 2)
    yield feed(6, 300, 1)
    yield [*op("left_pad", left_padding=[1, 4]), *feed(6, 2, 1)]


def right_padded() -> Iterator[Program]:
    """Rows of different lengths, fed right-padded and then moved, alone and in a second turn."""
    for lengths, chunks in (([3, 5], [5]), ([3, 5], [2, 3]), ([5, 2], [5]), ([7, 1], [4, 3]), ([4, 4], [4])):
        yield [*op("right_pad", lengths=lengths, chunks=chunks), *feed(1, 1, 3, 1)]
        yield [*feed(4, 1), *op("right_pad", lengths=lengths, chunks=chunks), *feed(1, 2, 1)]
    turn = op("right_pad", lengths=[3, 5], chunks=[5])
    yield [*turn, *feed(1, 1), *op("right_pad", lengths=[6, 2], chunks=[3, 3]), *feed(1, 1)]
    yield [*turn, *op("restore", into=1), *feed(1, 2, on=1), *feed(1)]
    yield [*turn, *op("filter", rows=[0]), *feed(1, 3)]
    yield [*turn, *op("trim", n=1), *feed(1, 2)]
    yield [*turn, *op("extract", row=0, into=1), *feed(2, 1, on=1), *feed(1)]
    yield [*op("right_pad", lengths=[250, 256], chunks=[256]), *feed(1, 1)]


def joined() -> Iterator[Program]:
    """Rows that join: into and with an empty batch, shorter and longer, padded, over a step of the buffer."""
    for here, there in ((5, 3), (3, 5), (4, 4), (1, 9), (0, 4), (4, 0), (0, 0), (250, 9), (9, 257)):
        for padding in ([0], [0, 2]):
            start = [*(feed(here) if here else []), *op("new", None, into=1, left_padding=padding)]
            other = feed(there, on=1) if there else []
            yield [*start, *other, *op("extend", other=1), *feed(1, 3, 1)]
    two = [*op("new", None, into=1, left_padding=[1, 0]), *feed(4, on=1), *op("extend", other=1)]
    yield [*feed(6), *two, *op("filter", rows=[2, 0]), *feed(1, 1), *op("filter", rows=[0]), *feed(2, 1)]
    yield [*feed(6), *op("restore", into=1), *op("extend", other=1), *feed(1, 2)]


def filtered(rows: int) -> Iterator[Program]:
    """Rows that leave: to one, to those without padding, reordered, doubled."""
    chosen: list[list[int]] = [[0], [rows - 1], list(range(rows))[::-1], [0, 0, rows - 1], [rows - 1, 0]]
    for kept in chosen:
        yield [*feed(6), *op("filter", rows=kept), *feed(1, 3, 1)]
        yield [*feed(6, 1, 1, 1), *op("filter", rows=kept), *feed(2, 1), *op("trim", n=1), *feed(1)]
        yield [*feed(256), *op("filter", rows=kept), *feed(1, 1)]


def extracted(rows: int) -> Iterator[Program]:
    """Rows taken out, at once and as checkpoints that are only used after the batch went on; put together again."""
    for row in range(rows):
        yield [*feed(7), *op("extract", row=row, into=1), *feed(1, 3, 1, on=1), *feed(1)]
        yield [*feed(7, 1, 1, 1), *op("extract", row=row, into=1), *feed(1, 2), *feed(1, 1, on=1)]
    every = [step for b in range(rows) for step in op("extract", row=b, into=b + 1)]
    yield [*feed(7), *every, *feed(1, 1, 1), *feed(1, 1, on=1), *feed(2, on=rows)]
    numbers = list(range(1, rows + 1))
    yield [*feed(7), *every, *op("merge", None, of=numbers, into=9), *feed(1, 3, 1, on=9), *feed(1, on=1)]
    grown = [*feed(5, on=1), *op("merge", None, of=numbers[::-1], into=9)]
    yield [*feed(7), *every, *grown, *feed(1, 2, on=9), *op("filter", on=9, rows=[0]), *feed(1, 1, on=9)]
    merged = op("merge", None, of=[*numbers], into=9)
    yield [*feed(7, 1, 1, 1), *every, *merged, *op("extend", other=9), *feed(1, 2)]
    yield [*feed(7), *op("extract", row=0, into=1), *op("trim", n=2), *feed(2, 1), *feed(1, 1, on=1)]
    empty = op("single", None, like=1, into=8)
    yield [*feed(7), *every, *empty, *op("merge", None, of=[*numbers, 8], into=9), *feed(2, 1, 1, on=9)]
    yield [*feed(7), *every, *empty, *op("merge", None, of=[8, 1], into=9), *feed(1, 1, on=9)]
    yield [*feed(7), *every, *op("single", None, like=1, into=8), *op("single", None, like=1, into=7),
           *op("merge", None, of=[8, 7], into=9), *feed(3, 1, on=9)]  # fmt: skip
