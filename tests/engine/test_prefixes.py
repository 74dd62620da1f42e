"""Prefix checkpoints: warm against cold, past a window's wrap, quantised, and after the live caches moved on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import engine
from engine import prefixes
from engine.caches import BatchKVCache, DequantizingKVCache, KVCache, QuantizedKVCache, RotatingKVCache
from engine.caches.batched import BATCHED
from engine.generate import Engine
from engine.prefixes import Caches, Checkpoint, Layout, Prefixes, restore, take
from tests.engine.tiny import make_checkpoint

Array = np.ndarray[Any, np.dtype[Any]]
PROMPT = [7, 3, 60, 11, 3, 42, 0, 19, 25, 33, 8, 8, 51, 14, 2, 37, 46, 5, 5, 9, 31, 28, 1]
# Each of two runs is within 2e-5 of the formulas in float64 (test_engine_model.py), relative to the largest logit.
TWO_RUNS = 4e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Layers of both kinds, a window of 5, sinks; float32."""
    return engine.load(make_checkpoint(tmp_path_factory.mktemp("model"), 3, num_hidden_layers=3), device="cpu")


def feed(model: Engine, tokens: list[int], caches: Caches) -> Array:
    """The logits [L, V] of `tokens`, whose keys and values go to `caches`."""
    logits = model.model(mx.array([tokens]), caches)
    mx.eval(logits, [cache.state for cache in caches])
    return np.array(logits[0].astype(mx.float32))


def fed(model: Engine, tokens: list[int], step: int | None = None) -> Caches:
    caches: Caches = model.caches()
    step = step or len(tokens)
    for start in range(0, len(tokens), step):
        feed(model, tokens[start : start + step], caches)
    return caches


def gap(actual: Array, expected: Array) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def arrays(checkpoint: Checkpoint) -> Iterator[Array]:
    for layer in checkpoint.layers:
        for x in layer.plain():
            yield np.array(x.astype(mx.float32))


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return a.tokens == b.tokens and all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


def rel_l2(actual: Checkpoint, expected: Checkpoint) -> float:
    a, b = (np.concatenate([x.ravel() for x in arrays(c)]).astype(np.float64) for c in (actual, expected))
    return float(np.sqrt(((a - b) ** 2).sum() / max((b**2).sum(), 1e-12)))


@pytest.mark.parametrize("n", [1, 2, 4, 5, 6, 9, 10, 11, 21, 22])
@pytest.mark.parametrize("step", [None, 1, 4])
def test_warm_equals_cold_past_the_windows_wrap(model: Engine, n: int, step: int | None) -> None:
    cold = feed(model, PROMPT, model.caches())
    caches = restore(take(PROMPT[:n], fed(model, PROMPT[:n], step)), PROMPT, model.caches)
    assert caches is not None
    assert [cache.offset for cache in caches] == [n] * 3
    assert gap(feed(model, PROMPT[n:], caches), cold[n:]) < TWO_RUNS
    # And on, token by token, around the window once more.
    longer = feed(model, PROMPT + PROMPT[:8], model.caches())
    for i, token in enumerate(PROMPT[:8]):
        assert gap(feed(model, [token], caches)[-1], longer[len(PROMPT) + i]) < TWO_RUNS


