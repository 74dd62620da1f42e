"""Tokens that say where they come from, and what each row of a cache must show, in plain Python.

Every key and value is a vector of ±1 that spells its row, head, position and kind in binary, so that a dequantised one
can still be read. A padding token spells no row. `Row` is the model of one sequence: what it was fed and what the
cache's rules leave visible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine import caches
from engine.caches.layer import LayerCache

Array = np.ndarray[Any, np.dtype[Any]]
HEADS, DK, DV = 2, 64, 32
# Bits of row, head, position and kind (key or value), and the row that padding has.
WIDTHS, PAD = (5, 3, 10, 1), 31


def spell(row: int, head: int, position: int, kind: int, width: int) -> Array:
    """[width] of ±1."""
    bits = [value >> i & 1 for value, n in zip((row, head, position, kind), WIDTHS, strict=True) for i in range(n)]
    return np.resize(np.array(bits, np.float32) * 2 - 1, width)


def read(x: mx.array) -> Array:
    """[…, width] → int [..., 4]: row, head, position, kind."""
    bits = np.array(x.astype(mx.float32)) > 0
    ends = np.cumsum(WIDTHS)
    parts = [bits[..., end - n : end] @ (1 << np.arange(n)) for end, n in zip(ends, WIDTHS, strict=True)]
    return np.stack(parts, axis=-1)


def tokens(
    columns: Sequence[Sequence[tuple[int, int] | None]], dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, mx.array]:
    """Keys [B, H, n, DK] and values [B, H, n, DV] of tokens (row, position), None for padding, by row and column."""
    made = []
    for kind, width in ((0, DK), (1, DV)):
        rows = [
            [[spell(*(token or (PAD, 0))[:1], h, (token or (PAD, 0))[1], kind, width) for token in row]
             for h in range(HEADS)] for row in columns
        ]  # fmt: skip
        made.append(mx.array(np.array(rows, np.float32)).astype(dtype))
    return made[0], made[1]


def dense(stored: Any, cache: LayerCache) -> mx.array:
    """What a cache returned, as values."""
    if isinstance(stored, mx.array):
        return stored
    codec = cache.codec
    return mx.dequantize(*stored, group_size=codec.group_size, bits=codec.bits)  # type: ignore[union-attr]


def seen(mask: Any, B: int, n: int, S: int) -> Array:
    """Bool [B, n, S] of a mask in any of its forms; "causal" is aligned at the bottom right."""
    if mask is None:
        return np.ones((B, n, S), bool)
    if isinstance(mask, str):
        assert mask == "causal"
        return np.broadcast_to(np.tri(n, S, S - n, dtype=bool), (B, n, S))
    x = np.array(mask)
    assert x.dtype == np.bool_
    full = np.broadcast_to(x, (B, *([1] if x.ndim == 4 else []), n, S))
    return full.reshape(B, n, S)


@dataclass
class Row:
    """One sequence: its name, how many tokens it has been fed, and the first that chunking has left."""

    name: int
    length: int = 0
    start: int = 0

    def visible(self, position: int, kind: Kind) -> list[int]:
        """The positions that the query at `position` must see, in the order of time."""
        rules = kind.rules
        near = 0 if "max_size" not in rules else position + 1 - (rules["max_size"] - rules.get("keep", 0))
        return [j for j in range(self.start, position + 1) if j < rules.get("keep", 0) or j >= near]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of cache: how to make one of a row and of a batch, and its rules."""

    name: str
    single: Callable[[], Any]
    batch: Callable[[Sequence[int]], Any]
    rules: dict[str, int]


def _window(size: int, keep: int) -> Kind:
    return Kind(
        name=f"rotating-{size}-{keep}",
        single=lambda: caches.RotatingKVCache(size, keep),
        batch=lambda padding: caches.BatchRotatingKVCache(size, padding, keep),
        rules={"max_size": size, "keep": keep},
    )


def _packed(name: str, bits: int) -> Kind:
    single = getattr(caches, f"{name}KVCache")
    batch = getattr(caches, f"Batch{name}KVCache")
    return Kind(
        name=f"{name.lower()}-{bits}",
        single=lambda: single(group_size=32, bits=bits),
        batch=lambda padding: batch(padding, group_size=32, bits=bits),
        rules={"bits": bits},
    )


KINDS = [
    Kind(name="plain", single=caches.KVCache, batch=caches.BatchKVCache, rules={}),
    _window(8, 0),
    _window(8, 3),
    _window(5, 4),
    _window(1, 0),
    Kind(
        name="chunked",
        single=lambda: caches.ChunkedKVCache(6),
        batch=lambda padding: caches.BatchChunkedKVCache(6, padding),
        rules={"chunk_size": 6},
    ),
    _packed("Quantized", 4),
    _packed("Dequantizing", 8),
]


def feed(cache: Any, rows: Sequence[Row], columns: Sequence[Sequence[bool]], kind: Kind) -> None:
    """Feed a chunk, True for a real token, and check what each real query sees: which tokens, in order, of whom."""
    B, n = len(rows), len(columns[0])
    named = []
    for row, real in zip(rows, columns, strict=True):
        following = iter(range(row.length, row.length + n))
        named.append([(row.name, next(following)) if r else None for r in real])
    mask = cache.make_mask(n)
    keys, values = cache.update_and_fetch(*tokens(named))
    found = [read(dense(x, cache)) for x in (keys, values)]
    S = found[0].shape[2]
    shown = seen(mask, B, n, S)
    for b, row in enumerate(rows):
        for i, token in enumerate(named[b]):
            if token is None:
                continue
            expected = row.visible(token[1], kind)
            for part, x in enumerate(found):
                for h in range(HEADS):
                    actual = x[b, h][shown[b, i]].tolist()
                    assert actual == [[row.name, h, j, part] for j in expected], (kind.name, row, i, h, part)
        row.length += sum(columns[b])


def same(a: Any, b: Any) -> bool:
    """Whether two trees of arrays are equal, shapes and dtypes included."""
    if isinstance(a, mx.array) and isinstance(b, mx.array):
        return a.shape == b.shape and a.dtype == b.dtype and bool(mx.array_equal(a, b))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is None and b is None


def random_tokens(B: int, n: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    keys, values = (mx.array(rng.standard_normal((B, HEADS, n, w)).astype(np.float32)) for w in (DK, DV))
    return keys.astype(dtype), values.astype(dtype)


by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def lived(kind: Kind) -> Any:
    """A batch of three rows that has been prefilled, finalised, decoded and filtered."""
    cache, rows = kind.batch([0, 0, 0, 0]), [Row(i) for i in range(4)]
    cache.prepare(lengths=[9, 2, 5, 7], right_padding=[0, 7, 4, 2])
    feed(cache, rows, [[c < n for c in range(6)] for n in (9, 2, 5, 7)], kind)
    feed(cache, rows, [[c < n for c in range(6, 9)] for n in (9, 2, 5, 7)], kind)
    cache.finalize()
    feed(cache, rows, [[True]] * 4, kind)
    cache.filter([3, 0, 1])
    return cache, [rows[i] for i in (3, 0, 1)]


def alone(kind: Kind) -> Any:
    cache, row = kind.single(), Row(5)
    for n in (7, 1, 4, 1):
        feed(cache, [row], [[True] * n], kind)
    return cache, [row]
