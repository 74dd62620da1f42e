"""quantized_kv_cache(group_size, bits): a cache that keeps every token as affine codes."""

from __future__ import annotations

from collections.abc import Iterator

from audits.cache_contract import CacheContract, Plan
from audits.cache_corpus import chunkings, masks, restores, trims

SETTINGS = tuple({"group_size": group, "bits": bits} for group, bits in ((64, 8), (64, 4), (32, 4), (32, 2), (32, 8)))


def corpus(full: bool) -> Iterator[Plan]:
    programs = [*chunkings(), *masks(8), *trims((10, 258)), *restores((5, 256, 257))]
    for i, program in enumerate(programs):
        yield Plan(program=program, options=SETTINGS[i % len(SETTINGS)], batch=1 + i % 3, heads=1 + i % 2)


CONTRACT = CacheContract(
    name="quantized_kv_cache",
    signature="quantized_kv_cache(group_size=64, bits=8)",
    doc=(
        "update_and_fetch(keys, values) -> (codes u32, scales, biases) each, in MLX's affine layout, of all tokens.\n"
        "bits is 2, 4 or 8. A cache may return dequantised arrays instead. Values are within one quantisation of what"
        " was fed, scales and biases have its dtype, and codes are those of the same tokens quantised at once, however"
        " they were split into chunks, and never change. Otherwise as kv_cache."
    ),
    operations=("trim", "restore"),
    settings=SETTINGS,
    corpus=corpus,
    dims=(64, 128),
)
