"""Pieces of the caches' boundary corpora: programs by what they are after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from audits.domain import residues

Program = list[dict[str, Any]]
# Every residue modulo 16, and both sides of the steps in which buffers grow.
LENGTHS = (*range(3, 20), *range(31, 35), *range(47, 50), *range(63, 66), *range(127, 130))
WINDOWS = (None, 5, None, 40)  # narrower and wider than a chunk, and none


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


def steps(count: int, **options: Any) -> Program:
    """Token by token: every length up to `count` is looked at once."""
    return feed(*[1] * count, **options)


def pairs(
    modulus: int = 128, between: Program | None = None, windows: Sequence[int | None] = WINDOWS
) -> Iterator[Program]:
    """A chunk of every length up to `modulus`, after every number of tokens up to it, neither following the other."""
    for i, (before, n) in enumerate(zip(*residues(modulus, 2, seed=0), strict=True)):
        window, array = windows[i % len(windows)], i % 2 == 0
        yield [*feed(before, window=window, array=array), *(between or []), *feed(n, window=window, array=array)]


def walks(longest: int = 67) -> Iterator[Program]:
    """Trimming to every length and from it, and saving at each."""
    yield [step for _ in range(longest) for step in (*feed(4), *op("trim", n=3))]
    yield [step for length in range(1, longest) for step in (*feed(1), *op("restore", into=length))]


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
        yield [*feed(size), *op("trim", n=0), *feed(1, 4)]  # every drafted token was accepted
    yield [*feed(4), *op("trim", n=9), *feed(2)]


def restores(sizes: Sequence[int] = (5, 255, 256, 257)) -> Iterator[Program]:
    """Save and restore, then go on with both."""
    for size in sizes:
        yield [*feed(size), *op("restore", into=1), *feed(1, on=1), *feed(3, 1), *feed(2, 1, on=1)]
        yield [*feed(size, 1), *op("restore", into=1), *feed(4, 1, on=1)]
    yield [*feed(8), *op("trim", n=3), *op("restore", into=1), *feed(1, 3, on=1), *feed(1)]
    yield [*feed(8), *op("restore", into=1), *op("trim", on=1, n=3), *feed(2, on=1), *feed(1)]
    again = [*op("restore", into=1), *feed(2, on=1), *op("restore", on=1, into=2)]
    yield [*feed(7), *again, *feed(1, 2, on=2), *feed(1, on=1)]


def copies(sizes: Sequence[int] = (5, 256)) -> Iterator[Program]:
    """Copied by its own means, and both used."""
    for size in sizes:
        yield [*feed(size), *op("copy", into=1), *feed(1, 2, on=1), *feed(3, 1), *feed(1, on=1)]
    yield [*feed(8), *op("copy", into=1), *op("trim", on=1, n=3), *feed(2, on=1), *feed(1)]
    yield [*op("copy", into=1), *feed(2, on=1), *feed(3)]


def windowed(programs: Iterable[Program], windows: Sequence[int] = (3, 5, 2)) -> Iterator[Program]:
    """The same programs, with a window asked for at every chunk: what moves tokens moves the mask too."""
    for i, program in enumerate(programs):
        asked = {"window": windows[i % len(windows)], "array": i % 2 == 0}
        yield [step | asked if step["op"] == "feed" else step for step in program]


def changes(lengths: Sequence[int] = LENGTHS) -> Iterator[Program]:
    """Rows that leave, are taken out, join and are put together again at each of these lengths, each in a batch of its
    own, and are used after that."""
    left: Program = []
    merged: Program = []
    for i, n in enumerate(lengths):
        batch, other, row, joined = range(4 * i + 1, 4 * i + 5)
        left += [*op("new", None, into=batch, left_padding=[0, 2, 1]), *feed(n, on=batch)]
        left += [*op("extract", on=batch, row=1, into=row), *op("filter", on=batch, rows=[2, 1])]
        left += [*op("new", None, into=other, left_padding=[1]), *feed(lengths[-1 - i], on=other)]
        left += op("extend", on=batch, other=other)
        merged += [*op("new", None, into=batch, left_padding=[0]), *feed(n, on=batch)]
        merged += [*op("new", None, into=other, left_padding=[2]), *feed(lengths[-1 - i], on=other)]
        merged += [*op("extract", on=batch, row=0, into=row), *op("extract", on=other, row=0, into=joined)]
        merged += op("merge", None, of=[row, joined], into=4 * (len(lengths) + i) + 1)
    yield left
    yield merged
    yield [*feed(3), *[step for _ in range(67) for step in (*feed(1), *op("filter", rows=[1, 0]))]]


def padded() -> Iterator[Program]:
    """Batches behind left padding, from inside it to past the first growth of the buffer."""
    yield feed(1, 1, 1, 1, 1, 1, 1)
    yield feed(6, 1, 1)
    yield feed(4, 4, 1, 2, 1)
    yield feed(255, 1, 1, 1)
    yield feed(258, 1, 2)
    yield feed(6, 300, 1)
    yield [*op("left_pad", left_padding=[1, 4]), *feed(6, 2, 1)]
    yield [*op("left_pad", left_padding=[17, 40]), *feed(45, 1, 30, 1)]


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
    yield [*op("filter", rows=[rows - 1]), *feed(6, 1)]
    yield [*op("filter", rows=[rows - 1, 0]), *feed(6, 1)]
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
    alone = [*op("extract", row=0, into=1), *op("merge", None, of=[1], into=9)]
    yield [*feed(7), *alone, *op("trim", on=9, n=2), *feed(2, on=9), *feed(1, on=1)]
    yield [*feed(7), *op("extract", row=0, into=1), *op("trim", on=1, n=2), *feed(1, on=1), *feed(1)]
    empty = op("single", None, like=1, into=8)
    yield [*feed(7), *every, *empty, *op("merge", None, of=[*numbers, 8], into=9), *feed(2, 1, 1, on=9)]
    yield [*feed(7), *every, *empty, *op("merge", None, of=[8, 1], into=9), *feed(1, 1, on=9)]
    yield [*feed(7), *every, *op("single", None, like=1, into=8), *op("single", None, like=1, into=7),
           *op("merge", None, of=[8, 7], into=9), *feed(3, 1, on=9)]  # fmt: skip
