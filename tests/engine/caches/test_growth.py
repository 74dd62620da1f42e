"""What decoding leaves behind: no graph nodes, no bytes."""

from __future__ import annotations

import io
from typing import Any

import mlx.core as mx
import pytest

from engine import caches
from tests.engine.caches.oracle import Kind, by_kind, random_tokens


def decoded_nodes(cache: Any, B: int, steps: int) -> list[int]:
    """Nodes of the unevaluated graph behind a cache after each decode step of which only the result was evaluated."""
    counts = []
    for i in range(steps):
        mask = cache.make_mask(1)
        keys, values = cache.update_and_fetch(*random_tokens(B, 1, seed=i))
        flat = [y for x in (keys, values) for y in (x if isinstance(x, tuple) else (x,))]
        mx.eval(flat, [] if mask is None else [mask])
        del keys, values, flat, mask
        text = io.StringIO()
        arrays = [x for x in vars(cache).values() if isinstance(x, mx.array)]
        mx.export_to_dot(text, *cache._slots.arrays, *arrays, cache.offset if B > 1 else mx.array(cache.offset))
        counts.append(text.getvalue().count("label"))
    return counts


@by_kind
def test_the_graph_does_not_grow_with_decode_steps(kind: Kind) -> None:
    for cache, B in ((kind.single(), 1), (kind.batch([0, 2]), 2)):
        counts = decoded_nodes(cache, B, 300)
        assert max(counts[-50:]) <= max(counts[:20]), "nodes per step"


def test_a_planted_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaking(caches.BatchKVCache):
        def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
            self.lazy = getattr(self, "lazy", mx.array(0)) + keys.shape[2]
            return super().update_and_fetch(keys, values)

    counts = decoded_nodes(Leaking([0, 2]), 2, 60)
    assert counts[-1] - counts[0] >= 59


def test_memory_does_not_grow_with_decode_steps() -> None:
    cache = caches.BatchRotatingKVCache(16, [0, 2], keep=2)
    active = []
    for i in range(600):
        cache.update_and_fetch(*random_tokens(2, 1, seed=i))
        mx.eval(cache.state)
        active.append(mx.get_active_memory())
    # The buffer is moved every 256 steps and never has more columns; keeping one token a step would be 300 × 1,536 B.
    assert max(active[300:]) <= max(active[:300]) + 8192
