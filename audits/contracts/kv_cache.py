"""kv_cache(): a cache that keeps every token."""

from __future__ import annotations

from collections.abc import Iterator

from audits.cache_contract import CacheContract, Plan
from audits.cache_corpus import chunkings, copies, feed, masks, pairs, restores, steps, trims, walks, windowed

SMALL = (32, 32)  # dims where lengths are what matters


def corpus(full: bool) -> Iterator[Plan]:
    programs = [*chunkings(), *masks(8), *trims(), *restores(), *copies()]
    programs += windowed([*trims((10,)), *restores((5,))])
    for i, program in enumerate(programs):
        yield Plan(program=program, batch=1 + i % 3, heads=1 + i % 2)
    for program in (steps(520), steps(70, window=16), *walks(), *pairs()):
        yield Plan(program=program, dims=SMALL)
    yield Plan(program=feed(3, 1, 40, 1), batch=5, heads=8, dims=(32, 64))


CONTRACT = CacheContract(
    name="kv_cache",
    signature="kv_cache()",
    doc=(
        "update_and_fetch(keys [B,H,n,D], values [B,H,n,Dv]) -> all keys [B,H,S,D] and values [B,H,S,Dv] so far.\n"
        "A query sees its own and all earlier tokens, with window_size the last window_size of them: judged by the mask"
        " that make_mask(n, window_size=, return_array=) gives before the update (None, 'causal' bottom-right, bool or"
        " additive). Bits and dtype are kept; trim(n) forgets the last n; state and meta_state restore."
    ),
    operations=("trim", "restore", "copy"),
    settings=[{}],
    corpus=corpus,
)
