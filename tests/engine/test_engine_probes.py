"""Probes: off they cost nothing, on they are the arrays that the computation uses, in one evaluation a step."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

import engine
from engine import probes
from engine.generate import Engine
from engine.probes import Step, to_numpy
from tests.engine.tiny import make_checkpoint

LAYER = [
    "attn_norm", "attn.q_proj", "attn.k_proj", "attn.q", "attn.k", "attn.v", "attn.context", "attn.output",
    "attn_residual", "mlp_norm", "moe.router_logits", "moe.experts", "moe.weights", "moe.gate", "moe.up", "moe.act",
    "moe.down", "moe.shared_gate", "moe.shared_up", "moe.shared_act", "moe.shared_down", "moe.output", "residual",
]  # fmt: skip
NAMES = ["embedding", *(f"layers.{i}.{name}" for i in (0, 1) for name in LAYER), "final_norm", "logits", "token"]


@pytest.fixture
def model(tmp_path: Path) -> Engine:
    return engine.load(make_checkpoint(tmp_path, 1), device="cpu")


def operations(*arrays: mx.array) -> Counter[str]:
    """How many of each operation the unevaluated graph of `arrays` has."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return Counter(re.findall(r'label ?= ?"([A-Za-z]+)"', text.getvalue()))


def test_names_and_their_order(model: Engine) -> None:
    seen: list[str] = []
    model.run([1, 2, 3], tap=lambda name, _: seen.append(name))
    assert seen == NAMES


def test_the_graph_is_the_same_with_and_without_probes(model: Engine) -> None:
    tokens = mx.array([[1, 2, 3, 4]])
    off = operations(model.model(tokens, model.caches()))
    step = Step()
    on = operations(model.model(tokens, model.caches(), step.note))
    assert off.total() > 200
    assert on == off
    assert len(step.arrays) == len(NAMES) - 1


def test_probes_add_views_alone(model: Engine) -> None:
    tokens = mx.array([[1, 2, 3, 4]])
    step = Step()
    logits = model.model(tokens, model.caches(), step.note)
    added = operations(logits, *step.arrays) - operations(logits)
    # All other nodes must be ones that the logits depend on, or a probe would show what nothing uses.
    assert set(added) <= {"Squeeze", "Transpose", "Unflatten", "Reshape"}


def test_off_nothing_is_copied_and_each_step_evaluates_once(model: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    evaluations: list[int] = []
    evaluate, copy = mx.eval, probes.to_numpy
    monkeypatch.setattr(mx, "eval", lambda *arrays: (evaluations.append(1), evaluate(*arrays)))
    monkeypatch.setattr(probes, "to_numpy", lambda x: (copies.append(1), copy(x))[1])
    model.run([1, 2, 3, 4, 5, 6], chunk=3, decode=2)
    assert len(evaluations) == 4
    assert not copies
    model.run([1, 2, 3, 4, 5, 6], chunk=3, decode=2, tap=lambda *_: None)
    assert len(evaluations) == 8
    assert len(copies) == 4 * len(NAMES)


def test_probes_are_what_the_next_operation_uses(model: Engine) -> None:
    """Bit for bit: each sum, selection and combination of probes gives the probe that follows from it."""
    seen: dict[str, Any] = {}
    model.run([5, 6, 7, 8], tap=lambda name, x: seen.update({name: x}))
    for i, entering in ((0, "embedding"), (1, "layers.0.residual")):
        p = f"layers.{i}."
        assert np.array_equal(seen[entering] + seen[p + "attn.output"], seen[p + "attn_residual"])
        assert np.array_equal(seen[p + "attn_residual"] + seen[p + "moe.output"], seen[p + "residual"])
        total = (seen[p + "moe.weights"][..., None] * seen[p + "moe.down"]).sum(1) + seen[p + "moe.shared_down"]
        assert np.abs(total - seen[p + "moe.output"]).max() < 1e-5
    assert np.array_equal(seen["logits"].argmax(-1), seen["token"])


def test_a_tap_does_not_change_the_answer(model: Engine) -> None:
    plain = model.generate([3, 1, 4], max_tokens=12)
    assert model.generate([3, 1, 4], max_tokens=12, tap=lambda *_: None) == plain


def test_no_step_leaves_work_to_the_next(model: Engine) -> None:
    """Caches are evaluated with the step that wrote them, or what they hang on would grow from step to step."""
    caches = model.caches()
    for step in ([1, 2, 3, 4, 5, 6, 7], [8], [9, 10], [11], [12], [13, 14, 15]):
        model._step(step, caches, None)
        arrays = [x for cache in caches for x in cache.state]
        left = operations(*arrays)
        # A state is a view of the buffers: one slice an array, and nothing behind it.
        assert left.total() == left["Slice"] <= len(arrays)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (mx.bfloat16, np.dtype(ml_dtypes.bfloat16)),
        (mx.float16, np.dtype(np.float16)),
        (mx.float32, np.dtype(np.float32)),
        (mx.int32, np.dtype(np.int32)),
    ],
)
def test_to_numpy_keeps_bits_and_shape(dtype: mx.Dtype, expected: np.dtype[Any]) -> None:
    values = np.arange(-6, 6).reshape(3, 4) * 3
    actual = to_numpy(mx.array(values).astype(dtype).T)
    assert actual.dtype == expected
    assert np.array_equal(actual.astype(np.int64), values.T)
