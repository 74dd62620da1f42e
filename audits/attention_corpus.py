"""Boundary cases of attention: tiles, planes, sizes and adversarial values, each crossed with what it may meet.

Kernels differ by the number of queries (one, a few, a tile), by whether lengths fill their tiles, by head size, by how
many query heads share a key head and by the form of the mask. Residues are taken modulo 128, and so modulo each smaller
tile; L and S − L are varied independently.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from audits.attention_cases import SINKS, VALUES
from audits.attention_masks import PLANES
from audits.domain import Case
from audits.frameworks import DTYPES

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


# Numbers of keys from which on released engines take other kernels, more splits, or wider indices.
THRESHOLDS = (256, 1024, 4096, 8192, 32768)
# Head sizes of latent attention, and such as fill no simdgroup or no vector of 16.
RARE = ((192, 128), (576, 512), (512, "D"), (72, "D"), (112, "D"), (40, 72), (16, "D"), (120, 128))


def corpus(full: bool) -> Iterator[Case]:
    yield from _lengths(full)
    yield from _planes()
    yield from _blind()
    yield from _groups()
    yield from _values(full)
    yield from _sizes(full)
    yield from _shared()
    yield from _thresholds()
    yield from _long(full)


def _pick(i: int) -> Case:
    """Another mask, sinks and values for each i, in all pairings over a period of 9·4·11."""
    kinds = (
        "normal",
        "needle",
        "decoy",
        "positive",
        "peaked",
        "constant",
        "needle",
        "poisoned",
        "sparse",
        "decoy",
        "rising",
    )
    return {**MASKS[i % len(MASKS)], "sinks": SINKS[i % len(SINKS)], "values": kinds[i % len(kinds)]}


def _lengths(full: bool) -> Iterator[Case]:
    """L and S − L over all residues modulo 128, L modulo 8 with S modulo 16, and every S up to 128 for one query."""
    for i in range(128):
        L, rest = i + 1, (i // 8 - i) % 16 + 16 * (i % 8)
        yield {**_pick(i), "L": L, "S": L + rest, "r": 1 + i % 2}
    for S in range(1, 129):
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
    for i, (B, plane) in enumerate(product((2, 3), ("LS", "11LS", "B1LS", "1HLS", "B11S"))):
        # As many queries as batch rows or heads, so that a plane's axes taken for others' fit.
        yield {"B": B, "Hkv": 2, "r": 1 + i % 2, "L": B, "S": 9, "mask": "bool", "plane": plane, "values": "decoy"}
        yield {"B": 2, "Hkv": B, "r": 1, "L": B, "S": 9, "mask": "additive", "plane": plane, "values": "decoy"}


def _blind() -> Iterator[Case]:
    """Queries that see no key: hidden by every form of mask, or before the first key."""
    for plane, sinks in product(("LS", "B1LS", "BHLS"), ("none", "normal")):
        for L in (1, 4, 9):
            shape: Case = {**SHAPE, "L": L, "S": 13, "plane": plane, "pattern": "empty", "sinks": sinks}
            yield {**shape, "mask": "bool"}
            for fill in ("lowest", "large", "-inf", "mixed"):
                yield {**shape, "mask": "additive", "fill": fill}
    for i, (L, S) in enumerate(((2, 1), (3, 2), (8, 5), (9, 1), (17, 16), (33, 8), (40, 33), (70, 64), (130, 3))):
        for sinks in ("none", "normal"):
            yield {**SHAPE, "B": 1 + i % 2, "L": L, "S": S, "mask": "causal", "sinks": sinks}
        yield {**SHAPE, "L": L, "S": S, "mask": "bool", "pattern": "window", "W": 2, "plane": "BHLS"}
        yield {**SHAPE, "L": L, "S": S, "mask": "additive", "pattern": "causal", "plane": "B1LS"}


def _groups() -> Iterator[Case]:
    """Numbers of query heads on a key head that are no power of two, or more than a simdgroup's part."""
    for i, (r, Hkv) in enumerate(product((3, 5, 6, 7, 8, 12, 16, 24), (1, 2, 3))):
        L = (1, 1, 4, 9)[i % 4]
        yield {**_pick(i), "r": r, "Hkv": Hkv, "L": L, "S": 40 + i, "B": 1 + i % 2, "values": "needle"}


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
            yield {**_pick(i), "D": D, "Dv": Dv, "L": L, "S": (21, 150)[i // 2 % 2], "r": 2, "B": 2}
    for i, (D, Dv) in enumerate(RARE):
        for L in (1, 4, 33):
            yield {**_pick(3 * i + L), "D": D, "Dv": Dv, "L": L, "S": (37, 150)[L % 2], "r": 2, "scale": "rsqrt"}


def _shared() -> Iterator[Case]:
    """Operands that lie in memory once for all rows or heads."""
    for i, operand in enumerate(("mask", "k", "v", "q")):
        for j, (L, S) in enumerate(((1, 40), (5, 40), (33, 70))):
            shape: Case = {**SHAPE, "L": L, "S": S, "layout": "broadcast", "operand": operand, "values": "decoy"}
            if operand == "mask":
                for plane, mask in product(("same", "BHLS"), ("bool", "additive")):
                    yield {**shape, "mask": mask, "plane": plane, "pattern": ("random", "padding")[j % 2]}
            else:
                yield {**shape, **MASKS[(i + j) % len(MASKS)], "values": "alike"}


def _thresholds() -> Iterator[Case]:
    """Keys beyond where engines change kernels: each such length meets each pair of settings that a choice may look at.

    An orthogonal array: with a, b in 0 … 3, the columns a, b, a ⊕ b and two more products over GF(4) meet pairwise.
    """
    masks: list[Case] = [
        {},
        {"mask": "causal"},
        {"mask": "bool", "plane": "B1LS", "pattern": "window", "W": 17},
        {"mask": "additive", "plane": "BHLS", "fill": "-inf"},
    ]
    heads: list[Case] = [{"r": 2}, {"B": 2}, {"Hkv": 2}, {"B": 2, "Hkv": 2}]
    options: list[Case] = [{}, {"sinks": "large"}, {"sinks": "normal", "D": 64}, {"D": 128}]
    dtypes = (*DTYPES, "bfloat16")
    for t, n in enumerate(THRESHOLDS):
        for a, b in product(range(4), repeat=2):
            c, d, e = a ^ b, _twice(a) ^ b ^ t % 4, _twice(_twice(a)) ^ b ^ t % 4
            shape: Case = {"L": (1, 3, 1, 12)[c], "S": n + 5 + a + 4 * b, "values": ("decoy", "needle")[a // 2 ^ b % 2]}
            case = {**shape, **masks[a], **heads[b], **options[d], "dtype": dtypes[e]}
            yield {**case, "L": min(case["L"], 2), "D": 32} if n > 9000 else case


def _twice(a: int) -> int:
    """2·a over GF(4)."""
    return (0, 2, 3, 1)[a]


def _long(full: bool) -> Iterator[Case]:
    """Both sides of 2⁸, 2¹² and 2¹⁵: splits of the keys, and positions that don't fit into 16 bits."""
    for n in (256, 4096, 32768):
        for S in (n - 1, n, n + 1):
            yield {"L": 1, "S": S, "values": "needle", "r": 2 if n + 1 == S else 1}
        yield {"L": 2, "S": n + 3, "mask": "causal", "values": "needle"}
        yield {"L": 2, "S": n + 70, "mask": "bool", "pattern": "window", "W": 17, "values": "needle", "sinks": "normal"}
    for pattern, sinks in product(("block", "front", "edges"), ("normal", "large")):  # blocks or splits without a key
        for S in (300, 1000, 2500):
            hole: Case = {"L": 2, "S": S, "mask": "bool", "pattern": pattern, "sinks": sinks}
            yield {**hole, "values": "constant"}
            yield {**hole, "mask": "additive", "values": "decoy", "r": 2}
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
