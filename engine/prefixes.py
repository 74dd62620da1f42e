"""Prefix checkpoints: the keys and values of a prompt's beginning, kept so that the next prompt needn't prefill it.

A checkpoint is taken at once: its arrays are computed and its own when `take` returns, so that nothing done later to
the live caches, or to a loop variable, can change it. It's restored into the caches that a cold start would make, so
that a restored row has the class of its neighbours: plain values are quantised on their way into a quantised batch, and
codes go back as they are into caches of the same quantisation. Into any other they go dequantised, and come close, not
equal; a prefix that grew by a turn and was requantised at each would drift (by 8 bits in bfloat16, past what those
lose after eight turns). What doesn't fit exactly is refused, and the prompt starts cold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from engine.caches import DequantizingKVCache, KVCache, QuantizedKVCache, RotatingKVCache

Caches = list[Any]
# What makes the empty single-row caches, one a layer, that a cold start begins with.
Factory = Callable[[], Caches]


class Layout(NamedTuple):
    """What a model's keys and values look like: Hkv heads of size Dh, and the run's dtype."""

    heads: int
    head_dim: int
    dtype: mx.Dtype


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Keys and values [1, Hkv, n, Dh] of the n of `offset` positions that are kept, oldest first.

    kind: "full" for all, or "window W keep K" for the first K and the last W − K. keys and values are one array each,
    or the codes, scales and biases that `codec` ("group_size=64 bits=8 mode=affine") describes; "" for one array.
    """

    kind: str
    offset: int
    keys: tuple[mx.array, ...]
    values: tuple[mx.array, ...]
    codec: str = ""

    def plain(self) -> tuple[mx.array, mx.array]:
        """Keys and values as one array each, in the run's dtype."""
        if not self.codec:
            return self.keys[0], self.values[0]
        keys, values = (_decoded(x, self.codec) for x in (self.keys, self.values))
        return keys, values

    @property
    def layouts(self) -> list[Layout]:
        """What the keys and the values look like once they're plain."""
        group = int(self.codec.split()[0].partition("=")[2]) if self.codec else 1
        # Of codes, the scales have the heads and the dtype, and one column a group.
        shown = [x[1] if self.codec else x[0] for x in (self.keys, self.values)]
        return [Layout(x.shape[1], x.shape[3] * group, x.dtype) for x in shown]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The layers after `tokens` were fed, and nothing else was."""

    tokens: tuple[int, ...]
    layers: tuple[Layer, ...]

    @property
    def token_count(self) -> int:
        """How many tokens a restored row needn't be fed."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """The bytes of all keys and values."""
        return sum(x.nbytes for layer in self.layers for x in layer.keys + layer.values)


def take(tokens: Sequence[int], caches: Caches) -> Checkpoint:
    """The checkpoint of one row's caches, which have been fed exactly `tokens`; of a batch, `extract` the row first.

    Raises ValueError when a cache has seen another number of tokens, holds several rows, or is of a class that can't be
    restored: a recurrent state, a composite, or a subclass of what can.
    """
    if not tokens:
        raise ValueError("tokens is empty; a checkpoint has at least one")
    for i, cache in enumerate(caches):
        if _kind(cache) is None:
            raise ValueError(f"layer {i}'s cache is a {type(cache).__name__}; checkpoints know plain and sliding ones")
        if cache.offset != len(tokens):
            raise ValueError(f"layer {i}'s cache holds {cache.offset} tokens; the {len(tokens)} given are expected")
    layers = tuple(_layer(cache) for cache in caches)
    mx.eval([(layer.keys, layer.values) for layer in layers])
    return Checkpoint(tokens=tuple(int(token) for token in tokens), layers=layers)


def restore(
    checkpoint: Checkpoint, prompt: Sequence[int], factory: Factory, layout: Layout | None = None
) -> Caches | None:
    """Caches of `factory` that hold the checkpoint; None, for a cold start, unless it fits.

    It fits if it's a proper prefix of `prompt`, with as many layers as the factory makes, the same kind in each, and
    arrays of `layout`.
    """
    n = checkpoint.token_count
    if not 1 <= n < len(prompt) or tuple(prompt[:n]) != checkpoint.tokens:
        return None
    caches = factory()
    if len(caches) != len(checkpoint.layers):
        return None
    try:
        for cache, layer in zip(caches, checkpoint.layers, strict=True):
            if _kind(cache) != layer.kind or not _is_whole(cache, layer, n, layout):
                return None
            _fill(cache, layer)
    except (ValueError, LookupError):  # a codec that isn't one, or groups that don't divide the head size
        return None
    mx.eval([cache.state for cache in caches])
    return caches


