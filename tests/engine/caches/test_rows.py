"""What every query sees, in every kind of cache, alone and in batches whose rows join, leave, wait and are trimmed.

One walk of random steps, checked token by token against the model in oracle.py. Planted faults show that it can fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.caches import batched, layer, slots
from engine.caches.batched import BatchCache
from engine.caches.layer import LayerCache
from tests.engine.caches.oracle import KINDS, Kind, Row, by_kind, feed


@pytest.fixture(autouse=True)
def on_the_cpu() -> Any:
    with mx.stream(mx.cpu):
        yield


def prefill(cache: Any, rows: list[Row], lengths: list[int], chunk: int, kind: Kind) -> None:
    """Right-padded chunks of `chunk` columns, as a server prefills prompts of different lengths."""
    longest = max(lengths)
    cache.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
    for start in range(0, longest, chunk):
        columns = range(start, min(start + chunk, longest))
        feed(cache, rows, [[c < n for c in columns] for n in lengths], kind)
    cache.finalize()


def walk(kind: Kind, seed: int, steps: int = 22) -> None:
    """A random life of a batch."""
    rng = np.random.default_rng(seed)
    names = iter(range(31))
    padding = [int(n) for n in rng.integers(0, 5, 2)]
    cache, rows = kind.batch(padding), [Row(next(names)) for _ in padding]
    width = max(padding) + 1 + int(rng.integers(0, 9))
    chunks = np.split(np.arange(width), np.sort(rng.integers(1, width, 2))) if width > 1 else [np.arange(width)]
    for chunk in chunks:
        if len(chunk):
            feed(cache, rows, [[bool(c >= p) for c in chunk] for p in padding], kind)
    for _ in range(steps):
        step = rng.choice(["decode", "decode", "chunk", "prefill", "filter", "join", "swap", "trim", "front"])
        if step == "decode":
            feed(cache, rows, [[True]] * len(rows), kind)
        elif step == "chunk":
            feed(cache, rows, [[True] * int(rng.integers(2, 7))] * len(rows), kind)
        elif step == "prefill":
            lengths = [int(n) for n in rng.integers(1, 9, len(rows))]
            prefill(cache, rows, lengths, int(rng.integers(1, 6)), kind)
        elif step == "filter" and len(rows) > 1:
            kept = [int(i) for i in rng.permutation(len(rows))[: int(rng.integers(1, len(rows) + 1))]]
            cache.filter(kept)
            rows = [rows[i] for i in kept]
        elif step == "join" and len(rows) < 4:
            new = [Row(name) for name, _ in zip(names, range(2), strict=False)]
            if new:
                singles = [kind.single() for _ in new]
                for single, row in zip(singles, new, strict=True):
                    for _ in range(int(rng.integers(0, 3))):
                        feed(single, [row], [[True] * int(rng.integers(1, 7))], kind)
                cache.extend(type(cache).merge(singles))
                rows = rows + new
        elif step == "swap":
            # A row goes away, is fed alone, and comes back.
            i = int(rng.integers(0, len(rows)))
            alone = cache.extract(i)
            assert alone.offset == rows[i].length
            feed(alone, [rows[i]], [[True] * int(rng.integers(1, 4))], kind)
            rest = [j for j in range(len(rows)) if j != i]
            cache.filter(rest)
            cache.extend(alone.merge([alone]))
            rows = [rows[j] for j in rest] + [rows[i]]
        elif step == "trim" and cache.is_trimmable():
            most = min(row.length - row.start for row in rows)
            n = cache.trim(int(rng.integers(0, most + 1)))
            for row in rows:
                row.length -= n
        elif step == "front" and hasattr(cache, "maybe_trim_front"):
            cache.maybe_trim_front()
            for row in rows:
                row.start = max(row.start, row.length - kind.rules["chunk_size"])
        assert cache.offset.tolist() == [row.length for row in rows]
        assert cache.size() == 0 or cache.keys is not None


@by_kind
@pytest.mark.parametrize("seed", range(8))
def test_a_random_life_of_a_batch(kind: Kind, seed: int) -> None:
    walk(kind, seed)


@by_kind
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 8, 9, 20])
def test_a_single_sequence_in_any_chunks(kind: Kind, chunk: int) -> None:
    cache, row = kind.single(), Row(3)
    for start in range(0, 21, chunk):
        feed(cache, [row], [[True] * min(chunk, 21 - start)], kind)
        if "chunk_size" in kind.rules:
            cache.maybe_trim_front()
            row.start = max(row.start, row.length - kind.rules["chunk_size"])
        assert cache.offset == row.length
    for _ in range(6):
        feed(cache, [row], [[True]], kind)


@by_kind
def test_a_single_cache_takes_several_equally_long_rows(kind: Kind) -> None:
    cache, rows = kind.single(), [Row(1), Row(2), Row(3)]
    for n in (4, 1, 7, 1, 1):
        feed(cache, rows, [[True] * n] * 3, kind)


# Faults: each is planted in the code that every cache shares, and must be noticed by some walk over `kinds`.


def mask_from_the_offset(patch: pytest.MonkeyPatch) -> None:
    original = layer.attention_mask

    def wrong(n: int, *, offset: int, left_padding: list[int], **options: Any) -> Any:
        return original(n, offset=max(offset - min(left_padding), 0), left_padding=left_padding, **options)

    patch.setattr(layer, "attention_mask", wrong)


def no_left_padding_in_the_mask(patch: pytest.MonkeyPatch) -> None:
    original = layer.attention_mask
    patch.setattr(layer, "attention_mask", lambda n, **o: original(n, **(o | {"left_padding": None})))


def no_window_in_the_mask(patch: pytest.MonkeyPatch) -> None:
    original = layer.attention_mask
    patch.setattr(layer, "attention_mask", lambda n, **o: original(n, **(o | {"window_size": None})))


def no_sinks_in_the_mask(patch: pytest.MonkeyPatch) -> None:
    original = layer.attention_mask
    patch.setattr(layer, "attention_mask", lambda n, **o: original(n, **(o | {"keep": 0})))


def sinks_left_behind(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slots.Slots, "carry", lambda self, sources, to, count: None)


def sinks_of_the_first_row(patch: pytest.MonkeyPatch) -> None:
    original = slots.Slots.carry
    patch.setattr(slots.Slots, "carry", lambda self, sources, *rest: original(self, [sources[0]] * 1, *rest))


def window_too_short(patch: pytest.MonkeyPatch) -> None:
    original = LayerCache._room
    patch.setattr(BatchCache, "_room", lambda self: None if (room := original(self)) is None else max(room - 1, 0))


def finalize_without_a_roll(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slots.Slots, "roll", lambda self, shifts: None)


def roll_by_the_first_rows_padding(patch: pytest.MonkeyPatch) -> None:
    original = slots.Slots.roll
    patch.setattr(slots.Slots, "roll", lambda self, shifts: original(self, [shifts[0]] * len(shifts)))


def padding_evicts_tokens(patch: pytest.MonkeyPatch) -> None:
    original = BatchCache._make_room

    def late(self: Any, room: int | None) -> None:
        kept, self._limits = self._limits, None
        # The window slides over the padding first and moves rows right afterwards.
        original(self, room)
        self._limits = kept
        original(self, None)

    patch.setattr(BatchCache, "_make_room", late)


def extend_left_justified(patch: pytest.MonkeyPatch) -> None:
    def left(parts: Any, columns: int) -> Any:
        whole = original(parts, columns)
        return tuple(mx.roll(x, 1, axis=2) for x in whole)

    original = batched.join
    patch.setattr(batched, "join", left)


def filter_keeps_the_first_rows(patch: pytest.MonkeyPatch) -> None:
    original = slots.Slots.take
    patch.setattr(slots.Slots, "take", lambda self, rows: original(self, sorted(rows)))


def stale_columns_after_a_trim(patch: pytest.MonkeyPatch) -> None:
    def trim(self: Any, n: int) -> int:
        self._offsets = [offset - n for offset in self._offsets]
        return n

    patch.setattr(LayerCache, "trim", trim)


def trim_of_a_rotated_buffer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LayerCache, "is_trimmable", lambda self: True)


FAULTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (mask_from_the_offset, "plain"),
    (no_left_padding_in_the_mask, "plain"),
    (no_left_padding_in_the_mask, "quantized-4"),
    (no_left_padding_in_the_mask, "rotating-8-0"),
    (no_window_in_the_mask, "rotating-8-0"),
    (no_sinks_in_the_mask, "rotating-8-3"),
    (sinks_left_behind, "rotating-8-3"),
    (sinks_of_the_first_row, "rotating-8-3"),
    (window_too_short, "rotating-8-0"),
    (finalize_without_a_roll, "plain"),
    (roll_by_the_first_rows_padding, "dequantizing-8"),
    (padding_evicts_tokens, "rotating-8-0"),
    (extend_left_justified, "plain"),
    (filter_keeps_the_first_rows, "chunked"),
    (stale_columns_after_a_trim, "plain"),
    (trim_of_a_rotated_buffer, "rotating-8-0"),
]


@pytest.mark.parametrize(("fault", "name"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_fault_is_seen(
    fault: Callable[[pytest.MonkeyPatch], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    (kind,) = [kind for kind in KINDS if kind.name == name]
    with pytest.raises((AssertionError, ValueError)):
        for seed in range(8):
            walk(kind, seed)
