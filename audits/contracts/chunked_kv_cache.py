"""chunked_kv_cache(chunk_size): a cache that drops old tokens when the model asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from audits.cache_contract import CacheContract, Plan
from audits.cache_corpus import Program, chunkings, copies, feed, masks, op, pairs, restores, steps, trims, walks

SMALL = (32, 32)  # dims where lengths are what matters
SETTINGS = ({"chunk_size": 8}, {"chunk_size": 5}, {"chunk_size": 1}, {"chunk_size": 300})


def cut(*sizes: int) -> Program:
    """Chunks, each but the first after maybe_trim_front, as a model feeds them."""
    program = feed(sizes[0])
    for n in sizes[1:]:
        program += [*op("trim_front"), *feed(n)]
    return program


def corpus(full: bool) -> Iterator[Plan]:
    programs: list[tuple[Program, int]] = [
        (program, 8) for program in (*chunkings(), *masks(8), *trims((10,)), *copies())
    ]
    for chunk_size in (5, 8):
        for first in range(1, chunk_size + 4):
            for second in (1, 2, chunk_size - 1, chunk_size, chunk_size + 3):
                programs.append((cut(first, second, 1, 1), chunk_size))
        programs += [([*cut(*[1] * (chunk_size + 3)), *feed(2, 1)], chunk_size)]
        programs += [([*_cut_first(program)], chunk_size) for program in restores((9, 12))]
        programs += [([*cut(9, 4), *op("trim", n=n), *feed(1), *op("trim_front"), *feed(2, 1)], chunk_size)
                     for n in (1, 3, 4, 20)]  # fmt: skip
    programs += [([*op("trim_front"), *cut(3, 9, 2, 1)], 5)]
    programs += [(cut(256, 300, 1, 1), 300), (cut(300, 1, 255, 1), 300), (cut(700, 1, 1), 300)]
    for i, (program, size) in enumerate(programs):
        yield Plan(program=program, options={"chunk_size": size}, batch=1 + i % 3, heads=1 + i % 2)
    for program in (steps(300), cut(*[1] * 130), *walks(), *pairs(96, op("trim_front"), (None,))):
        yield Plan(program=program, options={"chunk_size": 40}, dims=SMALL)


def _cut_first(program: Sequence[dict[str, object]]) -> Program:
    """The program with a maybe_trim_front after its first chunk, which is longer than chunk_size."""
    return [*program[:1], *op("trim_front"), *program[1:]]


CONTRACT = CacheContract(
    name="chunked_kv_cache",
    signature="chunked_kv_cache(chunk_size)",
    doc=(
        "update_and_fetch(keys, values) -> keys and values since the last maybe_trim_front(), and the new ones.\n"
        "maybe_trim_front() leaves the last chunk_size tokens. A query sees all earlier tokens that are held, and its"
        " own; a cache without make_mask is judged by a causal mask. offset counts dropped tokens too; trim(n) forgets"
        " at most what is held."
    ),
    operations=("trim", "trim_front", "restore", "copy"),
    settings=SETTINGS,
    corpus=corpus,
)
