"""batch_kv_cache(left_padding): kv_cache for rows of different lengths."""

from __future__ import annotations

from collections.abc import Iterator

from audits.cache_contract import CacheContract, Plan
from audits.cache_corpus import (
    Program,
    changes,
    copies,
    extracted,
    feed,
    filtered,
    joined,
    masks,
    op,
    padded,
    pairs,
    restores,
    right_padded,
    steps,
    trims,
    windowed,
)

SMALL = (32, 32)  # dims where lengths are what matters

OPERATIONS = (
    "trim",
    "restore",
    "copy",
    "left_pad",
    "right_pad",
    "new",
    "filter",
    "extend",
    "extract",
    "single",
    "merge",
)


def programs(full: bool) -> Iterator[tuple[Program, list[int]]]:
    """(program, left padding) of every kind."""
    for left_padding in ([0, 2], [2, 0, 5]):
        yield from ((program, left_padding) for program in filtered(len(left_padding)))
        yield from ((program, left_padding) for program in extracted(len(left_padding)))
        yield from ((program, left_padding) for program in masks(7, (None, 1, 3, 1000)))
    yield from ((program, [0, 2]) for program in padded())
    yield from ((program, [1, 3]) for program in padded())
    yield from ((program, [0, 0]) for program in right_padded())
    yield from ((program, left_padding) for program in joined() for left_padding in ([0], [2, 0]))
    yield from ((program, [3, 0]) for program in trims((10, 258)) if _shorter(program, 3))
    yield from ((program, [0, 2]) for program in (*restores((5, 256)), *copies()))
    changed = [*filtered(2), *extracted(2), *restores((5,)), *list(joined())[::3]]
    yield from ((program, [2, 0]) for program in windowed(changed))
    yield from ((program, [0, 0]) for program in windowed(right_padded()))
    yield [*feed(8), *op("filter", rows=[0]), *op("restore", into=1), *feed(1, 2, on=1)], [3, 0]


def lengths(total: int = 520, modulus: int = 96) -> Iterator[tuple[Program, list[int]]]:
    """(program, left padding) in which every length is looked at, by the token, in chunks, and where rows change."""
    yield steps(total), [0, 2]
    yield from ((program, [0, 0]) for program in changes())
    yield from ((program, [2, 0]) for program in pairs(modulus))


def _shorter(program: Program, padding: int) -> bool:
    """Whether no trimming reaches into the padding."""
    fed = sum(step.get("n", 0) for step in program[:1])
    return all(step["n"] < fed - padding for step in program if step["op"] == "trim")


def corpus(full: bool) -> Iterator[Plan]:
    for i, (program, left_padding) in enumerate(programs(full)):
        yield Plan(program=program, options={"left_padding": left_padding}, heads=1 + i % 2)
    for program, left_padding in lengths():
        yield Plan(program=program, options={"left_padding": left_padding}, dims=SMALL)
    yield Plan(program=feed(9, 1, 2), options={"left_padding": [0, 3, 1, 7, 2]}, heads=8, dims=(32, 64))


CONTRACT = CacheContract(
    name="batch_kv_cache",
    signature="batch_kv_cache(left_padding)",
    doc=(
        "update_and_fetch(keys [B,H,n,D], values [B,H,n,Dv]) -> all of them so far, B = len(left_padding).\n"
        "The first left_padding[b] columns of row b are padding: offset[b] starts at −left_padding[b]. A query sees its"
        " row's own tokens up to itself, and never padding. prepare(lengths, right_padding) before and finalize() after"
        " right-padded chunks of two or more; filter(rows), extend(other), extract(row), and merge of what extract"
        " gives. Otherwise as kv_cache."
    ),
    operations=OPERATIONS,
    settings=[{"left_padding": [0, 2]}],
    corpus=corpus,
)
