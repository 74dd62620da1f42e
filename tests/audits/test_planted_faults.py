"""The main job can fail: each fault is planted in the real engine, and must be named at the place where it is made."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import engine.attention
import engine.caches
import engine.moe
import engine.router
from audits.cases import Case
from audits.compare import Comparison
from audits.runs import load_engine
from audits.side_by_side import audit_case
from engine.generate import Engine

DTYPES = ("float32", "float16", "bfloat16")
Fault = Callable[[pytest.MonkeyPatch], None]


def judged(case: Case, dtype: str, edit: Callable[[Engine], None] = lambda _: None) -> Comparison:
    case = replace(case, dtype=dtype)
    loaded = load_engine(case)
    edit(loaded)
    return audit_case(loaded, case).comparison


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_honest_engine_passes(tiny_case: Case, dtype: str) -> None:
    found = judged(tiny_case, dtype)
    assert found.ok, found.message
    assert all(probe.outcome == "pass" for probe in found.probes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("module", "index", "name"),
    [
        (lambda m: m.model.layers[1].self_attn.q_proj, (3, 5), "model.layers.1.self_attn.q_proj.weight[3,5]"),
        (lambda m: m.model.layers[0].mlp.experts.down_proj, (2, 4, 6), "layers.0.mlp.experts.down_proj.weight[2,4,6]"),
        (lambda m: m.model.embed_tokens, (7, 1), "model.embed_tokens.weight[7,1]"),
        (lambda m: m.model.norm, (9,), "model.norm.weight[9]"),
        (lambda m: m.model.layers[0].mlp.gate, (1, 2), "model.layers.0.mlp.gate.weight[1,2]"),
    ],
)
def test_one_weight_off_by_one_percent(
    tiny_case: Case, dtype: str, module: Any, index: tuple[int, ...], name: str
) -> None:
    def edit(loaded: Engine) -> None:
        owner = module(loaded.model)
        weight = np.array(owner.weight.astype(mx.float32))
        weight[index] *= 1.01
        owner.weight = mx.array(weight).astype(owner.weight.dtype)

    found = judged(tiny_case, dtype, edit)
    assert found.first_failure is not None
    assert name in found.first_failure.message


def wider_window(patch: pytest.MonkeyPatch) -> None:
    original = engine.caches.RotatingKVCache.__init__
    patch.setattr(engine.caches.RotatingKVCache, "__init__", lambda self, window: original(self, window + 1))


def no_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine.caches.KVCache, "make_mask", lambda self, N: None)


def shifted_mask(patch: pytest.MonkeyPatch) -> None:
    def mask(self: Any, L: int) -> mx.array:
        rows, columns = mx.arange(self.offset, self.offset + L)[:, None], mx.arange(self.offset + L)[None]
        return columns <= rows - (rows > 3)

    patch.setattr(engine.caches.KVCache, "make_mask", mask)


def attention_with(**changes: Any) -> Fault:
    """SDPA called with other arguments than the model means."""
    original = mx.fast.scaled_dot_product_attention

    def plant(patch: pytest.MonkeyPatch) -> None:
        def changed(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any, sinks: Any) -> mx.array:
            told = {"scale": scale, "mask": mask, "sinks": sinks} | changes
            return original(q, k, v, **told)

        patch.setattr(engine.attention.mx.fast, "scaled_dot_product_attention", changed)

    return plant


def stale_rope(patch: pytest.MonkeyPatch) -> None:
    original = engine.attention.Attention.rope

    def rope(self: engine.attention.Attention, x: mx.array, offset: int, probe: str) -> mx.array:
        return original(self, x, min(offset, 14), probe)

    patch.setattr(engine.attention.Attention, "rope", rope)


def one_routing_decision(patch: pytest.MonkeyPatch) -> None:
    original = engine.router.top_k

    def top_k(scores: mx.array, k: int) -> mx.array:
        ids = np.array(original(scores, k))
        if ids.shape[-2] == 7:
            rest = [e for e in range(scores.shape[-1]) if e not in ids[0, 4]]
            ids[0, 4, 1] = rest[0]
        return mx.array(ids)

    patch.setattr(engine.router, "top_k", top_k)


def biased_weights(patch: pytest.MonkeyPatch) -> None:
    original = engine.moe.route

    def route(logits: mx.array, bias: mx.array, config: Any) -> tuple[mx.array, mx.array]:
        ids, _ = original(logits, bias, config)
        chosen = mx.take_along_axis(engine.router.sqrtsoftplus(logits) + bias, ids, axis=-1)
        return ids, chosen / chosen.sum(-1, keepdims=True) * config.routed_scaling_factor

    patch.setattr(engine.moe, "route", route)


def matrix_unit_on_the_gate(patch: pytest.MonkeyPatch) -> None:
    original = engine.moe.Experts.__call__

    def call(self: Any, x: mx.array, ids: mx.array, probe: Any = None) -> mx.array:
        class Rounded:
            def __call__(self, x: mx.array, ids: mx.array, **options: Any) -> mx.array:
                return project(x.astype(mx.float16).astype(x.dtype), ids, **options)

        project = self.gate_proj
        self.gate_proj = Rounded()
        try:
            return original(self, x, ids, probe)
        finally:
            self.gate_proj = project

    patch.setattr(engine.moe.Experts, "__call__", call)


def no_clamp(patch: pytest.MonkeyPatch) -> None:
    original = engine.moe.swiglu
    patch.setattr(engine.moe, "swiglu", lambda gate, up, limit: original(gate, up, None))


def no_shared_expert(patch: pytest.MonkeyPatch) -> None:
    original = engine.moe.combine
    patch.setattr(engine.moe, "combine", lambda down, weights, shared: original(down, weights, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("fault", "place"),
    [
        (wider_window, "layers.0.attn.context"),
        (no_mask, "layers.1.attn.context"),
        (shifted_mask, "layers.1.attn.context"),
        (attention_with(sinks=None), "layers.0.attn.context"),
        (attention_with(scale=8**-0.5 * 1.1), "layers.0.attn.context"),
        (stale_rope, "layers.0.attn.q"),
        (one_routing_decision, "layers.0.moe.experts"),
        (biased_weights, "layers.0.moe.weights"),
        (no_clamp, "layers.0.moe.shared_act"),
        (no_shared_expert, "layers.0.moe.output"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_op_is_named(
    tiny_case: Case, dtype: str, fault: Fault, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    found = judged(tiny_case, dtype)
    assert found.first_failure is not None
    assert found.first_failure.probe == place, found.first_failure.message


def test_rounded_operands_on_the_gate_alone_are_named(tiny_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix_unit_on_the_gate(monkeypatch)
    found = judged(tiny_case, "float32")
    failed = {probe.probe for probe in found.probes if probe.outcome == "fail"}
    assert failed == {"layers.0.moe.gate", "layers.1.moe.gate"}


def test_a_changed_routing_decision_names_token_slot_and_experts(
    tiny_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_routing_decision(monkeypatch)
    found = judged(tiny_case, "float32")
    own = next(probe.own for probe in found.probes if probe.probe == "layers.0.moe.experts")
    assert own is not None
    assert {(wrong.token, wrong.slot) for wrong in own.wrong} == {(4, 1), (11, 1)}, "row 4 of each chunk of 7"