class Prefixes:
    """Checkpoints in memory, at most `max_bytes` of keys and values; the least recently used leave first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[tuple[int, ...], Checkpoint] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """The bytes of all keys and values kept."""
        return sum(checkpoint.nbytes for checkpoint in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, checkpoint: Checkpoint) -> bool:
        """Keep `checkpoint`, in place of one of the same tokens; one above the budget is refused, and evicts none."""
        if checkpoint.nbytes > self.max_bytes:
            return False
        self._kept.pop(checkpoint.tokens, None)
        while self.nbytes + checkpoint.nbytes > self.max_bytes:
            self._kept.popitem(last=False)
        self._kept[checkpoint.tokens] = checkpoint
        return True

    def restore(
        self, prompt: Sequence[int], factory: Factory, layout: Layout | None = None
    ) -> tuple[Caches, int] | None:
        """Caches of `factory` with the longest kept prefix of `prompt`, and its length; None: start cold.

        One that doesn't fit is forgotten, and the next shorter one tried.
        """
        ids = tuple(prompt)
        fitting = [key for key in self._kept if len(key) < len(ids) and ids[: len(key)] == key]
        for key in sorted(fitting, key=len, reverse=True):
            caches = restore(self._kept[key], ids, factory, layout)
            if caches is not None:
                self._kept.move_to_end(key)
                return caches, len(key)
            del self._kept[key]
        return None


def _decoded(parts: tuple[mx.array, ...], codec: str) -> mx.array:
    codes, scales, biases = parts
    by = dict(item.split("=", 1) for item in codec.split())
    return mx.dequantize(codes, scales, biases, group_size=int(by["group_size"]), bits=int(by["bits"]), mode=by["mode"])


def _kind(cache: Any) -> str | None:
    """What a checkpoint must agree in with the cache that it goes to; None for a class that isn't known here."""
    if type(cache) in (KVCache, QuantizedKVCache, DequantizingKVCache):
        return "full"
    if type(cache) is RotatingKVCache:
        return f"window {cache.max_size} keep {cache.keep}"
    return None


def _layer(cache: Any) -> Layer:
    # Through a batch of one and out again: a copy of its own, without room to grow or what a window has dropped.
    alone = type(cache).merge([cache]).extract(0)
    kind = _kind(cache)
    assert kind is not None
    return Layer(kind=kind, offset=cache.offset, keys=_own(alone.keys), values=_own(alone.values), codec=_codec(cache))


def _own(stored: Any) -> tuple[mx.array, ...]:
    """New objects: MLX writes into the one that a cache holds."""
    return tuple(mx.contiguous(x) for x in (stored if isinstance(stored, tuple) else (stored,)))


def _meta(cache: Any) -> dict[str, str]:
    return dict(item.split("=", 1) for item in cache.meta_state)


def _codec(cache: Any) -> str:
    meta = _meta(cache)
    return " ".join(f"{name}={meta[name]}" for name in ("group_size", "bits", "mode") if name in meta)


def _is_whole(cache: Any, layer: Layer, n: int, layout: Layout | None) -> bool:
    """Whether the layer has what such a cache holds after n tokens."""
    held = min(n, cache.max_size) if type(cache) is RotatingKVCache else n
    parts = layer.keys + layer.values
    if len(layer.keys) != len(layer.values) or len(layer.keys) != (3 if layer.codec else 1):
        return False
    if layer.offset != n or any(x.ndim != 4 or x.shape[0] != 1 or x.shape[2] != held for x in parts):
        return False
    return layout is None or layer.layouts == [layout, layout]


def _fill(cache: Any, layer: Layer) -> None:
    if layer.codec and layer.codec == _codec(cache):
        cache.state = layer.keys, layer.values
    else:
        cache.update_and_fetch(*layer.plain())
    dropped = layer.offset - layer.keys[0].shape[2]
    if dropped:
        cache.meta_state = [f"{name}={value}" for name, value in (_meta(cache) | {"dropped": dropped}).items()]
