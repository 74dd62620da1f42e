"""What the engine's Metal kernels have to compute, in float64, and how far honest arithmetic may be from it.

Nothing here comes from the kernels or their host side: blocks are decoded by the gguf package, the routed product is
written per pair. Bounds are those of Higham, Accuracy and Stability of Numerical Algorithms, ch. 3, per element.
n tokens, E experts, M rows, K elements of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

Array = np.ndarray[Any, np.dtype[Any]]

U32, U16 = 2.0**-24, 2.0**-11
# Elements and bytes of a block, and where its float16 scales are.
BLOCKS = {"Q8_0": (32, 34, (0,)), "Q4_K": (256, 144, (0, 2)), "Q2_K": (256, 84, (80, 82)), "IQ2_XXS": (256, 66, (0,))}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Operands of a routed projection: x (n, K) or (n, top_k, K), blocks (E, M, bytes), ids (n, top_k)."""

    kind: str
    x: Array
    blocks: Array
    ids: Array


def random_blocks(rng: np.random.Generator, kind: str, shape: tuple[int, ...], width: int) -> Array:
    """Random bytes with finite scales of both signs: every code, scale and sign occurs."""
    elements, size, halves = BLOCKS[kind]
    blocks = rng.integers(0, 256, (*shape, width // elements, size), dtype=np.uint8)
    for start in halves:
        d = (rng.uniform(0.5, 1.5, blocks.shape[:-1]) * rng.choice([-2e-3, 2e-3], blocks.shape[:-1])).astype(np.float16)
        blocks[..., start : start + 2] = d[..., None].view(np.uint8)
    return blocks.reshape(*shape, -1)


def routed_ids(rng: np.random.Generator, load: int, experts: int, top_k: int, idle: int = 1) -> Array:
    """(n, top_k) int32 with expert 0 chosen by exactly `load` tokens, the last `idle` experts by none.

    Slots are in random order, so that expert 0 is not always in the same one.
    """
    n = load + load // 3 + 1
    busy = experts - idle
    ids = np.stack([1 + rng.permutation(busy - 1)[:top_k] for _ in range(n)])
    chosen = rng.permutation(n)[:load]
    ids[chosen, rng.integers(0, top_k, load)] = 0
    return ids.astype(np.int32)


def make_case(
    kind: str, rhs: str, load: int, K: int, M: int = 70, *, experts: int = 5, top_k: int = 2, per_slot: bool = False
) -> Case:
    """A different x for every token (and slot), random blocks, expert 0 with `load` tokens, the last one with none."""
    rng = np.random.default_rng([load, K, M, top_k])
    ids = routed_ids(rng, load, experts, top_k)
    shape = (len(ids), top_k, K) if per_slot else (len(ids), K)
    return Case(
        kind=kind,
        x=rng.standard_normal(shape).astype(rhs),
        blocks=random_blocks(rng, kind, (experts, M), K),
        ids=ids,
    )


def routed(case: Case, *, half: bool) -> tuple[Array, Array]:
    """(n, top_k, M) float64 and its bound; half: from weights and x that are rounded to float16 first.

    Products of two float16 numbers are exact in float32; of a float32 x and a weight they round once more. A sum of K
    in any order, fused or not, is off by at most K (+ 1) roundoffs times Σ|w||x|, and by 6·√K of them in all but one of
    10⁸ cases (Higham & Mary 2019): the smaller, so that a sum rounded to float16 on its way is out of bounds.
    """
    weights = dequantize(case.blocks, GGMLQuantizationType[case.kind])
    x = case.x
    if half:
        weights, x = weights.astype(np.float16), x.astype(np.float16)
    K = x.shape[-1]
    x = np.broadcast_to(x.reshape(len(x), -1, K), (*case.ids.shape, K)).astype(np.float64)
    result, size = np.empty((2, *case.ids.shape, weights.shape[1]))
    for expert, w in enumerate(weights.astype(np.float64)):
        where = case.ids == expert
        result[where], size[where] = x[where] @ w.T, np.abs(x[where]) @ np.abs(w).T
    steps = min(K + 1, 6 * (K + 1) ** 0.5)
    return result, steps * U32 / (1 - steps * U32) * size


def assert_within(actual: Array, expected: Array, bound: Array | float, what: str = "") -> None:
    """|actual − expected| ≤ bound everywhere; NaN is a mismatch."""
    assert actual.shape == expected.shape
    error = np.abs(actual.astype(np.float64) - expected)
    wrong = ~(error <= bound)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        limit = np.broadcast_to(bound, error.shape)[at]
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} elements; first {at}: {actual[at]} for {expected[at]}, "
            f"off by {error[at]:.3g} where {limit:.3g} is allowed"
        )
