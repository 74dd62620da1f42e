"""batch_rotating_kv_cache(max_size, left_padding): a sliding window for rows of different lengths."""

from __future__ import annotations

from collections.abc import Iterator

from audits.cache_contract import CacheContract, Plan
from audits.cache_corpus import (
    Program,
    copies,
    extracted,
    feed,
    filtered,
    joined,
    op,
    padded,
    restores,
    right_padded,
    steps,
    windowed,
)
from audits.contracts.batch_kv_cache import OPERATIONS, SMALL, lengths

SETTINGS = tuple({"max_size": max_size, "left_padding": [0, 2]} for max_size in (8, 5, 300))


def wraps(max_size: int) -> Iterator[Program]:
    """The ring at every phase, with rows that still have padding in it, by chunks and one by one."""
    for phase in range(max_size + 1):
        yield feed(*[1] * (max_size + phase), 1, 1)
        yield feed(max_size, *[1] * phase, 1)
        yield feed(max_size + 3, *[1] * phase, 1)
        for chunk in (2, max_size, max_size + 2):
            yield feed(3, *[1] * phase, chunk, 1, 1)


def changes(max_size: int) -> Iterator[Program]:
    """Rows leaving, joining and taken out while the ring is anywhere."""
    for phase in (0, 1, max_size - 1, max_size + 1):
        ring = feed(max_size, *[1] * phase)
        yield [*ring, *op("filter", rows=[1]), *feed(1, 1, 3, 1)]
        yield [*ring, *op("filter", rows=[1, 0]), *feed(1, 1)]
        yield [*ring, *op("extract", row=1, into=1), *feed(1, 1, 3, on=1), *feed(1)]
        yield [*ring, *op("restore", into=1), *feed(1, 1, on=1), *feed(1)]
        for there in (2, max_size, max_size + 2):
            other = [*op("new", None, into=1, left_padding=[1]), *feed(there, 1, on=1)]
            yield [*ring, *other, *op("extend", other=1), *feed(1, 1, 1)]
        yield [*ring, *op("right_pad", lengths=[3, 5], chunks=[2, 3]), *feed(1, 1, 1)]
        yield [*ring, *op("right_pad", lengths=[max_size + 2, 2], chunks=[4, max_size - 2]), *feed(1, 1, 1)]


def corpus(full: bool) -> Iterator[Plan]:
    plans: list[tuple[Program, int, list[int]]] = []
    plans += [(program, 5, [0, 2]) for program in wraps(5)]
    plans += [(program, 4, [4, 0, 1]) for program in wraps(4)]
    plans += [(program, 6, [0, 0]) for program in changes(6)]
    plans += [(program, 6, [0, 3]) for program in changes(6) if all(step["op"] != "right_pad" for step in program)]
    plans += [(program, 5, [0, 2]) for program in filtered(2)]
    for size in (5, 300):
        plans += [(program, size, [2, 0]) for program in extracted(2)]
        plans += [(program, size, [0, 2]) for program in padded()]
    for size in (5, 8):
        plans += [(program, size, [0, 0]) for program in right_padded()]
    plans += [(program, (8, 300)[i % 2], [[0], [2, 0]][i // 2 % 2]) for i, program in enumerate(joined())]
    plans += [(program, 8, [0, 2]) for program in (*restores((5, 8, 12)), *copies((5, 13)))]
    plans += [(program, 6, [0, 2]) for program in windowed([*filtered(2), *extracted(2), *restores((4, 9))])]
    plans += [(program, 8, [0]) for program in windowed([*list(joined())[::3]])]
    plans += [(program, 6, [0, 0]) for program in windowed(right_padded())]
    for fed in (6, 8, 9, 12):
        plans += [([*feed(fed), *op("trim", n=0), *feed(2, *[1] * 9)], 8, [0, 2])]
        plans += [([*feed(fed), *op("trim", n=2), *feed(*[1] * 9)], 8, [0, 2])]
        plans += [([*feed(*[1] * fed), *op("trim", n=1), *feed(2, 1, 1)], 8, [2, 0])]
    for window in (1, 3, 4, 5, 9):
        for phase in range(5):
            program = feed(4, *[1] * (1 + phase), 1, window=window, array=phase % 2 == 0)
            plans.append((program, 5, [0, 2]))
            plans.append((feed(3, 1, 4, 1, 1, window=window, array=phase % 2 == 0), 5, [phase, 0]))
    for i, (program, max_size, left_padding) in enumerate(plans):
        options = {"max_size": max_size, "left_padding": left_padding}
        yield Plan(program=program, options=options, heads=1 + i % 2)
    yield Plan(program=steps(200), options={"max_size": 70, "left_padding": [0, 20]}, dims=SMALL)
    for i, (program, left_padding) in enumerate(lengths()):
        yield Plan(program=program, options={"max_size": (300, 40)[i > 0], "left_padding": left_padding}, dims=SMALL)


CONTRACT = CacheContract(
    name="batch_rotating_kv_cache",
    signature="batch_rotating_kv_cache(max_size, left_padding)",
    doc=(
        "update_and_fetch(keys, values) -> the keys and values that the new tokens may look at, in any order.\n"
        "A query sees its row's own last max_size tokens, and never padding, wherever the ring is. Otherwise as"
        " rotating_kv_cache and batch_kv_cache."
    ),
    operations=OPERATIONS,
    settings=SETTINGS,
    corpus=corpus,
)
