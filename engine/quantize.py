"""Quantisers to llama.cpp's block formats, in NumPy: Q8_0, Q4_K, Q2_K and IQ2_XXS.

They exist so that the kernels which read these formats can be run on real weights: the `gguf` package reads every one
of them and writes Q8_0 alone. Each minimises Σ importance·(decoded − value)² over candidate scales, by rounding to the
nearest code and keeping the best, as llama.cpp does with other candidates and weights; the bytes are not llama.cpp's.
Errors are those of the decoded float32 value, so what the search compares is what a reader of the block gets. Values
that a quantiser here has produced go through it unchanged, but for some blocks of mostly zeros (`_settle`).

Relative L2 error on a million Gaussian values and on the shipped model's 12.6 million expert weights, which take 1, 11,
9 and 18 seconds on one core; printed by `python -m engine.quantize goldens/model`:

          bits   Gaussian  gate_proj  up_proj    down_proj
Q8_0      8.5    0.0049    0.0049     0.0049     0.0052
Q4_K      4.5    0.0697    0.0698     0.0695     0.0719
Q2_K      2.625  0.2621    0.2619     0.2614     0.2673
IQ2_XXS   2.0625 0.3270    0.3271     0.3269     0.3301
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.quantize_iq2 import fit_iq2_xxs
from engine.quantize_k import fit_q2_k, fit_q4_k, ordered_sum

Array = np.ndarray[Any, np.dtype[Any]]
# Blocks fitted at once: their candidates' arrays stay in a CPU's second-level cache. A choice of speed alone.
_CHUNK_ELEMENTS = 1 << 15
_LARGEST_HALF = np.float16(65504)
# Rounds after which, and growth of the squared error beyond which, a block is left as its first search found it.
_ROUNDS = 16
_MOST_LOST = 1.25


@dataclass(frozen=True, kw_only=True)
class Fit:
    """blocks (…, bytes) uint8 and the values (…, elements) float32 that they were meant to decode to."""

    blocks: Array
    values: Array


def quantize(values: Array, kind: str, importance: Array | None = None) -> Array:
    """(…, elements) → (…, bytes) uint8 blocks of format `kind` (Q8_0, Q4_K, Q2_K, IQ2_XXS).

    values are taken as float32. importance (broadcast against values, ≥ 0) weighs the squared errors; None weighs them
    alike. Raises ValueError for other formats, rows that are not whole blocks, values that are not finite, and values
    whose scale a float16 can't hold.
    """
    return fit(values, kind, importance).blocks


def fit(values: Array, kind: str, importance: Array | None = None) -> Fit:
    """(…, elements) → the blocks of `quantize` and the float32 values that they decode to."""
    if kind not in QUANTIZERS:
        raise ValueError(f"{kind} blocks can't be written; one of {', '.join(QUANTIZERS)} is expected")
    elements, block_bytes, search = QUANTIZERS[kind]
    x = np.ascontiguousarray(values, np.float32)
    if x.ndim == 0 or x.shape[-1] % elements:
        raise ValueError(f"{kind}: a row of shape {x.shape} is not a whole number of blocks of {elements} elements")
    weight = _weights(importance, x)
    _check(x, kind)
    rows = x.reshape(-1, elements)
    blocks = np.empty((len(rows), block_bytes), np.uint8)
    decoded = np.empty_like(rows)
    step = _CHUNK_ELEMENTS // elements
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        weighed = None if weight is None else weight.reshape(-1, elements)[part]
        blocks[part], decoded[part] = _settle(search, rows[part], weighed)
    shape = (*x.shape[:-1], x.shape[-1] // elements * block_bytes)
    return Fit(blocks=blocks.reshape(shape), values=decoded.reshape(x.shape))


Search = Callable[[Array, Array | None], tuple[Array, Array]]


def _settle(search: Search, x: Array, weight: Array | None) -> tuple[Array, Array]:
    """The search's result, moved on to one that the search leaves as it is, where that costs little.

    A run has more than one description (codes that share a factor, or start above 0), so the search may take values it
    has made for values of other scales and change them a little. Such a block becomes what its values become, until
    nothing changes: a few rounds for one in ten. A K-quant's block that would lose by it stays as found: of Gaussian
    values none, even with half of them zeros; 2% to 5% of blocks with 80% zeros, a third with 95%.
    """
    blocks, values = search(x, weight)
    moving = np.arange(len(x))
    moved_blocks, moved = blocks.copy(), values.copy()
    for _ in range(_ROUNDS):
        again, after = search(moved[moving], None if weight is None else weight[moving])
        changed = (after != moved[moving]).any(axis=-1)
        moving = moving[changed]
        if not len(moving):
            break
        moved_blocks[moving], moved[moving] = again[changed], after[changed]
    settled = _error(x, weight, moved) <= _MOST_LOST * _error(x, weight, values)
    settled[moving] = False
    return np.where(settled, moved_blocks, blocks), np.where(settled, moved, values)


def _error(x: Array, weight: Array | None, values: Array) -> Array:
    """(n, elements) → (n, 1) weighted squared error."""
    error = np.square(values - x)
    return ordered_sum(error if weight is None else weight * error)


def _weights(importance: Array | None, x: Array) -> Array | None:
    if importance is None:
        return None
    weight = np.ascontiguousarray(np.broadcast_to(np.asarray(importance, np.float32), x.shape))
    if not (np.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError("importance has entries that are negative or not finite")
    return weight


def _check(x: Array, kind: str) -> None:
    if not np.isfinite(x).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise ValueError(f"{kind}: element {where} is {x[where]}; only finite values can be quantised")
    limit = _LIMITS[kind]
    if x.size and np.abs(x).max() > limit:
        where = tuple(int(i) for i in np.unravel_index(np.abs(x).argmax(), x.shape))
        raise ValueError(f"{kind}: element {where} is {x[where]}; beyond ±{limit:.6g} the block's scale leaves float16")


def _fit_q8_0(x: Array, weight: Array | None) -> tuple[Array, Array]:
    """(n, 32): d (float16) and 32 codes of ±127. Candidates put the largest value at code 124 to 127.5."""
    largest = np.abs(x).max(axis=-1)
    best = np.full(len(x), np.inf, np.float32)
    d, values = np.zeros((len(x), 1), np.float16), np.zeros_like(x)
    codes = np.zeros(x.shape, np.int8)
    for top in (127.0, 127.5, 126.5, 126.0, 125.5, 125.0, 124.5, 124.0):
        nearest = np.minimum(largest / np.float32(top), np.float32(_LARGEST_HALF)).astype(np.float16)
        for scale in (nearest, np.nextafter(nearest, _LARGEST_HALF)) if top == 127.0 else (nearest,):
            step = scale.astype(np.float32)[:, None]
            inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
            q = np.clip(np.rint(x * inverse), -127, 127)
            decoded = step * q
            error = np.square(decoded - x)
            total = ordered_sum(error if weight is None else weight * error)[..., 0]
            wins = total < best
            best[wins], d[wins, 0] = total[wins], scale[wins]
            codes[wins], values[wins] = q[wins].astype(np.int8), decoded[wins]
    return np.concatenate([d.view(np.uint8), codes.view(np.uint8)], axis=-1), values


# Elements and bytes of a block, and its search: (n, elements) float32 → (n, bytes) uint8 and the decoded float32.
QUANTIZERS: dict[str, tuple[int, int, Search]] = {
    "Q8_0": (32, 34, _fit_q8_0),
    "Q4_K": (256, 144, fit_q4_k),
    "Q2_K": (256, 84, fit_q2_k),
    "IQ2_XXS": (256, 66, fit_iq2_xxs),
}
# Largest magnitude whose scale is a finite float16 (65504) for either sign: times the largest code of the format,
# for IQ2_XXS 31/8 · 43, and for negative values of the K-quants the min's largest code.
_LIMITS = {"Q8_0": 65504.0 * 127, "Q4_K": 65504.0 * 63, "Q2_K": 65504.0 * 15, "IQ2_XXS": 65504.0 * 31 / 8 * 43}


def main(arguments: Sequence[str]) -> None:
    """Prints the table of losses above; arguments: a model folder, or none for Gaussian values alone."""
    columns: dict[str, list[Array]] = {"Gaussian": [np.random.default_rng(0).standard_normal((1024, 1024), np.float32)]}
    for folder in arguments:
        columns |= _experts(Path(folder))
    print("".join(f"{name:10}" for name in ("", *columns)))
    for kind in QUANTIZERS:
        losses = (_loss(kind, tensors) for tensors in columns.values())
        print(f"{kind:10}" + "".join(f"{loss:<10.4f}" for loss in losses), flush=True)


def _loss(kind: str, tensors: Iterable[Array]) -> float:
    """Relative L2 error over all tensors together."""
    pairs = [(np.square(fit(x, kind).values - x, dtype=np.float64).sum(), np.square(x).sum()) for x in tensors]
    error, size = (sum(column) for column in zip(*pairs, strict=True))
    return float(np.sqrt(error / size))


def _experts(folder: Path) -> dict[str, list[Array]]:
    """gate_proj, up_proj and down_proj of every layer's experts, each [E, out, in] in float32."""
    # Imported here: quantising needs neither MLX nor a checkpoint.
    import mlx.core as mx

    found: dict[str, list[Array]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = mx.load(str(path))
        assert isinstance(tensors, dict)
        for name, tensor in tensors.items():
            if ".mlp.experts." in name:
                found.setdefault(name.split(".")[-2], []).append(np.array(tensor.astype(mx.float32)))
    return dict(sorted(found.items(), key=lambda item: ("gate_proj", "up_proj", "down_proj").index(item[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
