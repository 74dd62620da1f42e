"""The decoder on batches: each row as if it were alone, whatever its neighbours' lengths and however padded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import engine
from engine import caches
from engine.caches import batch_cache
from engine.generate import Engine
from tests.engine.tiny import make_checkpoint

PROMPTS = [[7, 3, 60, 11, 3, 42, 0, 19, 25, 33, 8], [5, 9], [51, 14, 2, 37, 46, 1, 1], [12]]
THEN = [[4, 8, 15, 16, 23, 42], [1, 2, 3, 4, 5, 6], [60, 50, 40, 30, 20, 10], [9, 9, 8, 8, 7, 7]]
# float32 sums in another order and of a few dozen terms; measured 2e-6, a wrong key or position moves logits by 1e-1.
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def on_the_cpu() -> Any:
    with mx.stream(mx.cpu):
        yield


def batch_caches(model: Engine, padding: Sequence[int]) -> list[Any]:
    kv = {} if model.kv is None else {"kv_bits": model.kv.bits, "kv_group_size": model.kv.group_size}
    config = model.config
    plain = [caches.row_cache(kind, config.sliding_window, sinks=config.attention_sinks) for kind in config.layer_types]
    return [batch_cache(cache, padding, sinks=config.attention_sinks, **kv) for cache in plain]


def logits(model: Engine, tokens: Sequence[Sequence[int]], kept: Sequence[Any]) -> np.ndarray[Any, Any]:
    y = model.model(mx.array(tokens, dtype=mx.int32), kept)
    mx.eval(y, [cache.state for cache in kept])
    return np.array(y)


def alone(model: Engine, row: int) -> np.ndarray[Any, Any]:
    """Logits of the last prompt token and of each token after it."""
    kept = model.caches()
    parts = [logits(model, [PROMPTS[row]], kept)[0, -1:]]
    parts += [logits(model, [[token]], kept)[0] for token in THEN[row]]
    return np.concatenate(parts)


def left_padded(model: Engine) -> tuple[list[Any], np.ndarray[Any, Any]]:
    longest = max(map(len, PROMPTS))
    padding = [longest - len(prompt) for prompt in PROMPTS]
    kept = batch_caches(model, padding)
    rows = [[0] * p + prompt for p, prompt in zip(padding, PROMPTS, strict=True)]
    logits(model, [row[:6] for row in rows], kept)
    return kept, logits(model, [row[6:] for row in rows], kept)[:, -1]


def right_padded(model: Engine) -> tuple[list[Any], np.ndarray[Any, Any]]:
    longest, lengths = max(map(len, PROMPTS)), [len(prompt) for prompt in PROMPTS]
    kept = batch_caches(model, [0] * len(PROMPTS))
    rows = [prompt + [0] * (longest - len(prompt)) for prompt in PROMPTS]
    for cache in kept:
        cache.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
    parts = [logits(model, [row[a : a + 4] for row in rows], kept) for a in range(0, longest, 4)]
    for cache in kept:
        cache.finalize()
    whole = np.concatenate(parts, axis=1)
    return kept, np.stack([whole[b, n - 1] for b, n in enumerate(lengths)])


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"attention_sinks": False, "num_key_value_heads": 1}, {}),
    ({"head_dim": 32}, {"kv_bits": 8, "kv_group_size": 32}),
    ({"head_dim": 32, "attention_sinks": False}, {"kv_bits": 4, "kv_group_size": 32}),
]


def different(model: Engine, fill: Any) -> float:
    """How far batched logits are from those of each row alone, over prompt and decode."""
    kept, first = fill(model)
    found = [first[:, None]]
    for i in range(len(THEN[0])):
        found.append(logits(model, [[tokens[i]] for tokens in THEN], kept))
    together = np.concatenate(found, axis=1)
    return max(float(np.abs(together[b] - alone(model, b)).max()) for b in range(len(PROMPTS)))


@pytest.mark.parametrize(("config", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("fill", [left_padded, right_padded])
def test_a_row_of_a_batch_is_as_if_alone(tmp_path: Path, config: Any, options: Any, fill: Any) -> None:
    model = engine.load(make_checkpoint(tmp_path, 21, **config), device="cpu", **options)
    assert different(model, fill) < TOLERANCE


@pytest.mark.parametrize(("config", "options"), OPTIONS[::2], ids=str)
def test_rows_leave_and_join_between_steps(tmp_path: Path, config: Any, options: Any) -> None:
    model = engine.load(make_checkpoint(tmp_path, 22, **config), device="cpu", **options)
    wanted = [alone(model, b) for b in range(len(PROMPTS))]
    kept, _ = right_padded(model)
    fed = [0] * len(PROMPTS)
    rows = [0, 1, 2, 3]

    def step() -> None:
        y = logits(model, [[THEN[b][fed[b]]] for b in rows], kept)
        for i, b in enumerate(rows):
            fed[b] += 1
            assert np.abs(y[i, 0] - wanted[b][fed[b]]).max() < TOLERANCE, (b, fed)

    step()
    waiting = [cache.extract(1) for cache in kept]
    for cache in kept:
        cache.filter([3, 0, 2])
    rows = [3, 0, 2]
    step()
    step()
    for cache, back in zip(kept, waiting, strict=True):
        cache.extend(type(cache).merge([back]))
    rows = [3, 0, 2, 1]
    step()
    step()
    assert fed == [5, 3, 5, 5]


def wrong_positions(patch: pytest.MonkeyPatch) -> None:
    """The longest row's, for all. (One offset that is wrong by as much in every step would turn nothing in RoPE.)"""
    patch.setattr(caches.BatchKVCache, "offset", property(lambda self: mx.array([max(self._offsets)] * 4)))


