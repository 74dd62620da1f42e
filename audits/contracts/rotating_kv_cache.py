"""rotating_kv_cache(max_size, keep): a sliding window that may keep the first tokens."""

from __future__ import annotations

from collections.abc import Iterator

from audits.cache_contract import CacheContract, Plan
from audits.cache_corpus import Program, copies, feed, op, pairs, restores, steps, walks, windowed

SMALL = (32, 32)  # dims where lengths are what matters
SETTINGS = tuple(
    {"max_size": max_size, "keep": keep}
    for max_size, keep in ((8, 0), (5, 0), (8, 2), (7, 4), (6, 1), (1, 0), (300, 0))
)


def wraps(max_size: int) -> Iterator[Program]:
    """The ring at every phase, filled by a chunk or one by one, then a chunk of every size, then decoding."""
    for phase in range(max_size):
        for chunk in range(1, max_size + 3):
            yield [*feed(max_size, *[1] * phase, chunk, 1, 1)]
            if chunk in (1, 2, max_size - 1, max_size, max_size + 1):
                yield [*feed(*[1] * (max_size + phase), chunk, 1, 1)]


def ring_trims(max_size: int) -> Iterator[Program]:
    """Trimming before the ring is full, when it just is, and past the wrap."""
    for fed in (max_size - 2, max_size - 1, max_size, max_size + 1, max_size + 4):
        for n in (0, 1, 2):
            if fed > n:
                yield [*feed(fed), *op("trim", n=n), *feed(*[1] * (max_size + 1), 2, 1)]
                yield [*feed(*[1] * fed), *op("trim", n=n), *feed(1, 3, *[1] * max_size)]
                yield [*feed(max_size, *[1] * (fed - 1)), *op("trim", n=n), *feed(2, 1, 1)]


def lengths() -> Iterator[tuple[Program, int, int]]:
    """Every length looked at, by the token and in chunks, in rings that grow in steps and wrap: (…, max_size, keep)."""
    yield steps(620), 300, 0
    yield steps(200), 70, 4
    yield from ((program, 300, keep) for program, keep in zip(walks(), (0, 4), strict=True))
    yield from ((program, 40, 0) for program in pairs(96))
    yield from ((program, 33, 4) for program in pairs(48, windows=(None,)))


def corpus(full: bool) -> Iterator[Plan]:
    plans: list[tuple[Program, dict[str, int]]] = []
    for max_size, keep in ((5, 0), (7, 4), (6, 1)):
        chosen = list(wraps(max_size))
        chosen = chosen if full or keep == 0 else chosen[max_size % 3 :: 3]
        plans += [(program, {"max_size": max_size, "keep": keep}) for program in chosen]
    for max_size, keep in ((8, 0), (6, 2)):
        plans += [(program, {"max_size": max_size, "keep": keep}) for program in ring_trims(max_size)]
        plans += [(program, {"max_size": max_size, "keep": keep}) for program in restores((3, max_size, max_size + 3))]
        plans += [([*feed(first), *feed(1, 3, 1)], {"max_size": max_size, "keep": keep}) for first in range(1, 20, 3)]
    for window in (1, 3, 4, 5, 9):
        for phase in range(5):
            for array in (False, True):
                program = feed(4, *[1] * (1 + phase), 3, 1, 1, window=window, array=array)
                plans.append((program, {"max_size": 5, "keep": 0}))
    plans += [(program, {"max_size": 8, "keep": 0}) for program in windowed(restores((3, 6, 11)))]
    plans += [(program, {"max_size": 8, "keep": 0}) for program in windowed(ring_trims(8))]
    plans += [(program, {"max_size": 8, "keep": keep}) for program in copies((5, 13)) for keep in (0, 2)]
    plans += [(feed(3, 1, 2, 1), {"max_size": 1, "keep": 0})]
    for first in (255, 256, 299, 300, 310):
        plans.append((feed(first, 1, 1, 3, 1), {"max_size": 300, "keep": 0}))
    plans.append(([*feed(*[1] * 3, 254, 1, 1), *op("trim", n=4), *feed(40, *[1] * 6)], {"max_size": 300, "keep": 4}))
    for i, (program, options) in enumerate(plans):
        yield Plan(program=program, options=options, batch=1 + i % 3, heads=1 + i % 2)
    for program, max_size, keep in lengths():
        yield Plan(program=program, options={"max_size": max_size, "keep": keep}, dims=SMALL)


CONTRACT = CacheContract(
    name="rotating_kv_cache",
    signature="rotating_kv_cache(max_size, keep=0)",
    doc=(
        "update_and_fetch(keys, values) -> the keys and values that the new tokens may look at, in any order.\n"
        "A query sees the last max_size tokens, its own included; with keep at least the last max_size − keep, and at"
        " most the first keep besides the last max_size. That the first keep are seen is asked of decoding (n == 1)."
        " window_size narrows that (with keep only None is asked for). A wider window_size may show what a longer chunk"
        " still holds. A full ring refuses to trim (is_trimmable, or trim returning 0) or trims right."
    ),
    operations=("trim", "restore", "copy"),
    settings=SETTINGS,
    corpus=corpus,
)
