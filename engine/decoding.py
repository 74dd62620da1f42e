"""The engine's model as a plain function of tokens and caches, as the decoder contract takes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from engine.caches import batch_cache
from engine.generate import Engine


class Decoding:
    """decoder(tokens [B, n], cache=None) -> logits [B, n, V]; a cache of `make_cache` is updated in place."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.vocab_size = engine.config.vocab_size

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        with mx.stream(self.engine.device.handle):
            return self.engine.model(tokens, self.make_cache() if cache is None else cache)

    def make_cache(self, left_padding: Sequence[int] | None = None) -> list[Any]:
        """An empty cache for each layer: for rows of equal length, or with padding on the left of each."""
        rows = self.engine.caches()
        if left_padding is None:
            return list(rows)
        sinks = self.engine.config.attention_sinks
        return [batch_cache(row, left_padding, sinks=sinks) for row in rows]
