"""What caches do besides showing tokens: sizes, states, dtypes, independence, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine import caches
from tests.engine.caches.oracle import (
    DK,
    DV,
    HEADS,
    KINDS,
    Kind,
    Row,
    alone,
    by_kind,
    feed,
    lived,
    random_tokens,
    same,
    seen,
)

HALVES = (mx.float16, mx.bfloat16)


@by_kind
@pytest.mark.parametrize("make", [lived, alone])
@pytest.mark.parametrize("meta_first", [False, True])
def test_state_and_meta_state_are_the_whole_cache(kind: Kind, make: Callable[[Kind], Any], meta_first: bool) -> None:
    cache, rows = make(kind)
    if "chunk_size" in kind.rules:
        cache.maybe_trim_front()
        for row in rows:
            row.start = max(row.start, row.length - kind.rules["chunk_size"])
    if meta_first:
        twin = type(cache)._of(type(cache)._blank)
        twin.meta_state, twin.state = cache.meta_state, cache.state
    else:
        twin = type(cache).from_state(cache.state, cache.meta_state)
    assert same(twin.state, cache.state)
    assert twin.meta_state == cache.meta_state
    assert twin.codec == cache.codec
    assert (twin.size(), twin.is_trimmable(), twin.empty()) == (cache.size(), cache.is_trimmable(), False)
    for n in (1, 3, 1):
        before = [Row(r.name, r.length, r.start) for r in rows]
        feed(cache, before, [[True] * n] * len(rows), kind)
        feed(twin, rows, [[True] * n] * len(rows), kind)
        assert same(twin.state, cache.state)


@by_kind
def test_a_state_taken_between_prepare_and_finalize_remembers_the_padding(kind: Kind) -> None:
    cache, rows = kind.batch([0, 0]), [Row(0), Row(1)]
    cache.prepare(lengths=[6, 2], right_padding=[0, 4])
    feed(cache, rows, [[True] * 4, [True, True, False, False]], kind)
    twin = type(cache).from_state(cache.state, cache.meta_state)
    feed(twin, rows, [[True] * 2, [False] * 2], kind)
    twin.finalize()
    feed(twin, rows, [[True], [True]], kind)
    assert twin.offset.tolist() == [7, 3]


def test_a_state_remembers_right_padding_without_lengths() -> None:
    cache, rows = caches.BatchKVCache([0, 0]), [Row(0), Row(1)]
    cache.prepare(right_padding=[2, 0])
    feed(cache, rows, [[True] * 3 + [False] * 2, [True] * 5], KINDS[0])
    twin = caches.BatchKVCache.from_state(cache.state, cache.meta_state)
    twin.finalize()
    feed(twin, rows, [[True], [True]], KINDS[0])
    assert twin.offset.tolist() == [4, 6]


@by_kind
def test_a_state_takes_the_place_of_another(kind: Kind) -> None:
    """Whatever the cache has been through: nothing of what it was may stay."""
    for make in (lived, alone):
        (cache, rows), (used, others) = make(kind), make(kind)
        feed(used, others, [[True] * 20] * len(others), kind)
        feed(used, others, [[True]] * len(others), kind)
        used.state, used.meta_state = cache.state, cache.meta_state
        for n in (1, 2):
            feed(used, rows, [[True] * n] * len(rows), kind)


@by_kind
def test_an_empty_state_is_a_state(kind: Kind) -> None:
    for cache in (kind.single(), kind.batch([2, 0])):
        twin = type(cache).from_state(cache.state, cache.meta_state)
        assert twin.empty() and twin.size() == 0 and twin.nbytes == 0
        assert same(twin.state, cache.state)


def test_a_state_of_another_kind_is_refused() -> None:
    plain, packed = alone(KINDS[0])[0], alone(KINDS[6])[0]
    with pytest.raises(ValueError, match="not one of a KVCache"):
        caches.KVCache().meta_state = packed.meta_state
    with pytest.raises(ValueError, match="has 3 arrays"):
        caches.QuantizedKVCache(32, 4).state = plain.state


@by_kind
@pytest.mark.parametrize("make", [lived, alone])
def test_a_deep_copy_goes_its_own_way(kind: Kind, make: Callable[[Kind], Any]) -> None:
    cache, rows = make(kind)
    twin = copy.deepcopy(cache)
    cache.update_and_fetch(*random_tokens(len(rows), 2))
    feed(twin, rows, [[True] * 2] * len(rows), kind)


@by_kind
def test_arguments_and_earlier_results_never_change(kind: Kind) -> None:
    for cache, B in ((kind.single(), 1), (kind.batch([0, 0]), 2)):
        kept: list[tuple[Any, Any]] = []
        for n in (256, 1, 3, 1, 1):
            new = random_tokens(B, n, seed=n)
            numbers = [np.array(x) for x in new]
            found = cache.update_and_fetch(*new)
            flat = [y for x in found for y in (x if isinstance(x, tuple) else (x,))]
            kept.append((flat, [np.array(x) for x in flat]))
            mx.eval(cache.state)
            for x, y in zip(new, numbers, strict=True):
                assert np.array_equal(np.array(x), y)
        for arrays, values in kept:
            for x, y in zip(arrays, values, strict=True):
                assert np.array_equal(np.array(x), y)


def test_buffers_grow_by_whole_steps() -> None:
    for fed, capacity in (
        ([1], 256),
        ([256], 256),
        ([300], 512),
        ([3, 300], 515),
        ([300, 212], 512),
        ([300, 213], 556),
    ):
        for cache, B in ((caches.KVCache(), 1), (caches.BatchKVCache([0, 0]), 2)):
            for n in fed:
                cache.update_and_fetch(*random_tokens(B, n))
            assert cache.nbytes == B * HEADS * (DK + DV) * 4 * capacity, fed
            assert cache.size() == sum(fed)


def test_a_window_gives_back_the_room_that_a_long_prefill_took() -> None:
    cache = caches.RotatingKVCache(8)
    for n in (2000, 1):
        cache.update_and_fetch(*random_tokens(1, n))
    assert cache.nbytes <= HEADS * (DK + DV) * 4 * (8 + 256)
    assert cache.size() == 8


@by_kind
def test_a_decode_step_returns_as_many_keys_as_are_visible(kind: Kind) -> None:
    cache = kind.single()
    for i in range(1, 20):
        keys, _ = cache.update_and_fetch(*random_tokens(1, 1))
        keys = keys[0] if isinstance(keys, tuple) else keys
        assert keys.shape[2] == cache.size() == min(i, kind.rules.get("max_size", 99))
        assert cache.is_trimmable() == (i < kind.rules.get("max_size", 99))


def test_trim_counts_and_refuses() -> None:
    cache = caches.KVCache()
    cache.update_and_fetch(*random_tokens(1, 5))
    assert (cache.trim(2), cache.offset, cache.trim(9), cache.offset, cache.empty()) == (2, 3, 3, 0, True)
    window = caches.RotatingKVCache(4)
    window.update_and_fetch(*random_tokens(1, 3))
    assert (window.trim(1), window.offset) == (1, 2)
    window.update_and_fetch(*random_tokens(1, 3))
    assert (window.is_trimmable(), window.trim(1), window.offset) == (False, 0, 5)
    with pytest.raises(ValueError, match="at least 0"):
        cache.trim(-1)


@by_kind
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_no_operation_changes_the_dtype(kind: Kind, dtype: mx.Dtype) -> None:
    def check(cache: Any) -> None:
        for x in cache.state[:2]:
            stored = x if isinstance(x, tuple) else (None, x)
            assert {y.dtype for y in stored[1:]} == {dtype}

    filled, empty = kind.batch([0, 0]), kind.batch([0])
    fetched = filled.update_and_fetch(*random_tokens(2, 3, dtype))
    for x in fetched:
        assert {y.dtype for y in (x[1:] if isinstance(x, tuple) else (x,))} == {dtype}
    check(filled)
    empty.extend(filled)
    check(empty)
    filled.extend(kind.batch([0]))
    check(filled)
    single = kind.single()
    single.update_and_fetch(*random_tokens(1, 2, dtype))
    check(type(filled).merge([kind.single(), single]))
    check(filled.extract(0))
    # One stray float32 token, as a kernel that promotes would send, doesn't turn the buffer into float32.
    filled.update_and_fetch(*random_tokens(3, 1, mx.float32))
    check(filled)


def test_joining_refuses_to_promote(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = caches.BatchKVCache([0]), caches.BatchKVCache([0])
    a.update_and_fetch(*random_tokens(1, 3, mx.float16))
    b.update_and_fetch(*random_tokens(1, 3, mx.float32))
    with pytest.raises(ValueError, match="don't join"):
        a.extend(b)
    assert a.keys.dtype == mx.float16


@by_kind
def test_other_is_left_alone_by_extend_and_merge(kind: Kind) -> None:
    a, b = lived(kind)[0], lived(kind)[0]
    b.update_and_fetch(*random_tokens(3, 12))
    kept = b.state, b.meta_state
    a.extend(b)
    assert same(b.state, kept[0]) and b.meta_state == kept[1]
    single, _ = alone(kind)
    kept = single.state, single.meta_state
    type(a).merge([single, kind.single()])
    assert same(single.state, kept[0]) and single.meta_state == kept[1]


@by_kind
def test_what_does_not_fit_is_refused(kind: Kind) -> None:
    cache = lived(kind)[0]
    with pytest.raises(ValueError, match="has 3"):
        cache.update_and_fetch(*random_tokens(2, 1))
    for wrong in ([3], [-4]):
        with pytest.raises(ValueError, match="rows 0 to 2"):
            cache.filter(wrong)
    with pytest.raises(ValueError, match="has tokens already"):
        cache.prepare(left_padding=[1, 0, 0])
    with pytest.raises(ValueError, match="for each of 3 rows"):
        cache.prepare(lengths=[1, 2])
    with pytest.raises(ValueError, match="don't add up"):
        cache.prepare(lengths=[3, 5, 5], right_padding=[1, 0, 0])
    cache.prepare(lengths=[1, 2, 2], right_padding=[1, 0, 0])
    with pytest.raises(ValueError, match="finalize"):
        cache.extend(lived(kind)[0])
    with pytest.raises(ValueError, match="finalize"):
        lived(kind)[0].extend(cache)
    keys, values = random_tokens(3, 1)
    with pytest.raises(ValueError, match="keys and values have 3 and 2 rows"):
        cache.update_and_fetch(keys, values[:2])
    single = kind.single()
    single.update_and_fetch(*random_tokens(2, 1))
    with pytest.raises(ValueError, match="don't fit"):
        single.update_and_fetch(*random_tokens(1, 1))
    with pytest.raises(ValueError, match="has 2 rows"):
        type(cache).merge([single])
    others = [k for k in KINDS if k.name != kind.name]
    for other in others:
        with pytest.raises(ValueError, match="can't take the rows"):
            lived(kind)[0].extend(lived(other)[0])
        with pytest.raises(ValueError, match="equal rules"):
            type(cache).merge([kind.single(), other.single()])


def test_right_padding_without_lengths() -> None:
    plain, rows = caches.BatchKVCache([0, 0]), [Row(0), Row(1)]
    plain.prepare(right_padding=[2, 0])
    feed(plain, rows, [[True] * 3 + [False] * 2, [True] * 5], KINDS[0])
    plain.finalize()
    assert plain.offset.tolist() == [3, 5]
    assert plain.left_padding.tolist() == [2, 0]
    feed(plain, rows, [[True], [True]], KINDS[0])
    for kind in (KINDS[1], KINDS[5]):
        with pytest.raises(ValueError, match="needs lengths"):
            kind.batch([0, 0]).prepare(right_padding=[2, 0])


def test_left_padding_before_the_first_token() -> None:
    cache, rows = caches.BatchKVCache([0, 0]), [Row(0), Row(1)]
    cache.prepare(left_padding=[2, 0])
    assert cache.offset.tolist() == [-2, 0]
    feed(cache, rows, [[False, False, True], [True] * 3], KINDS[0])
    assert (cache.offset.tolist(), cache.left_padding.tolist()) == ([1, 3], [2, 0])


def test_filter_takes_off_the_padding_that_nobody_needs() -> None:
    cache = caches.BatchKVCache([0, 3, 2])
    cache.update_and_fetch(*random_tokens(3, 7))
    cache.filter([1, 2])
    assert (cache.size(), cache.offset.tolist(), cache.left_padding.tolist()) == (5, [4, 5], [1, 0])
    assert cache.nbytes == 2 * HEADS * (DK + DV) * 4 * 5
    cache.filter([])
    assert (cache.size(), cache.offset.tolist(), cache.nbytes) == (0, [], 0)


@by_kind
def test_a_window_of_the_model_narrows_every_mask(kind: Kind) -> None:
    """A full cache's N == 1 decode with a window, and a batch's, whose rows are padded: the published bug's places."""
    window = 3
    for cache, rows in (alone(kind), lived(kind)):
        for n in (1, 4):
            held = [row.length for row in rows]
            mask = cache.make_mask(n, window_size=window)
            keys, _ = cache.update_and_fetch(*random_tokens(len(rows), n))
            S = (keys[0] if isinstance(keys, tuple) else keys).shape[2]
            full = seen(mask, len(rows), n, S)
            near = min(window, kind.rules.get("max_size", 99) - kind.rules.get("keep", 0))
            for b, row in enumerate(rows):
                row.length += n
                for i in range(n):
                    stay = min(kind.rules.get("keep", 0), max(held[b] + i + 1 - near, 0))
                    assert full[b, i].sum() == min(held[b] + i + 1, near) + stay, (kind.name, n, b, i)
                    assert full[b, i, S - n + i], "a token sees itself"


@pytest.mark.parametrize("window", [None, 9])
def test_masks_without_effect_are_not_made(window: int | None) -> None:
    for cache in (caches.KVCache(), caches.BatchKVCache([0, 0]), caches.BatchRotatingKVCache(9, [0, 0])):
        B = 1 if isinstance(cache, caches.KVCache) else 2
        windowed = window is not None or isinstance(cache, caches.BatchRotatingKVCache)
        assert shows_all(cache.make_mask(1, window), windowed)
        assert cache.make_mask(3, window) == "causal"
        assert isinstance(cache.make_mask(3, window, return_array=True), mx.array)
        cache.update_and_fetch(*random_tokens(B, 8))
        assert shows_all(cache.make_mask(1, window), windowed)
    assert isinstance(caches.BatchKVCache([1, 0]).make_mask(1), mx.array)


def shows_all(mask: Any, windowed: bool) -> bool:
    """One token's mask that hides nothing: none at all, but an array wherever there is a window."""
    return bool(mask.all()) if windowed else mask is None
