"""Rows that leave a batch: what they hold, when they may leave, and that neither follows the other."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.caches import slots
from tests.engine.caches.oracle import KINDS, Kind, Row, by_kind, feed, lived, random_tokens, same


@by_kind
def test_an_extracted_row_keeps_no_memory_of_the_batch(kind: Kind) -> None:
    def retained(extract: Callable[[Any, int], Any]) -> tuple[int, int]:
        cache = kind.batch([0] * 8)
        cache.update_and_fetch(*random_tokens(8, 600))
        mx.eval(cache.state)
        mx.clear_cache()  # or the allocator hands out a freed buffer of what ran before, which may be much larger
        row = extract(cache, 2)
        del cache
        mx.eval(row.state)
        before = mx.get_active_memory()
        logical = row.nbytes
        del row
        return before - mx.get_active_memory(), logical

    freed, logical = retained(lambda cache, i: cache.extract(i))
    # The allocator reuses freed buffers that are somewhat larger; the batch is eight times as large.
    assert freed <= 1.5 * logical
    view, _ = retained(lambda cache, i: _viewed(cache, i))
    assert view > 4 * freed, "a view of the row must be seen to keep the batch"


@by_kind
def test_an_extracted_row_waits_for_nothing(kind: Kind) -> None:
    """A copy that is yet to be made holds the whole batch until somebody asks for it."""
    for row, done in ((lived(kind)[0].extract(1), True), (_viewed(lived(kind)[0], 1), False)):
        graph = io.StringIO()
        mx.export_to_dot(graph, *row._slots.arrays)
        assert ("rectangle" not in graph.getvalue()) == done


def _viewed(cache: Any, i: int) -> Any:
    row = cache.row._of(cache._rules)
    row._slots = slots.Slots(tuple(x[i : i + 1] for x in cache._slots.view()))
    return row


@by_kind
def test_an_extracted_row_does_not_follow_the_batch(kind: Kind) -> None:
    cache, _ = lived(kind)
    row = cache.extract(1)
    assert same(cache.extract(-2).state, row.state)
    before = [np.array(y) for x in row.state for y in (x if isinstance(x, tuple) else (x,))]
    cache.update_and_fetch(*random_tokens(3, 4))
    last = cache.extract(2)
    cache.filter([-1, 0])
    assert same(cache.extract(0).state, last.state)
    after = [np.array(y) for x in row.state for y in (x if isinstance(x, tuple) else (x,))]
    assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))


@by_kind
def test_a_row_is_extracted_in_the_middle_of_a_prefill(kind: Kind) -> None:
    lengths = [6, 2, 4]
    cache, rows = kind.batch([0, 0, 0]), [Row(i) for i in range(3)]
    cache.prepare(lengths=lengths, right_padding=[6 - n for n in lengths])
    feed(cache, rows, [[c < n for c in range(5)] for n in lengths], kind)
    for i, row in enumerate(rows):
        gone, its = cache.extract(i), Row(row.name, row.length, row.start)
        assert gone.offset == min(lengths[i], 5)
        for n in (1, 3):
            feed(gone, [its], [[True] * n], kind)
    feed(cache, rows, [[c < n for c in (5,)] for n in lengths], kind)
    cache.finalize()
    feed(cache, rows, [[True]] * 3, kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "max_size" in kind.rules], ids=lambda kind: kind.name)
def test_a_row_goes_with_its_window_alone_after_a_long_chunk(kind: Kind) -> None:
    batch, single = kind.batch([0, 0]), kind.single()
    batch.update_and_fetch(*random_tokens(2, 20))
    single.update_and_fetch(*random_tokens(1, 20))
    for cache in (batch.extract(1), type(batch).merge([single])):
        assert (cache.keys.shape[2], cache.size()) == (kind.rules["max_size"],) * 2


@by_kind
def test_a_chunk_of_nothing_but_padding_costs_a_row_no_token(kind: Kind) -> None:
    """Or what is extracted for a checkpoint lacks the window's oldest token."""
    cache, rows = kind.batch([0, 0]), [Row(0), Row(1)]
    cache.prepare(lengths=[20, 9], right_padding=[0, 11])
    feed(cache, rows, [[True] * 10, [True] * 9 + [False]], kind)
    feed(cache, rows, [[True] * 5, [False] * 5], kind)
    feed(cache, rows, [[True] * 5, [False] * 5], kind)
    cache.finalize()
    row, held = cache.extract(1), min(9, kind.rules.get("max_size", 9))
    assert (row.offset, row.size()) == (9, held)
    assert (row.keys[0] if isinstance(row.keys, tuple) else row.keys).shape[2] == held


@by_kind
def test_rows_leave_in_the_middle_of_a_prefill(kind: Kind) -> None:
    lengths = [6, 2, 4]
    cache, rows = kind.batch([0, 0, 0]), [Row(i) for i in range(3)]
    cache.prepare(lengths=lengths, right_padding=[6 - n for n in lengths])
    feed(cache, rows, [[c < n for c in range(3)] for n in lengths], kind)
    cache.filter([2, 1])
    feed(cache, [rows[2], rows[1]], [[c < n for c in range(3, 6)] for n in (4, 2)], kind)
    cache.finalize()
    assert cache.offset.tolist() == [4, 2]
    feed(cache, [rows[2], rows[1]], [[True]] * 2, kind)


@by_kind
def test_a_row_that_is_all_padding_is_extracted_empty(kind: Kind) -> None:
    cache, rows = kind.batch([4, 0]), [Row(0), Row(1)]
    feed(cache, rows, [[False] * 2, [True] * 2], kind)
    assert cache.offset.tolist() == [-2, 2]
    row = cache.extract(0)
    assert (row.offset, row.empty(), row.nbytes) == (0, True, 0)
    feed(row, [Row(0)], [[True] * 3], kind)
