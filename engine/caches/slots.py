"""Buffers of tokens: a tuple of arrays [B, H, capacity, ·], all of them cut, rolled and joined alike along axis 2.

Tokens always lie in the order of time, in columns `start` to `end`. Columns are counted from the cache's beginning and
keep their numbers when the buffer moves, so that whoever holds one needn't follow. Dropping tokens from the front is
a larger `start`; the room is taken back when the buffer next moves. A sliding window therefore has no rotation: it
pays with a copy of the window once in STEP tokens.

Arrays that leave are new objects, and arrays that come in are copied: a later write can't be seen through either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from engine.caches.codecs import Arrays

# Tokens by which buffers grow: a write into spare room costs no copy of what is there. The value is mlx-lm's.
STEP = 256


class Slots:
    """Columns start … end of `arrays`, whose first column has the number `base`; empty without arrays."""

    def __init__(self, arrays: Arrays = (), start: int = 0) -> None:
        self.arrays = tuple(x[..., :, :] for x in arrays)
        self.base = self.start = start
        self.end = start + (arrays[0].shape[2] if arrays else 0)

    @property
    def held(self) -> int:
        """How many columns there are."""
        return self.end - self.start

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, room to grow included."""
        return sum(x.nbytes for x in self.arrays)

    def view(self, start: int | None = None, end: int | None = None) -> Arrays:
        """Columns start … end (all that are held) of each array."""
        first = (self.start if start is None else start) - self.base
        last = (self.end if end is None else end) - self.base
        return tuple(x[..., first:last, :] for x in self.arrays)

    def append(self, new: Arrays) -> None:
        """Put `new` [B, H, n, ·] behind `end`, in the dtypes that are there; ValueError if it has another shape."""
        n = new[0].shape[2]
        if self.arrays:
            check_alike(self.arrays, new, "the new keys and values", "the cache")
        capacity = self.arrays[0].shape[2] if self.arrays else 0
        live = self.held
        # Moved when full, and also when most of it is dead: after a long prefill through a short window.
        if not self.arrays or self.end - self.base + n > capacity or capacity > 2 * (live + n) + STEP:
            room = -(-n // STEP) * STEP - n
            old = self.view() if live else tuple(x[..., :0, :] for x in self.arrays or new)
            self.arrays = tuple(
                mx.concatenate([x, y.astype(x.dtype), mx.zeros((*y.shape[:2], room, y.shape[3]), x.dtype)], axis=2)
                for x, y in zip(old, new, strict=True)
            )
            self.base = self.start
        else:
            self._write(self.end, new)
        self.end += n

    def roll(self, shifts: Sequence[int]) -> None:
        """Move row b right by shifts[b] columns; what leaves at the right comes in at the left."""
        columns = mx.arange(self.held)[None] - mx.array(list(shifts))[:, None]
        index = (columns % max(self.held, 1))[:, None, :, None]
        self._replace(lambda x: mx.take_along_axis(x, index, axis=2))

    def carry(self, sources: Sequence[int], to: int, count: int) -> None:
        """Write row b's columns sources[b] … + count over its columns `to` … + count."""
        if len(set(sources)) == 1:
            self._write(to, self.view(sources[0], sources[0] + count))
            return
        index = (mx.array(list(sources))[:, None] - self.base + mx.arange(count)[None])[:, None, :, None]
        self._write(to, tuple(mx.take_along_axis(x, index, axis=2) for x in self.arrays))

    def take(self, rows: Sequence[int]) -> Slots:
        """The rows `rows`, in new buffers of exactly their size; no rows, no buffers."""
        if not rows:
            return Slots((), self.end)
        index = mx.array(list(rows))
        return Slots(tuple(mx.take(x, index, axis=0) for x in self.view()), self.start)

    def _write(self, at: int, new: Arrays) -> None:
        first = at - self.base
        for x, y in zip(self.arrays, new, strict=True):
            x[..., first : first + y.shape[2], :] = y.astype(x.dtype)

    def _replace(self, change: Callable[[mx.array], mx.array]) -> None:
        self.arrays, self.base = tuple(change(x) for x in self.view()), self.start


def check_alike(a: Arrays, b: Arrays, name: str, other: str) -> None:
    """ValueError unless `a` and `b` agree in all but the number of columns."""
    for x, y in zip(a, b, strict=True):
        if x.shape[:2] != y.shape[:2] or x.shape[3] != y.shape[3]:
            raise ValueError(f"{name} have shape {tuple(y.shape)} and don't fit {other}'s {tuple(x.shape)}")


def join(parts: Sequence[tuple[Arrays, int]], columns: int) -> Arrays:
    """Rows of several buffers under each other, right-justified in `columns` columns and zero before.

    A part is (arrays, rows); one without arrays stands for that many rows of zeros. ValueError for parts of different
    shape or dtype: joining must neither broadcast nor promote.
    """
    filled = [arrays for arrays, _ in parts if arrays]
    for arrays in filled[1:]:
        for x, y in zip(filled[0], arrays, strict=True):
            if (x.shape[1], x.shape[3], x.dtype) != (y.shape[1], y.shape[3], y.dtype):
                raise ValueError(
                    f"caches of {tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype} don't join: heads, head "
                    "sizes and dtypes must be equal"
                )
    joined = []
    for i, like in enumerate(filled[0]):
        rows = []
        for arrays, count in parts:
            x = arrays[i] if arrays else mx.zeros((count, like.shape[1], 0, like.shape[3]), like.dtype)
            rows.append(mx.pad(x, [(0, 0), (0, 0), (columns - x.shape[2], 0), (0, 0)]))
        joined.append(mx.concatenate(rows, axis=0))
    return tuple(joined)
