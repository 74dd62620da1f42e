"""Caches of several sequences of different lengths: right-justified rows behind per-row left padding.

A batch is fed either left-padded (`left_padding` when it is made) or right-padded (`prepare(lengths=…)`, the chunks,
`finalize()`, which moves every row to the right and so turns its right padding into left padding). Rows leave and join
by `filter`, `extend`, `extract` and `merge`; a row's own tokens are never touched by what its neighbours do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import mlx.core as mx

from engine.caches.codecs import Affine, Arrays, Fetched
from engine.caches.kinds import Chunked, Dequantizing, Quantized, Windowed
from engine.caches.layer import LayerCache, Rules
from engine.caches.single import (
    ChunkedKVCache,
    DequantizingKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    SingleCache,
)
from engine.caches.slots import Slots, join
from engine.masks import integers

Indices = Sequence[int] | mx.array


class BatchCache(LayerCache):
    """What the five have in common; B rows, each with its own offset and left padding."""

    # The class of one row.
    row: ClassVar[type[SingleCache]]
    # The history length at which a row's valid tokens end, between `prepare` and `finalize`.
    _limits: list[int] | None = None
    # By how much to move rows in `finalize`, if right padding was announced without lengths.
    _right_padding: list[int] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Fetched, Fetched]:
        """[B, H, n, D], [B, H, n, Dv] → as LayerCache; ValueError unless B is the number of rows."""
        if keys.shape[0] != len(self._offsets) or values.shape[0] != len(self._offsets):
            raise ValueError(
                f"keys and values have {keys.shape[0]} and {values.shape[0]} rows; the cache has {len(self._offsets)}"
            )
        return super().update_and_fetch(keys, values)

    @property
    def offset(self) -> mx.array:
        """[B] int32: the position of each row's next token, negative while inside left padding."""
        return mx.array(self._offsets, dtype=mx.int32)

    @property
    def left_padding(self) -> mx.array:
        """[B] int32: how many of the buffered columns come before each row's first token."""
        return mx.array([column - self._slots.start for column in self._first], dtype=mx.int32)

    @property
    def state(self) -> Any:
        """(keys, values, offset, left_padding): [B, H, held, ·] (tuples if quantised, None if empty), [B], [B]."""
        return (*self._stored(), self.offset, self.left_padding)

    @state.setter
    def state(self, state: Any) -> None:
        keys, values, offset, left_padding = state
        self._slots = self._restored(keys, values)
        self._first, self._offsets = integers(left_padding), integers(offset)

    def prepare(
        self,
        *,
        left_padding: Indices | None = None,
        lengths: Indices | None = None,
        right_padding: Indices | None = None,
    ) -> None:
        """Announce what the next chunks look like, up to `finalize`, by row.

        left_padding: columns of padding that come first; an empty cache only. lengths: valid tokens, behind which
        everything is right padding. right_padding: how many those are; enough by itself if the cache drops nothing.
        Raises ValueError for a list that has another length than the batch, or lists that don't add up.
        """
        if left_padding is not None:
            if self._slots.arrays:
                raise ValueError("left padding goes before a row's first token: this cache has tokens already")
            padding = self._rows_of(left_padding, "left_padding")
            self._first = [first + p for first, p in zip(self._first, padding, strict=True)]
            self._offsets = [offset - p for offset, p in zip(self._offsets, padding, strict=True)]
        if right_padding is not None and max(padding := self._rows_of(right_padding, "right_padding"), default=0) <= 0:
            return
        if lengths is not None:
            valid = self._rows_of(lengths, "lengths")
            if right_padding is not None and len({n + p for n, p in zip(valid, padding, strict=True)}) > 1:
                raise ValueError(f"lengths {valid} and right_padding {padding} don't add up to the same in every row")
            self._limits = [offset + n for offset, n in zip(self._offsets, valid, strict=True)]
        elif right_padding is not None:
            if self._rules.max_size is not None or self._rules.chunk_size is not None:
                raise ValueError("right_padding needs lengths here: padding must not push tokens out of the window")
            self._right_padding = padding

    def finalize(self) -> None:
        """Move each row right by its right padding, which thereby becomes left padding."""
        if self._right_padding is not None:
            self._limits = [o - p for o, p in zip(self._offsets, self._right_padding, strict=True)]
        if self._limits is not None:
            self._make_room(self._rules.max_size)
        self._limits = self._right_padding = None

    def filter(self, batch_indices: Indices) -> None:
        """Keep these rows, in this order, and no more left padding than they need."""
        rows = self._checked(batch_indices)
        self._first = [self._first[i] for i in rows]
        self._slots.start = max(self._slots.start, min([*self._first, self._slots.end]))
        self._slots = self._slots.take(rows)
        self._offsets = [self._offsets[i] for i in rows]
        for name in ("_limits", "_right_padding"):
            if (found := getattr(self, name)) is not None:
                setattr(self, name, [found[i] for i in rows])

    def extend(self, other: Self) -> None:
        """Append the rows of `other`, which stays as it is; ValueError unless it has this class and these rules."""
        if type(other) is not type(self) or other._rules != self._rules:
            raise ValueError(
                f"{type(self).__name__} ({_described(self)}) can't take the rows of {type(other).__name__} "
                f"({_described(other)})"
            )
        if self._pending() or other._pending():
            raise ValueError("right padding is pending: call finalize() before the batch is extended")
        columns = max(self._slots.held, other._slots.held)
        parts = [(c._slots.view(), len(c._first)) for c in (self, other)]
        # Counted from the common right end, where the column `columns` is.
        first = [f - c._slots.end + columns for c in (self, other) for f in c._first]
        arrays = join(parts, columns) if any(arrays for arrays, _ in parts) else ()
        self._slots, self._first = Slots(arrays), first
        self._offsets = self._offsets + other._offsets

    def extract(self, idx: int) -> Any:
        """Row `idx` as a cache of its own: a copy that keeps no memory of the batch alive."""
        (idx,) = self._checked([idx])
        alone = type(self)._of(self._rules, [self._first[idx]])
        alone._slots, alone._offsets = self._slots.take([idx]), [self._offsets[idx]]
        for name in ("_limits", "_right_padding"):
            if (found := getattr(self, name)) is not None:
                setattr(alone, name, [found[idx]])
        alone.finalize()
        alone._make_room(self._rules.max_size)
        row = self.row._of(self._rules)
        # A row inside its left padding has no history yet; one that was cut off and trimmed has one, but no tokens.
        row._offsets = [max(alone._offsets[0], 0)]
        if alone._slots.arrays and alone._first[0] < alone._slots.end:
            row._slots = Slots(alone._slots.view(alone._first[0])).take([0])
            # A lazy copy would hold on to the batch until somebody asks for it.
            mx.eval(row._slots.arrays)
        return row

    @classmethod
    def merge(cls, caches: Sequence[SingleCache]) -> Self:
        """The batch whose rows are `caches`, which stay as they are; ValueError unless they are all of class `row`,
        of one sequence each, with the same rules."""
        if not caches:
            raise ValueError("no caches to merge; at least one is expected")
        rules = caches[0]._rules
        for cache in caches:
            if type(cache) is not cls.row or cache._rules != rules:
                raise ValueError(
                    f"{cls.__name__} merges caches of class {cls.row.__name__} with equal rules "
                    f"({_described(caches[0])}), not {type(cache).__name__} ({_described(cache)})"
                )
            if cache._slots.arrays and cache._slots.arrays[0].shape[0] != 1:
                raise ValueError(f"a cache to merge has {cache._slots.arrays[0].shape[0]} rows; one is expected")
        views = [_visible(cache) for cache in caches]
        held = [view[0].shape[2] if view else 0 for view in views]
        batch = cls._of(rules, [max(held) - n for n in held])
        batch._offsets = [cache._offsets[0] for cache in caches]
        if max(held):
            batch._slots = Slots(join([(view, 1) for view in views], max(held)))
        return batch

    def _pending(self) -> bool:
        return self._limits is not None or self._right_padding is not None

    def _room(self) -> int | None:
        # While rows may still move right, one column more: a row that gets only padding in a chunk loses none.
        room = super()._room()
        return room if room is None or self._limits is None else room + 1

    def _excess(self) -> Sequence[int]:
        if self._limits is None:
            return super()._excess()
        return [max(0, offset - limit) for offset, limit in zip(self._offsets, self._limits, strict=True)]

    def _counters(self) -> Mapping[str, Any]:
        pending = {"limits": self._limits, "right_padding": self._right_padding}
        return {name: ",".join(map(str, rows)) for name, rows in pending.items() if rows is not None}

    def _set_counters(self, values: Mapping[str, str]) -> None:
        pending = {name: values.get(name) for name in ("limits", "right_padding")}
        rows = {name: None if text is None else [int(n) for n in text.split(",")] for name, text in pending.items()}
        self._limits, self._right_padding = rows["limits"], rows["right_padding"]

    def _rows_of(self, values: Indices, name: str) -> list[int]:
        found = integers(values)
        if len(found) != len(self._offsets) or min(found, default=0) < 0:
            raise ValueError(f"{name} is {found}; a number of tokens for each of {len(self._offsets)} rows is expected")
        return found

    def _checked(self, batch_indices: Indices) -> list[int]:
        rows, count = integers(batch_indices), len(self._offsets)
        for i in rows:
            if not -count <= i < count:
                raise ValueError(f"row {i} was asked for; the cache has rows 0 to {count - 1}")
        return [i % count for i in rows]