def test_a_window_restored_at_position_0_would_be_seen(model: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: keys are put back, and what the window had dropped before them is forgotten."""
    monkeypatch.setattr(prefixes, "_fill", lambda cache, layer: cache.update_and_fetch(*layer.plain()))
    cold = feed(model, PROMPT, model.caches())
    caches = restore(take(PROMPT[:11], fed(model, PROMPT[:11])), PROMPT, model.caches)
    assert caches is not None
    assert gap(feed(model, PROMPT[11:], caches), cold[11:]) > 100 * TWO_RUNS


def test_what_happens_to_the_live_caches_later_changes_no_checkpoint(model: Engine) -> None:
    caches = fed(model, PROMPT[:9], 3)
    kept = take(PROMPT[:9], caches)
    before = [x.copy() for x in arrays(kept)]
    feed(model, PROMPT[9:], caches)
    for cache in caches:
        if cache.is_trimmable():
            cache.trim(12)
    feed(model, [1, 1, 1, 1], caches)
    assert all(np.array_equal(x, y) for x, y in zip(arrays(kept), before, strict=True))
    assert same(kept, take(PROMPT[:9], fed(model, PROMPT[:9], 3)))
    # Nor does what happens to the restored ones.
    first = restore(kept, PROMPT, model.caches)
    assert first is not None
    for cache in first:
        if cache.is_trimmable():
            cache.trim(3)
    feed(model, [4, 4, 4], first)
    again = restore(kept, PROMPT, model.caches)
    assert again is not None
    assert gap(feed(model, PROMPT[9:], again), feed(model, PROMPT, model.caches())[9:]) < TWO_RUNS


@pytest.mark.parametrize("bits", [None, 8])
def test_a_checkpoint_waits_for_nothing(tmp_path: Path, bits: int | None) -> None:
    folder = make_checkpoint(tmp_path, 3, head_dim=32, attention_sinks=False)
    coded = engine.load(folder, device="cpu", kv_bits=bits, kv_group_size=32)
    kept = take(PROMPT[:9], fed(coded, PROMPT[:9]))
    arrays = [x for layer in kept.layers for x in layer.keys + layer.values]
    mx.export_to_dot(str(tmp_path / "graph"), *arrays)
    assert "rectangle" not in (tmp_path / "graph").read_text(), "there are operations left to do"
    mx.export_to_dot(str(tmp_path / "graph"), arrays[0] + 1)
    assert "rectangle" in (tmp_path / "graph").read_text()


def batch(model: Engine, prompts: list[list[int]]) -> Caches:
    """Batched caches that have been fed `prompts`, right-padded, all at once."""
    lengths, L = [len(p) for p in prompts], max(map(len, prompts))
    caches: Caches = [BATCHED[type(cache)].merge([cache] * len(prompts)) for cache in model.caches()]
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=[L - n for n in lengths])
    model.model(mx.array([p + [0] * (L - len(p)) for p in prompts]), caches)
    for cache in caches:
        cache.finalize()
    return caches


def test_checkpoints_of_a_batch_are_as_many_sequences(model: Engine) -> None:
    prompts = [PROMPT[:12], PROMPT[3:10], PROMPT[5:8]]
    caches = batch(model, prompts)
    kept = [take(prompt, [cache.extract(i) for cache in caches]) for i, prompt in enumerate(prompts)]
    # The batch goes on before anything is looked at.
    feed_all = mx.array([[1], [2], [3]])
    mx.eval(model.model(feed_all, caches))
    for prompt, checkpoint in zip(prompts, kept, strict=True):
        alone = take(prompt, fed(model, prompt))
        for actual, expected in zip(arrays(checkpoint), arrays(alone), strict=True):
            assert gap(actual, expected) < TWO_RUNS
    assert not any(same(kept[i], replace(kept[j], tokens=kept[i].tokens)) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_checkpoints_extracted_late_would_be_seen(model: Engine) -> None:
    """The published fault: row i is extracted when the loop is over and i is the last one, of caches that went on."""
    prompts = [PROMPT[:7], PROMPT[3:10], PROMPT[5:12]]
    caches = batch(model, prompts)
    late = [lambda: [cache.extract(i) for cache in caches] for i in range(3)]  # noqa: B023 - that's the fault
    made = [take(prompt, row()) for prompt, row in zip(prompts, late, strict=True)]
    assert same(made[0], replace(made[2], tokens=made[0].tokens))
    assert gap(next(arrays(made[0])), next(arrays(take(prompts[0], fed(model, prompts[0]))))) > 0.1
    mx.eval(model.model(mx.array([[1], [2], [3]]), caches))
    with pytest.raises(ValueError, match="holds 8 tokens"):
        take(prompts[2], late[2]())


# What requantising what was dequantised costs, measured at D = 64 and g = 64: 0.0024 with 8 bits, 0.0067 in bfloat16,
# 0.033 with 4. It depends on the values alone, so a fifth more covers another model's.
REQUANTISED = {("float32", 8): 0.003, ("float16", 8): 0.003, ("bfloat16", 8): 0.008, ("float32", 4): 0.04}


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """What a checkpoint would be that knew plain values only."""
    layers = [replace(x, keys=(k,), values=(v,), codec="") for x in checkpoint.layers for k, v in [x.plain()]]
    return replace(checkpoint, layers=tuple(layers))


@pytest.mark.parametrize(("dtype", "bits"), REQUANTISED, ids=str)
@pytest.mark.parametrize("sinks", [True, False])
def test_a_restored_row_is_quantised_like_its_neighbours(tmp_path: Path, dtype: str, bits: int, sinks: bool) -> None:
    folder = make_checkpoint(tmp_path, 3, head_dim=64, attention_sinks=sinks, layer_types=["full_attention"] * 2)
    plain = engine.load(folder, device="cpu", dtype=dtype)
    coded = engine.load(folder, device="cpu", dtype=dtype, kv_bits=bits, kv_group_size=64)
    cold = fed(coded, PROMPT[:-1])
    kept = take(PROMPT[:-1], cold)
    fresh = take(PROMPT[:-1], fed(plain, PROMPT[:-1]))

    def error(checkpoint: Checkpoint) -> float:
        warm = restore(checkpoint, PROMPT, coded.caches)
        assert warm is not None
        assert [type(cache) for cache in warm] == [type(cache) for cache in cold]
        assert type(warm[0]) is (DequantizingKVCache if sinks else QuantizedKVCache)
        assert type(cold[0]).merge([cold[0], warm[0]]).offset.tolist() == [len(PROMPT) - 1] * 2
        return rel_l2(take(PROMPT[:-1], warm), checkpoint)

    assert error(kept) == 0, "codes go back as codes"
    assert 0 < error(decoded(kept)) < REQUANTISED[dtype, bits]
    # Plain caches' values are quantised once: the loss is the quantisation's own.
    assert 0 < error(fresh) < (0.02 if bits == 8 else 0.2)
    # And codes go into plain caches, and into another quantisation.
    for other in (plain, engine.load(folder, device="cpu", dtype=dtype, kv_bits=8, kv_group_size=32)):
        warm = restore(kept, PROMPT, other.caches)
        assert warm is not None
        assert rel_l2(take(PROMPT[:-1], warm), kept) < 0.02


def test_a_prefix_that_is_restored_and_kept_again_doesnt_drift(tmp_path: Path) -> None:
    """Turn by turn in bfloat16 with 8 bits, whose requantised scales are rounded anew each time."""
    folder = make_checkpoint(tmp_path, 3, head_dim=64, attention_sinks=False, layer_types=["full_attention"] * 2)
    coded = engine.load(folder, device="cpu", dtype="bfloat16", kv_bits=8)

    def turns(change: Any) -> float:
        kept = first = take(PROMPT[:9], fed(coded, PROMPT[:9]))
        for _ in range(12):
            warm = restore(change(kept), PROMPT, coded.caches)
            assert warm is not None
            kept = take(PROMPT[:9], warm)
        return rel_l2(kept, first)

    assert turns(lambda checkpoint: checkpoint) == 0
    assert turns(decoded) > 0.02


def test_codes_that_were_restored_are_not_the_checkpoints_own() -> None:
    """Trimmed and fed again, a restored cache writes over columns that it was given."""
    cache = QuantizedKVCache(group_size=32)
    cache.update_and_fetch(*mx.random.normal((2, 1, 2, 9, 32), key=mx.random.key(0)))
    kept = take(PROMPT[:9], [cache])
    before = [np.array(x) for x in kept.layers[0].keys + kept.layers[0].values]
    warm = restore(kept, PROMPT, lambda: [QuantizedKVCache(group_size=32)])
    assert warm is not None
    warm[0].trim(4)
    warm[0].update_and_fetch(*mx.ones((2, 1, 2, 3, 32)))
    assert warm[0].offset == 8
    after = [np.array(x) for x in kept.layers[0].keys + kept.layers[0].values]
    assert all(np.array_equal(x, y) for x, y in zip(after, before, strict=True))


def test_a_plain_row_among_quantised_ones_is_refused(tmp_path: Path) -> None:
    """The published fault: what was restored as float16 is merged into a quantised batch as it is."""
    caches = [QuantizedKVCache(group_size=32), KVCache()]
    for cache in caches:
        cache.update_and_fetch(mx.ones((1, 2, 3, 32)), mx.ones((1, 2, 3, 32)))
    for pair in (caches, caches[::-1]):
        with pytest.raises(ValueError, match="merges caches of class"):
            type(pair[0]).merge(pair)


def test_only_what_fits_exactly_is_restored(model: Engine) -> None:
    kept = take(PROMPT[:6], fed(model, PROMPT[:6]))
    layout = Layout(2, 8, mx.float32)
    assert restore(kept, PROMPT[:7], model.caches, layout) is not None
    for prompt in ([], PROMPT[:5], PROMPT[:6], [*PROMPT[:5], 1, 1, 1]):
        assert restore(kept, prompt, model.caches) is None
    factories: list[Any] = [
        lambda: model.caches()[:2],
        lambda: [*model.caches(), KVCache()],
        lambda: [RotatingKVCache(5), KVCache(), KVCache()],
        lambda: [RotatingKVCache(6), KVCache(), RotatingKVCache(6)],
        lambda: [RotatingKVCache(5, keep=1), KVCache(), RotatingKVCache(5, keep=1)],
        lambda: [RotatingKVCache(5), BatchKVCache([0]), RotatingKVCache(5)],
        lambda: [RotatingKVCache(5), type("Mine", (KVCache,), {})(), RotatingKVCache(5)],
        lambda: [RotatingKVCache(5), QuantizedKVCache(group_size=64), RotatingKVCache(5)],
    ]
    for factory in factories:
        assert restore(kept, PROMPT, factory) is None
    for other in (layout._replace(heads=1), layout._replace(head_dim=16), layout._replace(dtype=mx.float16)):
        assert restore(kept, PROMPT, model.caches, other) is None
    full = kept.layers[1]
    (keys,), (values,) = full.keys, full.values
    for wrong in (
        replace(full, keys=(keys[:, :, 1:],)),
        replace(full, values=(values[0],)),
        replace(full, values=(mx.concatenate([values, values]),)),
        replace(full, values=(values, values)),
        replace(full, codec="group_size=32 bits=8 mode=affine"),
        replace(full, keys=(keys,) * 3, values=(values,) * 3, codec="bits 8"),
        replace(full, offset=5),
    ):
        broken = replace(kept, layers=(kept.layers[0], wrong, kept.layers[2]))
        assert restore(broken, PROMPT, model.caches) is None
    for part in ("keys", "values"):
        for other in (keys.astype(mx.float16), keys[:, :1], keys[..., :4]):
            broken = replace(kept, layers=(kept.layers[0], replace(full, **{part: (other,)}), kept.layers[2]))
            assert restore(broken, PROMPT, model.caches, layout) is None


def test_a_checkpoint_is_as_large_as_its_tokens(model: Engine) -> None:
    kept = take(PROMPT[:9], fed(model, PROMPT[:9]))
    # Two arrays, Hkv = 2, Dh = 8, float32: two windows of 5 and one full layer.
    assert kept.nbytes == 2 * 2 * 8 * 4 * (5 + 9 + 5)
    assert [layer.kind for layer in kept.layers] == ["window 5 keep 0", "full", "window 5 keep 0"]


def test_a_kept_prefix_of_a_window_is_restored_with_it(model: Engine) -> None:
    def caches() -> Caches:
        return [RotatingKVCache(6, keep=2), KVCache(), RotatingKVCache(6, keep=2)]

    live = caches()
    feed(model, PROMPT[:13], live)
    warm = restore(take(PROMPT[:13], live), PROMPT, caches)
    assert warm is not None
    assert gap(feed(model, PROMPT[13:], warm), feed(model, PROMPT[13:], live)) < TWO_RUNS


def test_what_cant_be_checkpointed_is_one_line(model: Engine) -> None:
    caches = fed(model, PROMPT[:4])
    for tokens, wrong, says in (
        ([], caches, "at least one"),
        (PROMPT[:3], caches, "holds 4 tokens"),
        (PROMPT[:4], [caches[0], type("Mine", (KVCache,), {})()], "layer 1's cache is a Mine"),
        (PROMPT[:4], [BatchKVCache([0])], "BatchKVCache"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            take(tokens, wrong)
        assert "\n" not in str(error.value)


def test_in_memory_the_longest_prefix_wins_and_the_least_recently_used_leave(model: Engine) -> None:
    kept = {n: take(PROMPT[:n], fed(model, PROMPT[:n])) for n in (2, 4, 6)}
    other = take(PROMPT[5:9], fed(model, PROMPT[5:9]))
    memory = Prefixes(kept[2].nbytes + kept[4].nbytes + kept[6].nbytes)
    for checkpoint in kept.values():
        assert memory.put(checkpoint)
        assert memory.put(checkpoint)

    def count(prompt: list[int]) -> int | None:
        found = memory.restore(prompt, model.caches)
        return found and found[1]

    assert len(memory) == 3
    assert [count(PROMPT[:n]) for n in range(9)] == [None, None, None, 2, 2, 4, 4, 6, 6]
    assert count(PROMPT[:4]) == 2
    assert memory.put(other)
    assert [count(PROMPT[:n]) for n in (3, 5, 7)] == [2, 2, 6], "4 was used least recently"
    assert memory.nbytes <= memory.max_bytes
    assert not Prefixes(other.nbytes - 1).put(other)


def test_in_memory_what_doesnt_restore_is_forgotten_alone(model: Engine) -> None:
    memory = Prefixes(1 << 20)
    good = take(PROMPT[:3], fed(model, PROMPT[:3]))
    long = take(PROMPT[:6], fed(model, PROMPT[:6]))
    memory.put(good)
    memory.put(replace(long, layers=long.layers[:2]))
    found = memory.restore(PROMPT, model.caches)
    assert found is not None
    assert found[1] == 3
    assert len(memory) == 1
