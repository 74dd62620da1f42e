"""The policy of which cache a layer's rows go into, and the small caches that are never quantised."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine import caches
from engine.caches import ArraysCache, CacheList, MambaCache, select

# (a row's cache, off, on, on with sinks), in the policy's order.
MATRIX: list[tuple[Any, str, str, str]] = [
    (MambaCache(), "MambaCache", "MambaCache", "MambaCache"),
    (ArraysCache(3), "ArraysCache", "ArraysCache", "ArraysCache"),
    (caches.RotatingKVCache(8, 2), *("BatchRotatingKVCache",) * 3),
    (caches.ChunkedKVCache(8), *("BatchChunkedKVCache",) * 3),
    (CacheList(caches.KVCache(), MambaCache()), *("CacheList",) * 3),
    (caches.KVCache(), "BatchKVCache", "BatchQuantizedKVCache", "BatchDequantizingKVCache"),
    (caches.QuantizedKVCache(32, 4), *("BatchQuantizedKVCache",) * 3),
    (caches.DequantizingKVCache(32, 4), *("BatchDequantizingKVCache",) * 3),
]


@pytest.fixture(autouse=True)
def on_the_cpu() -> Any:
    with mx.stream(mx.cpu):
        yield


@pytest.mark.parametrize(("cache", "off", "on", "on_with_sinks"), MATRIX, ids=lambda v: v if isinstance(v, str) else "")
def test_the_matrix(cache: Any, off: str, on: str, on_with_sinks: str) -> None:
    for what in (cache, type(cache)):
        assert select(what, quantized=False).__name__ == off
        assert select(what, quantized=False, sinks=True).__name__ == off
        assert select(what, quantized=True).__name__ == on
        assert select(what, quantized=True, sinks=True).__name__ == on_with_sinks
    made = caches.batch_cache(cache, [1, 0], kv_bits=6, kv_group_size=32, sinks=True)
    assert type(made).__name__ == on_with_sinks
    if type(cache) is caches.KVCache:
        assert (made.codec.bits, made.codec.group_size) == (6, 32)
    elif hasattr(cache, "codec"):
        assert made.codec == cache.codec
        assert made._rules == cache._rules


def test_what_is_in_a_composite_is_never_quantised() -> None:
    made = caches.batch_cache(CacheList(caches.KVCache(), MambaCache()), [1, 0], kv_bits=8)
    assert [type(member) for member in made.caches] == [caches.BatchKVCache, MambaCache]


@pytest.mark.parametrize("base", [caches.KVCache, caches.RotatingKVCache, MambaCache, CacheList])
def test_a_subclass_is_another_class(base: type[Any]) -> None:
    mine = type("Mine", (base,), {})
    for quantized in (False, True):
        with pytest.raises(ValueError, match="Mine has no batched form"):
            select(mine, quantized=quantized)
    if base is caches.KVCache:
        with pytest.raises(ValueError, match="Mine has no batched form"):
            mine.merge([mine()])
        for rows in ([mine()], [caches.KVCache(), mine()]):
            with pytest.raises(ValueError, match="merges caches of class KVCache"):
                caches.BatchKVCache.merge(rows)


def test_the_policy_is_this_one() -> None:
    """Whoever changes the matrix raises the version, and stored rows of the old one are no longer taken."""
    answers = tuple(
        (type(cache).__name__, quantized, sinks, select(cache, quantized=quantized, sinks=sinks).__name__)
        for cache, *_ in MATRIX
        for quantized in (False, True)
        for sinks in (False, True)
    )
    known = {1: "a1992733"}
    assert known[caches.POLICY_VERSION] == hashlib.sha256(repr(answers).encode()).hexdigest()[:8]


def test_a_layers_row_cache() -> None:
    assert type(caches.row_cache("sliding_attention", 7, sinks=True, kv_bits=4)) is caches.RotatingKVCache
    assert type(caches.row_cache("full_attention", 7, sinks=False)) is caches.KVCache
    for sinks, cls in ((False, caches.QuantizedKVCache), (True, caches.DequantizingKVCache)):
        made = caches.row_cache("full_attention", 7, sinks=sinks, kv_bits=4, kv_group_size=32)
        assert type(made) is cls
        assert (made.codec.bits, made.codec.group_size) == (4, 32)


def filled(cls: type[ArraysCache], rows: list[int], n: int = 2) -> ArraysCache:
    cache = cls() if cls is MambaCache else cls(n)
    for i in range(n):
        cache[i] = mx.array([[100.0 * i + row] * 3 for row in rows])
    return cache


@pytest.mark.parametrize("cls", [ArraysCache, MambaCache])
def test_rows_of_a_recurrent_state(cls: type[ArraysCache]) -> None:
    cache = cls.merge([filled(cls, [1]), filled(cls, [2]), cls() if cls is MambaCache else cls(2)])
    assert type(cache) is cls
    assert cache[1][:, 0].tolist() == [101, 102, 0]
    cache.filter([1, 0])
    cache.extend(filled(cls, [7, 8]))
    assert cache[0][:, 0].tolist() == [2, 1, 7, 8]
    row = cache.extract(2)
    assert (type(row), row[0].tolist()) == (cls, [[7, 7, 7]])
    twin = filled(cls, [0])
    twin.state, twin.meta_state = cache.state, cache.meta_state
    assert twin[1].tolist() == cache[1].tolist()
    assert (cache.is_trimmable(), cache.trim(3), cache.empty(), cache.nbytes) == (False, 0, False, 2 * 4 * 3 * 4)
    with pytest.raises(ValueError, match="can't take"):
        cache.extend(ArraysCache(5))
    with pytest.raises(ValueError, match="dtypes"):
        half = filled(cls, [3])
        half[0] = half[0].astype(mx.float16)
        cache.extend(half)


def test_a_mask_honours_left_padding_and_lengths_together() -> None:
    """mlx-lm's returned the left padding alone once `merge` had set it, so right padding went into the state."""
    cache = ArraysCache(1, left_padding=[0, 2])
    cache.prepare(lengths=[3, 4])
    for start in (0, 2):
        columns = np.arange(start, start + 2)
        left, right = columns >= np.array([[0], [2]]), columns < np.array([[3], [4]])
        assert np.array(cache.make_mask(2)).tolist() == (left & right).tolist()
        cache.advance(2)
    cache.finalize()
    assert cache.make_mask(2) is None
    merged = ArraysCache.merge([ArraysCache(1), ArraysCache(1)])
    merged.prepare(lengths=[1, 2])
    assert np.array(merged.make_mask(2)).tolist() == [[True, False], [True, True]]