def no_mask_for_one_token(patch: pytest.MonkeyPatch) -> None:
    original = caches.BatchKVCache.make_mask
    patch.setattr(caches.BatchKVCache, "make_mask", lambda self, N: None if N == 1 else original(self, N))


@pytest.mark.parametrize("fault", [wrong_positions, no_mask_for_one_token])
def test_a_planted_fault_is_seen(tmp_path: Path, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tolerance is for: it lies far below what either fault does."""
    model = engine.load(make_checkpoint(tmp_path, 21), device="cpu")
    fault(monkeypatch)
    assert different(model, right_padded) > 100 * TOLERANCE


@pytest.mark.parametrize("sinks", [False, True])
def test_an_engine_with_quantised_keys_and_values(tmp_path: Path, sinks: bool) -> None:
    folder = make_checkpoint(tmp_path, 23, head_dim=32, attention_sinks=sinks)
    exact = alone(engine.load(folder, device="cpu"), 0)
    errors = []
    for bits in (8, 4):
        model = engine.load(folder, device="cpu", kv_bits=bits, kv_group_size=32)
        kinds = [type(cache) for cache in model.caches()]
        assert kinds == [caches.RotatingKVCache, caches.DequantizingKVCache if sinks else caches.QuantizedKVCache]
        assert model.provenance["kv_cache"] == {"group_size": 32, "bits": bits}
        found = alone(model, 0)
        errors.append(float(np.linalg.norm(found - exact) / np.linalg.norm(exact)))
    # Bounds of the quantisation's own loss: 0.02 with 8 bits, 0.20 with 4.
    assert 0 < errors[0] < 0.02 and errors[0] < errors[1] < 0.20
    assert "kv_cache" not in engine.load(folder, device="cpu").provenance


def test_options_that_no_cache_takes_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 24)
    with pytest.raises(ValueError, match="bits is 5"):
        engine.load(folder, device="cpu", kv_bits=5)
    with pytest.raises(ValueError, match="must divide the model's head_dim, 8"):
        engine.load(folder, device="cpu", kv_bits=8, kv_group_size=32)
