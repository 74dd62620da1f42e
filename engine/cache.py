"""Key-value caches, and the masks that fit what they return. B batch, Hkv heads, L new tokens, S keys, Dh head size.

KVCache keeps everything, in buffers that grow by STEP tokens. RotatingCache keeps the last `window` tokens in a ring:
the key of position p lies in slot p % window. A decode step (L = 1) gets the ring as it lies, rotated: attention
doesn't depend on the order of its keys, and exactly the keys in the ring are visible, so no mask is needed. A chunk
(L > 1) gets its keys in the order of their positions, because there the mask depends on them.

Nothing here trims, copies or merges a cache.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

# Tokens by which buffers grow: a write into spare room costs no copy of what is there. The value is mlx-lm's.
STEP = 256

Mask = mx.array | str | None


class Cache(Protocol):
    """What attention needs of a cache; `offset` is the position of the next token."""

    offset: int

    def mask(self, L: int) -> Mask:
        """The mask for the next `update` of L tokens, in the form that mx.fast.scaled_dot_product_attention takes."""
        ...

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """(B, Hkv, L, Dh) new keys and values → (B, Hkv, S, Dh) those that the new tokens may look at."""
        ...

    @property
    def state(self) -> list[mx.array]:
        """The arrays that must be evaluated with the step, or the graph grows from step to step."""
        ...


class KVCache:
    """Every key and value so far, in the order of positions."""

    def __init__(self) -> None:
        self.offset = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def mask(self, L: int) -> Mask:
        """Causal. MLX aligns "causal" at the bottom right, which is right because S = offset + L always."""
        return None if L == 1 else "causal"

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """(B, Hkv, L, Dh) → (B, Hkv, offset + L, Dh), ordered by position."""
        end = self.offset + keys.shape[2]
        self._keys = _write(self._keys, keys, self.offset)
        self._values = _write(self._values, values, self.offset)
        self.offset = end
        return self._keys[..., :end, :], self._values[..., :end, :]

    @property
    def state(self) -> list[mx.array]:
        """The two buffers, once there are any."""
        return [x for x in (self._keys, self._values) if x is not None]


class RotatingCache:
    """The last `window` keys and values: slot p % window holds position p."""

    def __init__(self, window: int) -> None:
        self.offset = 0
        self.window = window
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def mask(self, L: int) -> Mask:
        """Key j is visible to query i iff i − window < j ≤ i; "causal" while the window can't bind yet."""
        if L == 1:
            return None
        if self.offset + L <= self.window:
            return "causal"
        queries = mx.arange(self.offset, self.offset + L)[:, None]
        keys = mx.arange(self.offset - self._reach(), self.offset + L)[None]
        return (keys <= queries) & (keys > queries - self.window)

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """(B, Hkv, L, Dh) → (B, Hkv, S, Dh): L = 1, the ring as it lies; else reach + L keys ordered by position."""
        L = keys.shape[2]
        if L == 1:
            slot = self.offset % self.window
            self._keys = _write(self._keys, keys, slot, self.window)
            self._values = _write(self._values, values, slot, self.window)
            self.offset += 1
            held = min(self.offset, self.window)
            return self._keys[..., :held, :], self._values[..., :held, :]
        keys, values = self._joined(self._keys, keys), self._joined(self._values, values)
        self.offset += L
        self._keys, self._values = self._ring(keys), self._ring(values)
        return keys, values

    @property
    def state(self) -> list[mx.array]:
        """The two rings, once there are any."""
        return [x for x in (self._keys, self._values) if x is not None]

    def _reach(self) -> int:
        """How many earlier keys the next token can look at besides its own."""
        return min(self.offset, self.window - 1)

    def _joined(self, ring: mx.array | None, new: mx.array) -> mx.array:
        """The last `reach` positions before `new`, in order, then `new`."""
        reach = self._reach()
        if ring is None or reach == 0:
            return new
        first = (self.offset - reach) % self.window
        last = (self.offset - 1) % self.window
        if first <= last:
            return mx.concatenate([ring[..., first : last + 1, :], new], axis=2)
        return mx.concatenate([ring[..., first : self.window, :], ring[..., : last + 1, :], new], axis=2)

    def _ring(self, ordered: mx.array) -> mx.array:
        """The ring that ends with `ordered`, whose last key has position offset − 1."""
        held = min(self.offset, self.window)
        newest = ordered[..., ordered.shape[2] - held :, :]
        # The oldest kept position is offset − held; slot 0 belongs to the multiple of `window` among those kept.
        turn = (self.offset - held) % self.window
        if turn == 0:
            return mx.contiguous(newest)
        return mx.concatenate([newest[..., held - turn :, :], newest[..., : held - turn, :]], axis=2)


def _write(buffer: mx.array | None, new: mx.array, start: int, limit: int | None = None) -> mx.array:
    """`buffer` (B, Hkv, capacity, Dh) with `new` at slots start…, grown by whole STEPs, to `limit` slots at most."""
    B, heads, L, width = new.shape
    end = start + L
    capacity = 0 if buffer is None else buffer.shape[2]
    if end > capacity:
        size = -(-end // STEP) * STEP
        spare = mx.zeros((B, heads, (size if limit is None else min(size, limit)) - start, width), new.dtype)
        buffer = spare if buffer is None or start == 0 else mx.concatenate([buffer[..., :start, :], spare], axis=2)
    assert buffer is not None
    buffer[..., start:end, :] = new
    return buffer


def make_cache(layer_types: tuple[str, ...], sliding_window: int) -> list[Cache]:
    """One empty cache a layer: a ring for sliding layers, a plain one for full layers."""
    return [RotatingCache(sliding_window) if kind == "sliding_attention" else KVCache() for kind in layer_types]
