"""batch_quantized_kv_cache(left_padding, group_size, bits): affine codes for rows of different lengths."""

from __future__ import annotations

from collections.abc import Iterator

from audits.cache_contract import CacheContract, Plan
from audits.contracts.batch_kv_cache import OPERATIONS, lengths, programs
from audits.contracts.quantized_kv_cache import REFUSABLE, SMALL
from audits.contracts.quantized_kv_cache import SETTINGS as QUANTISATIONS

SETTINGS = tuple({"left_padding": [0, 2], **setting} for setting in QUANTISATIONS)


def corpus(full: bool) -> Iterator[Plan]:
    for i, (program, left_padding) in enumerate(programs(full)):
        options = {"left_padding": left_padding, **QUANTISATIONS[i % len(QUANTISATIONS)]}
        yield Plan(program=program, options=options, heads=1 + i % 2)
    small = [setting for setting in QUANTISATIONS if setting["group_size"] == 32]
    for i, (program, left_padding) in enumerate(lengths(modulus=64)):
        yield Plan(program=program, options={"left_padding": left_padding, **small[i % len(small)]}, dims=SMALL)


CONTRACT = CacheContract(
    name="batch_quantized_kv_cache",
    signature="batch_quantized_kv_cache(left_padding, group_size=64, bits=8)",
    doc=(
        "update_and_fetch(keys, values) -> (codes u32, scales, biases) each, or dequantised arrays, of all columns.\n"
        "extract may give a cache of dequantised arrays; what went through extract or merge may have been quantised"
        " again, everything else keeps its codes. Otherwise as quantized_kv_cache and batch_kv_cache."
    ),
    operations=OPERATIONS,
    settings=SETTINGS,
    corpus=corpus,
    refusable=REFUSABLE,
    dims=(64, 128),
)
