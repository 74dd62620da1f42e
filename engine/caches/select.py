"""Which cache a layer gets: one row's, and the batched one that its rows go into.

The choice is a policy and has a version: a stored row may join a batch only if both were made under the same one.
Checked in this order, because the classes overlap: recurrent states, sliding windows and chunks, composites, and last
the plain cache, whose class must be KVCache exactly. What a subclass adds, a quantised or batched cache would drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from engine.caches.batched import (
    BatchChunkedKVCache,
    BatchDequantizingKVCache,
    BatchKVCache,
    BatchQuantizedKVCache,
    BatchRotatingKVCache,
)
from engine.caches.codecs import Affine
from engine.caches.recurrent import ArraysCache, CacheList, MambaCache
from engine.caches.single import (
    ChunkedKVCache,
    DequantizingKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

# To be raised whenever `select` or `row_cache` answers differently than before.
POLICY_VERSION = 1


def select(cache: Any, *, quantized: bool, sinks: bool = False) -> type[Any]:
    """The batched class for rows like `cache` (a single-row cache, or its class), with KV quantisation on or off.

    Only full attention's plain cache is ever quantised; a layer with attention sinks gets the form that dequantises.
    Raises ValueError for a class that has no batched form here.
    """
    kind = cache if isinstance(cache, type) else type(cache)
    for exact in (MambaCache, ArraysCache):
        if kind is exact:
            return exact
    if kind is RotatingKVCache:
        return BatchRotatingKVCache
    if kind is ChunkedKVCache:
        return BatchChunkedKVCache
    if kind is CacheList:
        return CacheList
    if kind is KVCache:
        if not quantized:
            return BatchKVCache
        return BatchDequantizingKVCache if sinks else BatchQuantizedKVCache
    # What is quantised already stays as it is: its contents couldn't go back.
    if kind is QuantizedKVCache:
        return BatchQuantizedKVCache
    if kind is DequantizingKVCache:
        return BatchDequantizingKVCache
    raise ValueError(f"{kind.__name__} has no batched form here; a subclass of a cache isn't that cache")


def row_cache(
    kind: str, sliding_window: int, *, sinks: bool, kv_bits: int | None = None, kv_group_size: int = 64
) -> KVCache | RotatingKVCache | QuantizedKVCache | DequantizingKVCache:
    """One layer's empty single-row cache: a window for "sliding_attention", which is never quantised; else by bits."""
    if kind == "sliding_attention":
        return RotatingKVCache(sliding_window)
    if kv_bits is None:
        return KVCache()
    return (DequantizingKVCache if sinks else QuantizedKVCache)(group_size=kv_group_size, bits=kv_bits)


def batch_cache(
    cache: Any,
    left_padding: Sequence[int] | mx.array,
    *,
    sinks: bool = False,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
) -> Any:
    """An empty batched cache for rows like the single-row `cache`, one for each entry of `left_padding`."""
    cls = select(cache, quantized=kv_bits is not None, sinks=sinks)
    if cls is CacheList:
        return CacheList(*(batch_cache(member, left_padding) for member in cache.caches))
    if cls is MambaCache:
        return MambaCache(left_padding)
    if cls is ArraysCache:
        return ArraysCache(len(cache.cache), left_padding)
    if cls is BatchRotatingKVCache:
        return BatchRotatingKVCache(cache.max_size, left_padding, cache.keep)
    if cls is BatchChunkedKVCache:
        return BatchChunkedKVCache(cache.chunk_size, left_padding)
    if cls is BatchKVCache:
        return BatchKVCache(left_padding)
    if isinstance(cache.codec, Affine):
        kv_group_size, kv_bits = cache.codec.group_size, cache.codec.bits
    return cls(left_padding, group_size=kv_group_size, bits=kv_bits)
