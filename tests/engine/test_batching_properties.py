"""Drawn lives of a batch: requests of any length and options come, are cancelled and leave at any step.

Each row's logits are those of its own tokens alone, and each of its tokens is the one that its own logits, history and
seed choose.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine.batching import Batcher, Sampling
from engine.generate import Engine
from engine.penalties import penalties
from engine.prefixes import Prefixes
from engine.sampling import sampler
from tests.engine.test_batching import TWO_RUNS, Spied
from tests.engine.tiny import make_checkpoint

Array = np.ndarray[Any, np.dtype[Any]]
# Prompts are its beginnings, some with an ending of their own: so prefixes are found, and end at any place of a window.
TEXT = [int(x) for x in np.random.default_rng(8).integers(0, 61, 24)]
SAMPLING = st.one_of(
    st.just(Sampling()),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.5, 1.5]),
        top_k=st.sampled_from([0, 1, 7]),
        top_p=st.sampled_from([1.0, 0.6]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition=st.sampled_from([1.0, 0.8, 1.5]),
        presence=st.sampled_from([0.0, 0.7]),
        frequency=st.sampled_from([0.0, 0.4, -0.3]),
        seed=st.sampled_from([0, 1, 2**63 + 5]),
    ),
)
REQUEST = st.fixed_dictionaries(
    {
        "tokens": st.builds(
            lambda n, own: TEXT[:n] + own, st.integers(1, 24), st.lists(st.integers(0, 60), max_size=3)
        ),
        "max_tokens": st.integers(1, 7),
        "sampling": SAMPLING,
        "stop": st.sets(st.integers(0, 60), max_size=4),
    }
)
# What happens before each step: a request that comes, the number of one to cancel, or nothing.
LIFE = st.lists(st.one_of(REQUEST, REQUEST, st.integers(1, 6), st.none()), min_size=3, max_size=14)
SOURCES = {"no prefixes": lambda: None, "prefixes": lambda: Prefixes(1 << 20), "few prefixes": lambda: Prefixes(9000)}


@dataclass
class Watched:
    """What came of a request: the logits and the token of each step, and the reason of its end."""

    asked: dict[str, Any]
    logits: list[Array] = field(default_factory=list)
    tokens: list[int | None] = field(default_factory=list)
    reason: str = ""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine.load(make_checkpoint(tmp_path_factory.mktemp("model"), 3), device="cpu")


def lived(model: Engine, life: list[Any], max_rows: int, chunk: int, prefixes: Prefixes | None) -> list[Watched]:
    """Every request of `life`, after all have ended."""
    spied, watched = Spied(model), {}
    batcher = Batcher(spied.engine, max_rows=max_rows, chunk=chunk, prefixes=prefixes)
    upcoming = iter(life)
    while (change := next(upcoming, "none is left")) != "none is left" or batcher.busy:
        if isinstance(change, dict):
            watched[batcher.add(**change)] = Watched(change)
        elif isinstance(change, int) and batcher.cancel(change):
            watched[change].reason = "cancelled"
        spied.logits.clear()
        events = batcher.step()
        assert len(events) <= max_rows
        for row, event in enumerate(events):
            request = watched[event.request]
            assert request.reason == "", "it was over"
            request.logits.append(np.array(spied.logits[-1][row]))
            request.tokens.append(event.token)
            request.reason = event.reason
    return list(watched.values())


def chosen(request: Watched) -> list[int]:
    """The tokens that the request's options and seed choose from the logits that it had."""
    s, said = request.asked["sampling"], list(request.asked["tokens"])
    key, ids = mx.random.key(s.seed), []
    for row in request.logits:
        logits = penalties(
            mx.array(row), mx.array(said), repetition=s.repetition, presence=s.presence, frequency=s.frequency
        )
        key, draw = mx.random.split(key)
        options = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p}
        ids.append(int(sampler(logits[None], key=draw[None], **options).item()))
        said.append(ids[-1])
    return ids


def check(model: Engine, request: Watched) -> None:
    tokens, ids = request.asked["tokens"], chosen(request)
    assert request.reason, "it ended"
    if request.reason == "stop":
        assert ids[-1] in request.asked["stop"]
    assert request.tokens == [*ids[:-1], None] if request.reason == "stop" else request.tokens == ids
    assert not request.asked["stop"] & set(request.tokens)
    assert len(ids) == request.asked["max_tokens"] if request.reason == "length" else len(ids) <= 7
    if not ids:
        return
    rows: list[Array] = []
    model.run(tokens + ids[:-1], tap=lambda name, x: rows.append(x) if name == "logits" else None)
    alone = np.concatenate(rows)[len(tokens) - 1 :]
    assert np.abs(np.array(request.logits) - alone).max() <= TWO_RUNS * np.abs(alone).max()


@settings(max_examples=50)
@given(
    life=LIFE,
    max_rows=st.integers(1, 4),
    chunk=st.integers(1, 9),
    prefixes=st.sampled_from(list(SOURCES)),
)
def test_a_drawn_life_of_a_batch(model: Engine, life: list[Any], max_rows: int, chunk: int, prefixes: str) -> None:
    for request in lived(model, life, max_rows, chunk, SOURCES[prefixes]()):
        check(model, request)
