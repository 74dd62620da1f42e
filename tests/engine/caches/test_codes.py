"""Quantised caches: codes, their loss, and parameters."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from engine import caches
from engine.caches.batched import BATCHED
from tests.engine.caches.oracle import random_tokens, same


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_do_not_depend_on_how_tokens_came(bits: int, group: int) -> None:
    rng = np.random.default_rng(bits)
    keys, values = (mx.array(rng.standard_normal((2, 2, 300, 128)).astype(np.float32)) for _ in range(2))
    keys, values = keys.astype(mx.float16), values.astype(mx.float16)
    whole = [mx.quantize(x, group_size=group, bits=bits) for x in (keys, values)]
    single, batch = caches.QuantizedKVCache(group, bits), caches.BatchQuantizedKVCache([0, 0], group, bits)
    edges = [0, 1, 2, 130, 255, 256, 257, 300]
    for a, b in itertools.pairwise(edges):
        for cache in (single, batch):
            found = cache.update_and_fetch(keys[:, :, a:b], values[:, :, a:b])
    for cache in (single, batch):
        assert (cache.group_size, cache.bits, cache.mode) == (group, bits, "affine")
        for stored, expected in zip(cache.state[:2], whole, strict=True):
            assert same(stored, tuple(expected))
    assert same(found, tuple(tuple(x) for x in whole))
    row = batch.extract(1)
    assert (type(row), row.bits, row.mode) == (caches.QuantizedKVCache, bits, "affine")
    assert same(row.state, tuple(tuple(x[1:2] for x in parts) for parts in whole))
    again = caches.BatchQuantizedKVCache.merge([batch.extract(0), row])
    assert same(again.state[:2], tuple(tuple(x) for x in whole))
    dense = caches.DequantizingKVCache(group, bits).update_and_fetch(keys, values)
    for x, parts in zip(dense, whole, strict=True):
        assert x.dtype == mx.float16
        assert mx.array_equal(x, mx.dequantize(*parts, group_size=group, bits=bits))


# relL2 of quantising N(0, 1) in groups of 64 (spec of the probe: below 0.02 with 8 bits, 0.20 with 4).
@pytest.mark.parametrize(("bits", "allowed"), [(8, 0.02), (4, 0.20)])
def test_the_loss_of_quantisation_is_bounded(bits: int, allowed: float) -> None:
    keys, values = (mx.array(np.random.default_rng(1).standard_normal((1, 2, 64, 64)).astype(np.float32)),) * 2
    found, _ = caches.DequantizingKVCache(64, bits).update_and_fetch(keys, values)
    a, b = np.array(found, np.float64), np.array(keys, np.float64)
    loss = np.sqrt(((a - b) ** 2).sum() / (b**2).sum())
    assert allowed / 10 < loss < allowed


def test_quantisation_parameters_are_checked() -> None:
    for wrong, message in (
        ({"bits": 5}, "bits is 5"),
        ({"group_size": 48}, "group_size is 48"),
        ({"mode": "x"}, "mode"),
    ):
        for cls in (caches.QuantizedKVCache, caches.DequantizingKVCache):
            with pytest.raises(ValueError, match=message):
                cls(**wrong)
    with pytest.raises(ValueError, match="isn't a multiple"):
        caches.QuantizedKVCache(64, 8).update_and_fetch(*random_tokens(1, 1))
    with pytest.raises(ValueError, match="keep is 8"):
        caches.RotatingKVCache(8, keep=8)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        caches.ChunkedKVCache(0)


def test_every_class_has_a_batched_form() -> None:
    assert {cls.__name__ for cls in BATCHED} == {
        "KVCache", "RotatingKVCache", "ChunkedKVCache", "QuantizedKVCache", "DequantizingKVCache"
    }  # fmt: skip
    for single, batch in BATCHED.items():
        assert batch.__name__ == f"Batch{single.__name__}"
        assert hasattr(batch, "bits") == hasattr(single, "bits") == (single is caches.QuantizedKVCache)