def test_the_paddings_of_a_recurrent_state_go_with_its_rows() -> None:
    def check(cache: ArraysCache, rows: list[tuple[int, int]]) -> None:
        left, lengths = (np.array(x)[:, None] for x in zip(*rows, strict=True))
        assert np.array_equal(np.array(cache.make_mask(6)), (np.arange(6) >= left) & (np.arange(6) < lengths))

    cache = ArraysCache(1, left_padding=[0, 1, 2])
    cache.prepare(left_padding=[1, 0, 0], lengths=[2, 4, 3])
    check(cache, [(1, 2), (1, 4), (2, 3)])
    cache.filter([2, 0])
    check(cache, [(2, 3), (1, 2)])
    other = ArraysCache(1, left_padding=[3])
    other.prepare(lengths=[5])
    other[0] = mx.ones((1, 4))
    cache.extend(other)
    check(cache, [(2, 3), (1, 2), (3, 5)])
    assert cache[0][:, 0].tolist() == [0, 0, 1], "rows that have set nothing are zeros"
    twin = ArraysCache(1)
    twin.state = cache.state
    check(twin, [(2, 3), (1, 2), (3, 5)])
    with pytest.raises(ValueError, match="finalize"):
        cache.extend(ArraysCache(1))
    graph = io.StringIO()
    mx.export_to_dot(graph, cache.extract(2)[0])
    assert "rectangle" not in graph.getvalue(), "the row is yet to be copied, and holds the batch until then"


def test_a_slice_that_becomes_a_state_keeps_no_memory_of_its_array() -> None:
    cache = ArraysCache(1)
    whole = mx.zeros((1, 5000, 8))
    cache[0] = whole[:, -3:]
    mx.eval(cache.state[0])
    before = mx.get_active_memory()
    del whole
    assert before - mx.get_active_memory() >= 5000 * 8 * 4


def test_a_composite_does_what_its_members_do() -> None:
    def made(n: int) -> CacheList:
        both = CacheList(caches.KVCache(), caches.RotatingKVCache(4))
        for member in both.caches:
            member.update_and_fetch(mx.full((1, 1, n, 32), n), mx.full((1, 1, n, 32), n))
        return both

    batch = CacheList.merge([made(2), made(3)])
    assert [type(member) for member in batch.caches] == [caches.BatchKVCache, caches.BatchRotatingKVCache]
    assert (batch.size(), batch.empty(), batch.is_trimmable(), batch.nbytes) == (3, False, True, 2 * 2 * 2 * 3 * 32 * 4)
    batch.extend(CacheList.merge([made(3)]))
    batch.filter([1, 2])
    assert batch[0].offset.tolist() == batch[1].offset.tolist() == [3, 3]
    assert batch.trim(1) == 1
    assert batch.extract(0)[1].offset == 2
    batch.prepare(lengths=[2, 1], right_padding=[0, 1])
    for member in batch.caches:
        member.update_and_fetch(mx.zeros((2, 1, 2, 32)), mx.zeros((2, 1, 2, 32)))
    batch.finalize()
    assert batch[0].offset.tolist() == batch[1].offset.tolist() == [4, 3]
    twin = CacheList(caches.BatchKVCache([0]), caches.BatchRotatingKVCache(1, [0]))
    twin.state, twin.meta_state = batch.state, batch.meta_state
    assert twin[1].offset.tolist() == [4, 3]
    assert (twin.is_trimmable(), twin.trim(1), twin[0].offset.tolist()) == (False, 0, [4, 3])
