"""States that aren't key-value caches but travel with them: arrays of a recurrent layer, and a layer's several caches.

ArraysCache holds whatever arrays [B, …] its layer puts in, whole: nothing of it can be trimmed or quantised. Its mask
says which tokens of a chunk are real, because a recurrence, unlike causal attention, would take padding into its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx

from engine.masks import integers

Indices = Sequence[int] | mx.array


class ArraysCache:
    """`size` arrays [B, …], None until the layer sets them; with a batch's paddings, as Python integers by row."""

    def __init__(self, size: int, left_padding: Indices | None = None) -> None:
        self.cache: list[mx.array | None] = [None] * size
        self._left = None if left_padding is None else integers(left_padding)
        self._lengths: list[int] | None = None

    def __getitem__(self, index: int) -> mx.array | None:
        return self.cache[index]

    def __setitem__(self, index: int, value: mx.array | None) -> None:
        # A slice of a longer array would keep all of it in memory.
        self.cache[index] = None if value is None else mx.contiguous(value)

    @property
    def left_padding(self) -> mx.array | None:
        """[B] int32: columns of padding still to come before each row's tokens."""
        return None if self._left is None else mx.array(self._left, dtype=mx.int32)

    @property
    def lengths(self) -> mx.array | None:
        """[B] int32: real tokens still to come, behind which everything is right padding."""
        return None if self._lengths is None else mx.array(self._lengths, dtype=mx.int32)

    def make_mask(self, N: int) -> mx.array | None:
        """Bool [B, N], True = a real token, by left padding and by lengths both; None while no row is padded."""
        columns = mx.arange(N)
        mask = None
        if self._left is not None and max(self._left, default=0) > 0:
            mask = columns >= mx.array(self._left)[:, None]
        if self._lengths is not None:
            inside = columns < mx.array(self._lengths)[:, None]
            mask = inside if mask is None else mask & inside
        return mask

    def advance(self, N: int) -> None:
        """Count N columns as fed."""
        self._left = None if self._left is None else [n - N for n in self._left]
        self._lengths = None if self._lengths is None else [n - N for n in self._lengths]

    def prepare(
        self,
        *,
        left_padding: Indices | None = None,
        lengths: Indices | None = None,
        right_padding: Indices | None = None,
    ) -> None:
        """Announce what the next chunks look like, by row: padding in front, real tokens; `right_padding` is ignored,
        as it follows from the lengths."""
        if left_padding is not None:
            self._left = [
                a + b for a, b in zip(self._left or [0] * len(left_padding), integers(left_padding), strict=True)
            ]
        if lengths is not None:
            self._lengths = integers(lengths)

    def finalize(self) -> None:
        """Forget the paddings: everything from here on is real."""
        self._left = self._lengths = None

    def filter(self, batch_indices: Indices) -> None:
        """Keep these rows, in this order."""
        rows = integers(batch_indices)
        index = mx.array(rows, dtype=mx.int32)
        self.cache = [None if x is None else mx.take(x, index, axis=0) for x in self.cache]
        self._left = None if self._left is None else [self._left[i] for i in rows]
        self._lengths = None if self._lengths is None else [self._lengths[i] for i in rows]

    def extend(self, other: Self) -> None:
        """Append the rows of `other`; arrays that one of the two hasn't set yet are zeros in it."""
        if type(other) is not type(self) or len(other.cache) != len(self.cache):
            raise ValueError(f"{type(self).__name__} of {len(self.cache)} arrays can't take another kind's rows")
        counts = self._count(), other._count()
        self.cache = [_stacked([a, b], counts) for a, b in zip(self.cache, other.cache, strict=True)]
        for name in ("_left", "_lengths"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if (mine is None) != (theirs is None):
                raise ValueError("one batch has padding pending and the other hasn't: call finalize() first")
            if mine is not None:
                setattr(self, name, mine + theirs)

    def extract(self, idx: int) -> Self:
        """Row `idx` as a state of its own, a copy."""
        row = self._of(len(self.cache))
        row.cache = [None if x is None else mx.take(x, mx.array([idx]), axis=0) for x in self.cache]
        mx.eval([x for x in row.cache if x is not None])
        return row

    @classmethod
    def merge(cls, caches: Sequence[Self]) -> Self:
        """The batch whose rows are `caches`; arrays that a row hasn't set are zeros in it."""
        batch = cls._of(len(caches[0].cache))
        counts = [cache._count() for cache in caches]
        batch.cache = [_stacked([c.cache[i] for c in caches], counts) for i in range(len(batch.cache))]
        return batch

    def is_trimmable(self) -> bool:
        """Never: a recurrence can't be run backwards."""
        return False

    def trim(self, n: int) -> int:
        """0: nothing is trimmed."""
        return 0

    def size(self) -> int:
        """0: a recurrent state has no length."""
        return 0

    def empty(self) -> bool:
        """Whether the layer has set nothing yet."""
        return all(x is None for x in self.cache)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(x.nbytes for x in self.cache if x is not None)

    @property
    def state(self) -> Any:
        """(arrays, left_padding, lengths)."""
        return list(self.cache), self.left_padding, self.lengths

    @state.setter
    def state(self, state: Any) -> None:
        arrays, left_padding, lengths = state
        self.cache = list(arrays)
        self._left = None if left_padding is None else integers(left_padding)
        self._lengths = None if lengths is None else integers(lengths)

    @property
    def meta_state(self) -> tuple[str, ...]:
        """Nothing: `state` is everything."""
        return ()

    @meta_state.setter
    def meta_state(self, meta: Sequence[str]) -> None:
        if meta:
            raise ValueError(f"a state with {' '.join(meta)} is not one of a {type(self).__name__}")

    @classmethod
    def _of(cls, size: int) -> Self:
        cache = cls.__new__(cls)
        ArraysCache.__init__(cache, size)
        return cache

    def _count(self) -> int:
        rows = [x.shape[0] for x in self.cache if x is not None]
        return (rows or [len(r) for r in (self._left, self._lengths) if r is not None] or [1])[0]


class MambaCache(ArraysCache):
    """The two arrays of a Mamba layer: the convolution's last inputs and the state."""

    def __init__(self, left_padding: Indices | None = None) -> None:
        super().__init__(2, left_padding)


class CacheList:
    """Several caches of one layer, handled as one."""

    def __init__(self, *caches: Any) -> None:
        self.caches = caches

    def __getitem__(self, index: int) -> Any:
        return self.caches[index]

    def is_trimmable(self) -> bool:
        """Whether every member is."""
        return all(c.is_trimmable() for c in self.caches)

    def trim(self, n: int) -> int:
        """Trim all members alike, or none of them; how many tokens that were."""
        if not self.is_trimmable():
            return 0
        n = min([n, *(c.size() for c in self.caches)])
        for c in self.caches:
            c.trim(n)
        return n

    def prepare(self, **paddings: Any) -> None:
        """As every member's."""
        for c in self.caches:
            c.prepare(**paddings)

    def finalize(self) -> None:
        """As every member's."""
        for c in self.caches:
            c.finalize()

    def filter(self, batch_indices: Indices) -> None:
        """As every member's."""
        for c in self.caches:
            c.filter(batch_indices)

    def extend(self, other: CacheList) -> None:
        """Append the rows of `other`, member by member."""
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine.extend(theirs)

    def extract(self, idx: int) -> CacheList:
        """Row `idx` of every member."""
        return CacheList(*(c.extract(idx) for c in self.caches))

    @classmethod
    def merge(cls, caches: Sequence[CacheList]) -> CacheList:
        """The batch whose rows are `caches`, member by member."""
        members = zip(*(c.caches for c in caches), strict=True)
        return cls(*(rows[0].merge(list(rows)) for rows in members))

    def size(self) -> int:
        """The longest member's."""
        return max((c.size() for c in self.caches), default=0)

    def empty(self) -> bool:
        """Whether every member is."""
        return all(c.empty() for c in self.caches)

    @property
    def nbytes(self) -> int:
        """Bytes of all members."""
        return sum(c.nbytes for c in self.caches)

    @property
    def state(self) -> Any:
        """The members' states."""
        return [c.state for c in self.caches]

    @state.setter
    def state(self, state: Any) -> None:
        for c, found in zip(self.caches, state, strict=True):
            c.state = found

    @property
    def meta_state(self) -> Any:
        """The members' meta states."""
        return [c.meta_state for c in self.caches]

    @meta_state.setter
    def meta_state(self, meta: Any) -> None:
        for c, found in zip(self.caches, meta, strict=True):
            c.meta_state = found


def _stacked(arrays: Sequence[mx.array | None], counts: Sequence[int]) -> mx.array | None:
    like = next((x for x in arrays if x is not None), None)
    if like is None:
        return None
    rows = [mx.zeros((n, *like.shape[1:]), like.dtype) if x is None else x for x, n in zip(arrays, counts, strict=True)]
    if any(x.dtype != like.dtype for x in rows):
        raise ValueError(f"states of {sorted({str(x.dtype) for x in rows})} don't join: dtypes must be equal")
    return mx.concatenate(rows, axis=0)
