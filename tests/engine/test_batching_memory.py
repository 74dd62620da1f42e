"""Continuous batching holds no more than it needs: no graph that grows with the steps, no memory of rows that left."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import engine
from engine import generate
from engine.batching import Batcher, Sampling
from engine.generate import Engine
from engine.rows import Rows
from tests.engine.tiny import make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine.load(make_checkpoint(tmp_path_factory.mktemp("model"), 3), device="cpu")


def held(rows: Rows, tmp_path: Path) -> int:
    """Nodes of the graph that the rows' state still hangs on."""
    assert rows._counts is not None
    mx.export_to_dot(str(tmp_path / "graph"), rows._keys, rows._counts.array, *(c.state[0] for c in rows.caches))
    return (tmp_path / "graph").read_text().count("label")


def growth(model: Engine, tmp_path: Path) -> tuple[int, int]:
    """Graph nodes and active bytes that 220 steps of two rows add, within the first 256 slots of the caches."""
    batcher, seen = Batcher(model), []
    for seed in (1, 2):
        # Greedy, so that no draw needs the keys; and counted.
        batcher.add([5, 43, 7], max_tokens=240, sampling=Sampling(seed=seed, frequency=0.1))
    for step in range(231):
        batcher.step()
        if step in (10, 230):
            gc.collect()  # arrays in cycles that the collector hasn't come to yet are no growth
            seen.append((held(batcher._rows, tmp_path), mx.get_active_memory()))
    (nodes, size), (more, larger) = seen
    return more - nodes, larger - size


def test_no_graph_grows_with_the_steps(model: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, size = growth(model, tmp_path)
    assert nodes == 0
    assert size < 220, f"{size} bytes in 220 steps"

    def forgetful(self: Rows, *more: mx.array) -> None:
        """The planted fault: whatever the token doesn't need waits."""
        mx.eval(*more, [cache.state for cache in self.caches])

    monkeypatch.setattr(Rows, "evaluate", forgetful)
    nodes, _ = growth(model, tmp_path)
    assert nodes >= 220


def test_memory_of_rows_that_left_is_released(model: Engine) -> None:
    long = [int(x) for x in np.random.default_rng(1).integers(0, 61, 600)]
    gc.collect()
    before = mx.get_active_memory()
    batcher = Batcher(model, chunk=100)
    batcher.add(long, max_tokens=3)
    batcher.add([17, 3], max_tokens=40)
    while not any(event.reason for event in batcher.step()):
        pass
    # At once, with the step that ended it.
    # Keys and values of the full layer, Hkv = 2 and Dh = 8 in float32, in whole steps of 256; and a window of 5.
    one_row = 2 * 2 * 8 * 4 * 256 * 2
    assert mx.get_active_memory() - before < one_row + 16384
    batcher.complete()
    assert mx.get_active_memory() - before < 4096


def test_generating_holds_no_graph_of_the_steps_before(
    model: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and counted: nothing but the rows themselves needs the keys and the counts of every step."""

    class Kept(Rows):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            kept.append(self)

    kept: list[Rows] = []
    monkeypatch.setattr(generate, "Rows", Kept)

    def nodes(n: int) -> int:
        model.generate([17, 3], max_tokens=n, sampling=Sampling(frequency=0.1))
        return held(kept[-1], tmp_path)

    assert nodes(40) == nodes(10)
    monkeypatch.setattr(Kept, "state", [])
    assert nodes(40) >= nodes(10) + 30
