"""What a cache should hold: a plain list of tokens for each row, and which of them each query must and may see.

Nothing here knows arrays of a framework, buffers or rings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which tokens a cache shows: all, or a window of max_size with the first `keep`, or those since the last cut."""

    max_size: int | None = None
    keep: int = 0
    chunk_size: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Rules:
        """The rules that a factory's options stand for."""
        return cls(max_size=options.get("max_size"), keep=options.get("keep", 0), chunk_size=options.get("chunk_size"))


@dataclass
class Row:
    """One sequence: its tokens' serials in order, trimmed ones gone.

    dropped: how many of them a chunked cache has let go at the front.
    """

    name: str
    tokens: list[int] = field(default_factory=list)
    padding: int = 0  # left padding that hasn't been fed yet
    dropped: int = 0

    @property
    def offset(self) -> int:
        """The position of the next token, negative within left padding."""
        return len(self.tokens) - self.padding

    def real(self, n: int, limit: int | None = None) -> list[bool]:
        """Which of the next n fed columns are tokens: not those of left padding, nor those after `limit` tokens."""
        end = n if limit is None else self.padding + limit
        return [self.padding <= i < end for i in range(n)]

    def copy(self, name: str | None = None) -> Row:
        """A row of its own with the same tokens."""
        return Row(name or self.name, list(self.tokens), self.padding, self.dropped)


@dataclass(frozen=True)
class Sight:
    """For queries [Q]: which tokens [Q, T] of the row each must see, and which it may."""

    queries: Array  # their places in the chunk
    must: Array
    may: Array


def sight(rules: Rules, row: Row, places: Sequence[int], window: int | None, decode: bool) -> Sight:
    """What the row's last len(places) tokens, fed at these places of the chunk, must and may see of its tokens.

    A window of a chunk's mask and a ring's size both narrow it. With `keep`, the newest max_size − keep must be seen;
    that the first `keep` stay visible is asked of decoding (`decode`) only, for a windowed mask over a longer chunk may
    let them go. A window wider than the ring may show what a longer chunk still holds.
    """
    count = len(row.tokens)
    token = np.arange(count)[None]
    query = np.arange(count - len(places), count)[:, None]
    must = (token <= query) & (token >= row.dropped)
    may = must.copy()
    if rules.max_size is not None:
        sink = token < rules.keep
        must &= (token > query - (rules.max_size - rules.keep)) | (sink & decode)
        may &= (token > query - max(rules.max_size, window or 0)) | sink
    if window is not None:
        must &= (token > query - window) | ((token < rules.keep) & decode)
        may &= (token > query - window) | (token < rules.keep)
    return Sight(np.array(places, int), must, may)