class BatchKVCache(BatchCache):
    """KVCache for several sequences."""

    row = KVCache

    def __init__(self, left_padding: Indices) -> None:
        super().__init__(Rules(), integers(left_padding))


class BatchRotatingKVCache(Windowed, BatchCache):
    """RotatingKVCache for several sequences: each row has its own first `keep` and last max_size − keep tokens."""

    row = RotatingKVCache

    def __init__(self, max_size: int, left_padding: Indices, keep: int = 0) -> None:
        super().__init__(Rules(max_size=max_size, keep=keep), integers(left_padding))


class BatchChunkedKVCache(Chunked, BatchCache):
    """ChunkedKVCache for several sequences."""

    row = ChunkedKVCache

    def __init__(self, chunk_size: int, left_padding: Indices) -> None:
        super().__init__(Rules(chunk_size=chunk_size), integers(left_padding))


class BatchQuantizedKVCache(Quantized, BatchCache):
    """QuantizedKVCache for several sequences."""

    row = QuantizedKVCache

    def __init__(self, left_padding: Indices, group_size: int = 64, bits: int = 8, mode: str = "affine") -> None:
        super().__init__(Rules(codec=Affine(group_size=group_size, bits=bits, mode=mode)), integers(left_padding))


class BatchDequantizingKVCache(Dequantizing, BatchCache):
    """DequantizingKVCache for several sequences."""

    row = DequantizingKVCache

    def __init__(self, left_padding: Indices, group_size: int = 64, bits: int = 8, mode: str = "affine") -> None:
        codec = Affine(group_size=group_size, bits=bits, mode=mode, dense=True)
        super().__init__(Rules(codec=codec), integers(left_padding))


# The batched form of each single-row class.
BATCHED: Mapping[type[SingleCache], type[BatchCache]] = {
    cls.row: cls
    for cls in (
        BatchKVCache,
        BatchRotatingKVCache,
        BatchChunkedKVCache,
        BatchQuantizedKVCache,
        BatchDequantizingKVCache,
    )
}


def _visible(cache: SingleCache) -> Arrays:
    """What a later token may look at: after a long chunk a window still holds more. Nothing is no arrays."""
    if cache.empty():
        return ()
    twin = type(cache)._of(cache._rules)
    twin._slots = Slots(cache._slots.view())
    twin._make_room(cache._rules.max_size)
    return twin._slots.view()


def _described(cache: LayerCache) -> str:
    return " ".join(cache.meta_state) or "no parameters"
