"""kv_cache(): a cache that keeps every token."""

from __future__ import annotations

from collections.abc import Iterator

from audits.cache_contract import CacheContract, Plan
from audits.cache_corpus import chunkings, masks, restores, trims


def corpus(full: bool) -> Iterator[Plan]:
    programs = [*chunkings(), *masks(8), *trims(), *restores()]
    for i, program in enumerate(programs):
        yield Plan(program=program, batch=1 + i % 3, heads=1 + i % 2)


CONTRACT = CacheContract(
    name="kv_cache",
    signature="kv_cache()",
    doc=(
        "update_and_fetch(keys [B,H,n,D], values [B,H,n,Dv]) -> all keys [B,H,S,D] and values [B,H,S,Dv] so far.\n"
        "A query sees its own and all earlier tokens, with window_size the last window_size of them: judged by the mask"
        " that make_mask(n, window_size=, return_array=) gives before the update (None, 'causal' bottom-right, bool or"
        " additive). Bits and dtype are kept; trim(n) forgets the last n; state and meta_state restore."
    ),
    operations=("trim", "restore"),
    settings=[{}],
    corpus=corpus,
)
