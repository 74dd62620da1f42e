"""quantized_kv_cache(group_size, bits): a cache that keeps every token as affine codes."""

from __future__ import annotations

from collections.abc import Iterator

from audits.cache_contract import CacheContract, Plan
from audits.cache_corpus import chunkings, copies, feed, masks, pairs, restores, steps, trims, walks, windowed

SETTINGS = tuple(
    {"group_size": group, "bits": bits}
    for group, bits in ((64, 8), (64, 4), (32, 4), (32, 2), (32, 8), (64, 6), (32, 3), (64, 3), (32, 6))
)
# Codes of these lie across words, which not every implementation packs.
REFUSABLE = {"bits": (3, 6)}
SMALL = (32, 32)  # dims where lengths are what matters


def corpus(full: bool) -> Iterator[Plan]:
    programs = [*chunkings(), *masks(8), *trims((10, 258)), *restores((5, 256, 257)), *copies()]
    programs += windowed([*trims((10,)), *restores((5,))])
    for i, program in enumerate(programs):
        yield Plan(program=program, options=SETTINGS[i % len(SETTINGS)], batch=1 + i % 3, heads=1 + i % 2)
    small = [setting for setting in SETTINGS if setting["group_size"] == 32]
    for i, program in enumerate((steps(520), *walks(), *pairs())):
        yield Plan(program=program, options=small[i % len(small)], dims=SMALL)
    for setting in SETTINGS:
        yield Plan(program=feed(*[3] * 12, 1, 1), options=setting, batch=2, heads=3)


CONTRACT = CacheContract(
    name="quantized_kv_cache",
    signature="quantized_kv_cache(group_size=64, bits=8)",
    doc=(
        "update_and_fetch(keys, values) -> (codes u32, scales, biases) each, in MLX's affine layout, of all tokens.\n"
        "bits is 2, 3, 4, 6 or 8; 3 and 6, whose codes lie across words, are left out if it raises on them. A cache may"
        " return dequantised arrays instead. Values are within one quantisation of what"
        " was fed, scales and biases have its dtype, and codes are those of the same tokens quantised at once, however"
        " they were split into chunks, and never change. Otherwise as kv_cache."
    ),
    operations=("trim", "restore", "copy"),
    settings=SETTINGS,
    corpus=corpus,
    refusable=REFUSABLE,
    dims=(64, 128),
)
