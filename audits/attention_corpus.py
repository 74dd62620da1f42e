"""Boundary cases of attention: tiles, planes, sizes and adversarial values, each crossed with what it may meet.

Kernels differ by the number of queries (one, a few, a tile), by whether lengths fill their tiles, by head size and by
the form of the mask. Residues are taken modulo 128, and so modulo each smaller tile; L and S − L are varied
independently.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from audits.attention_cases import SINKS, VALUES
from audits.attention_masks import PLANES
from audits.domain import Case, residues

# One setting of the options each, over one shape as far as they allow, so that a kernel kept by shape alone shows.
SHAPE: Case = {"B": 2, "Hkv": 2, "r": 2, "L": 3, "S": 11}
BASES: list[Case] = [
    SHAPE,
    {**SHAPE, "mask": "causal"},
    {**SHAPE, "mask": "bool", "plane": "BHLS"},
    {**SHAPE, "mask": "additive", "plane": "BHLS", "fill": "mixed"},
    {**SHAPE, "mask": "bool", "plane": "B1LS", "pattern": "window", "W": 2, "sinks": "normal"},
    {**SHAPE, "mask": "causal", "sinks": "large", "scale": 1.0},
    {**SHAPE, "L": 1},
    {**SHAPE, "Hkv": 1, "r": 4, "mask": "additive", "plane": "1HLS", "fill": "lowest", "Dv": 64},
]
# Masks in turn, for what is not about masks.
MASKS: list[Case] = [
    {"mask": "causal"},
    {"mask": "bool"},
    {"mask": "none"},
    {"mask": "bool", "pattern": "window", "W": 17},
    {"mask": "additive", "fill": "mixed"},
    {"mask": "bool", "pattern": "padding", "plane": "B1LS"},
    {"mask": "additive", "pattern": "causal", "fill": "lowest"},
    {"mask": "bool", "pattern": "block"},
    {"mask": "additive", "pattern": "window", "fill": "large", "W": 5},
]


def corpus(full: bool) -> Iterator[Case]:
    yield from _lengths(full)
    yield from _planes()
    yield from _values(full)
    yield from _sizes(full)
    yield from _long(full)


def _pick(i: int) -> Case:
    """Another mask, sinks and values for each i, in all pairings over a period of 9·4·7."""
    kinds = ("normal", "needle", "positive", "peaked", "constant", "poisoned", "sparse")
    return {**MASKS[i % len(MASKS)], "sinks": SINKS[i % len(SINKS)], "values": kinds[i % len(kinds)]}


def _lengths(full: bool) -> Iterator[Case]:
    """L and S − L over all residues modulo 128, and every S up to 128 for one query."""
    pairs = zip(*residues(128, 2, 1), strict=True)
    for i, (L, rest) in enumerate(pairs):
        if full or i % 2 == 0:
            yield {**_pick(i), "L": L, "S": L + rest - 1, "r": 1 + i % 2}
    for S in range(1, 129 if full else 67):
        yield {**_pick(S), "L": 1, "S": S, "Hkv": 1 + S % 2, "r": (1, 2, 4)[S % 3], "B": 1 + S % 2}
    for S in () if full else (95, 96, 97, 127, 128, 129):
        yield {"L": 1, "S": S, "r": 4, "values": "needle"}
    for L in range(2, 34):  # few queries: a kernel of its own in many engines, up to 8 of them
        yield {**_pick(L), "L": L, "S": L + (L * 13) % 32, "B": 2, "r": 2}


def _planes() -> Iterator[Case]:
    """Every plane of a mask with coinciding numbers of batch rows and heads: a plane taken for another shows."""
    for i, (B, Hkv, r) in enumerate(product((1, 2, 3), (1, 2, 3), (1, 2, 4))):
        shape: Case = {"B": B, "Hkv": Hkv, "r": r, "L": 1 + (i % 4), "S": 5 + i % 7}
        for j, plane in enumerate(PLANES):
            if B * Hkv * r == 1 and plane != "LS":
                continue
            if (i + j) % 2 == 0:
                yield {**shape, "mask": "bool", "plane": plane, "sinks": SINKS[(i + j) // 2 % 2]}
            else:
                yield {**shape, "mask": "additive", "plane": plane, "fill": ("mixed", "-inf", "bias")[(i + j) // 2 % 3]}
    for plane, sinks in product(("LS", "B1LS", "BHLS"), ("none", "normal")):  # queries that see nothing
        for L in (1, 4, 9):
            shape = {**SHAPE, "L": L, "S": 13, "plane": plane, "pattern": "empty", "sinks": sinks}
            yield {**shape, "mask": "bool"}
            yield {**shape, "mask": "additive", "fill": "lowest"}
            if sinks != "none":
                yield {**shape, "mask": "additive", "fill": "-inf"}


def _values(full: bool) -> Iterator[Case]:
    """Every kind of values under every form of mask and sinks, for one query and for some."""
    for i, (values, mask) in enumerate(product(VALUES, MASKS)):
        scale = 1.0 if values == "far" else ("rsqrt", 0.3)[i % 2]
        for j, sinks in enumerate(SINKS):
            # A sink outweighs scores that are all far below it: without one, too.
            if full or (i + j) % 4 == 0 or (values, sinks) == ("far", "none"):
                shape: Case = {"L": (1, 5)[(i + j) % 2], "S": 37, "r": 2, "B": 1 + i % 2, "scale": scale}
                yield {**mask, **shape, "values": values, "sinks": sinks}
    for L, S, sinks in product((1, 3), (1, 2), SINKS[:2]):  # two keys in full precision: nothing averages out
        for values in ("sparse", "normal", "far"):
            scale = 1.0 if values == "far" else "rsqrt"
            yield {"L": L, "S": S, "Hkv": 3, "values": values, "sinks": sinks, "scale": scale}


def _sizes(full: bool) -> Iterator[Case]:
    """Every head size with every value size, for one query and for some."""
    for i, (D, Dv) in enumerate(product((32, 64, 80, 96, 128, 256), ("D", 32, 64, 128))):
        for L in (1, 4) if full else ((1, 4)[i % 2],):
            yield {**_pick(i), "D": D, "Dv": Dv, "L": L, "S": 21, "r": 2, "B": 2}


def _long(full: bool) -> Iterator[Case]:
    """Both sides of 2⁸, 2¹² and 2¹⁵: splits of the keys, and positions that don't fit into 16 bits."""
    for n in (256, 4096, 32768):
        for S in (n - 1, n, n + 1):
            yield {"L": 1, "S": S, "values": "needle", "r": 2 if n + 1 == S else 1}
        yield {"L": 2, "S": n + 3, "mask": "causal", "values": "needle"}
        yield {"L": 2, "S": n + 70, "mask": "bool", "pattern": "window", "W": 17, "values": "needle", "sinks": "normal"}
    yield {"L": 2, "S": 1000, "mask": "bool", "pattern": "block", "sinks": "normal", "values": "constant"}
    yield {"L": 1, "S": 700, "values": "positive", "B": 2, "Hkv": 2, "r": 2}
    yield {"L": 4, "S": 520, "values": "positive", "mask": "causal"}
    two = {"B": 2, "Hkv": 2, "r": 2, "values": "needle"}  # decode over many keys has kernels of its own, in two passes
    yield {**two, "L": 1, "S": 1100, "D": 64}
    yield {**two, "L": 1, "S": 2100, "D": 128, "sinks": "large"}
    yield {**two, "L": 1, "S": 1500, "mask": "bool", "plane": "B1LS", "pattern": "window", "W": 17, "sinks": "large"}
    yield {**two, "L": 1, "S": 4200, "Hkv": 1, "r": 4, "mask": "additive", "fill": "-inf", "plane": "BHLS"}
    yield {**two, "L": 5, "S": 1030, "mask": "causal", "sinks": "large"}
    yield {"L": 33, "S": 1060, "mask": "causal", "values": "needle", "D": 64}
    yield {"L": 1, "S": 8195, "values": "needle"}
    yield {"L": 3, "S": 33100, "mask": "additive", "pattern": "block", "fill": "-inf", "values": "needle"}
    if full:
        for L in np.arange(250, 262):
            yield {"L": int(L), "S": int(2 * L), "mask": "causal", "values": "needle"}
