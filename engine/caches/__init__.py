"""Key-value caches for one sequence and for batches: plain, sliding, chunked, quantised; see docs of each module.

storage (slots) × codec (codecs) × what stays (layer.Rules) × one row or many (single, batched).
"""

from __future__ import annotations

from engine.caches.batched import (
    BatchChunkedKVCache,
    BatchDequantizingKVCache,
    BatchKVCache,
    BatchQuantizedKVCache,
    BatchRotatingKVCache,
)
from engine.caches.protocol import Cache
from engine.caches.recurrent import ArraysCache, CacheList, MambaCache
from engine.caches.select import POLICY_VERSION, batch_cache, row_cache, select
from engine.caches.single import (
    ChunkedKVCache,
    DequantizingKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

__all__ = [
    "POLICY_VERSION",
    "ArraysCache",
    "BatchChunkedKVCache",
    "BatchDequantizingKVCache",
    "BatchKVCache",
    "BatchQuantizedKVCache",
    "BatchRotatingKVCache",
    "Cache",
    "CacheList",
    "ChunkedKVCache",
    "DequantizingKVCache",
    "KVCache",
    "MambaCache",
    "QuantizedKVCache",
    "RotatingKVCache",
    "batch_cache",
    "row_cache",
    "select",
]
