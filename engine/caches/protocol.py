"""What attention needs of a cache, whichever class it has. B batch, H heads, n new tokens, S keys, D and Dv head sizes.

It is mlx-lm's protocol, so that caches and models of either kind go together.
"""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx

from engine.caches.codecs import Fetched
from engine.masks import Mask


class Cache(Protocol):
    """A key-value cache of one layer."""

    @property
    def offset(self) -> int | mx.array:
        """The position of the next token, or [B] of each row's."""
        ...

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> Mask:
        """The mask for the next update of N tokens; asked for before it."""
        ...

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Fetched, Fetched]:
        """[B, H, n, D], [B, H, n, Dv] new keys and values → those that the new tokens may look at."""
        ...

    @property
    def state(self) -> Any:
        """The arrays that must be evaluated with the step, or the graph grows from step to step."""
        ...
