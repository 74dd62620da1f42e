"""The main job over the engine's own Metal kernels: honest ones pass, a fault in their text is named where it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from audits.cases import Case, cases_for
from audits.golden_jobs import diff, regenerate, verify
from audits.launched import kernel_lines
from audits.runs import load_engine
from audits.side_by_side import audit_case, audit_model
from engine.metal import table
from engine.metal.kernels import apple, host, ops
from engine.metal.library import compile
from goldens import workflow
from tests.engine.tiny import make_checkpoint

SIZE_256 = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 4}


def tiny(folder: Path, case: Case, **options: Any) -> Case:
    made = make_checkpoint(folder / "model", **SIZE_256, **options)
    return replace(case, model=str(made), kernels="host")


@pytest.fixture(scope="module")
def q4_k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("q4_k") / "model", gguf="Q4_K", **SIZE_256)


@pytest.mark.parametrize("kind", table.FORMATS)
@pytest.mark.parametrize("dtype", table.RHS)
def test_honest_kernels_pass(tiny_case: Case, tmp_path: Path, kind: str, dtype: str) -> None:
    (judged,) = audit_model([tiny(tmp_path, replace(tiny_case, dtype=dtype), gguf=kind)])
    assert judged.verdict.outcome == "pass", judged.verdict.message
    names = judged.actual.provenance["kernels"]["layers.1.moe.down"]
    assert names[:2] == ["kernel_mul_mm_id_map", table.plan_mul_mm_id(kind, dtype, 7, 256, 4).kernel]


@pytest.mark.parametrize("scoring", ["softmax", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize("norm", [True, False])
def test_every_router_passes(tiny_case: Case, tmp_path: Path, scoring: str, norm: bool) -> None:
    case = tiny(tmp_path, tiny_case, gguf="Q8_0", scoring_func=scoring, norm_topk_prob=norm, swiglu_limit=None)
    (judged,) = audit_model([case])
    assert judged.verdict.outcome == "pass", judged.verdict.message


@pytest.mark.parametrize("experts", ["q8_0"])
def test_the_shipped_model_passes(experts: str) -> None:
    (judged,) = audit_model(cases_for("shipped", prompts=["^A00482+99915="], experts=experts, kernels="host"))
    assert judged.verdict.outcome == "pass", judged.verdict.message
    assert judged.comparison.logits is not None
    assert judged.comparison.logits.top1 == 1
    assert kernel_lines([judged.actual.provenance["kernels"]]) == [
        "kernels of the run: final_norm kernel_rms_norm_f32",
        "kernels of layers 0, 1, 2, 3: attn_norm, mlp_norm kernel_rms_norm_f32; q, k kernel_rope_f32;"
        " context kernel_attention_f32; experts kernel_router; gate, up, down kernel_mul_mm_id_map +"
        " kernel_mul_mm_id_q8_0_f32_n32 + kernel_mul_mv_id_q8_0_f32; act kernel_swiglu_f32",
    ]
    assert judged.actual.provenance["model"] == "shipped+q8_0"


@pytest.mark.parametrize(
    ("source", "text", "fault", "place"),
    [
        # One element of a row in eight is its neighbour's.
        ("rows.metal", "factor * float(weight[i])", "factor * float(weight[i & ~1])", "attn_norm"),
        ("elementwise.metal", "out[head + j] = X(a * c - b * s);", "out[head + j] = X(a * c + b * s);", "attn.q"),
        ("attention.metal", "args.has_sinks ? precise::exp(sinks[head] - bound) : 0.0f", "0.0f", "attn.context"),
        ("moe.metal", "to[i] = half(x_rows[band][k + i]);", "to[i] = half(x_rows[band][k + (i & 6)]);", "moe.gate"),
        ("moe.metal", "sum += values[i] * float(vector[k + i]);", "sum += values[i] * float(vector[k]);", "moe.gate"),
        ("moe.metal", "least = block->scales[j + 4] & 63;", "least = block->scales[j + 4] & 31;", "moe.gate"),
        ("router.metal", "args.has_bias ? scores[e] + bias[e] : scores[e]", "scores[e]", "moe.experts"),
        ("router.metal", "args.factor / divisor", "args.factor", "moe.weights"),
        ("elementwise.metal", "(g < 0.0f ? e : 1.0f) / (1.0f + e)", "1.0f / (1.0f + e)", "moe.act"),
    ],
)
def test_a_fault_in_a_kernels_text_is_named(
    tiny_case: Case, q4_k: Path, monkeypatch: pytest.MonkeyPatch, source: str, text: str, fault: str, place: str
) -> None:
    honest = apple.source_text(table.KERNELS / source)
    assert honest.count(text) == 1
    faulty = compile(honest.replace(text, fault))
    original = host.library
    monkeypatch.setattr(host, "library", lambda name, checked: faulty if name == source else original(name, checked))
    (judged,) = audit_model([replace(tiny_case, model=str(q4_k), kernels="host")])
    assert judged.comparison.first_failure is not None
    assert judged.comparison.first_failure.probe == f"layers.0.{place}", judged.verdict.message
    assert "--kernels host" in judged.verdict.evidence["replay"]


def test_one_wrong_row_of_the_decode_kernel_is_named(
    tiny_case: Case, q4_k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ops.mul_mv_id

    def one_row(x: Any, blocks: Any, ids: Any, kind: str, *, run: ops.Run) -> Any:
        result = original(x, blocks, ids, kind, run=run)
        result[0, 2, 9] *= 1.1
        return result

    monkeypatch.setattr(ops, "mul_mv_id", one_row)
    (judged,) = audit_model([replace(tiny_case, model=str(q4_k), kernels="host")])
    failure = judged.comparison.first_failure
    assert failure is not None
    assert failure.own is not None
    assert failure.own.metrics is not None
    first_decoded = len(tiny_case.tokens) - tiny_case.decode
    assert failure.probe == "layers.0.moe.gate"
    assert failure.own.metrics.worst.index[0] >= first_decoded
    assert failure.own.metrics.worst.index[1:] == (2, 9)


def test_the_vector_kernel_has_other_weights_than_a_float16_run(
    tiny_case: Case, q4_k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why engine/kernel_modules/moe.py doesn't decode with it there: its weights are not rounded, and that shows."""
    original = ops.mul_mm_id

    def by_vector(x: Any, blocks: Any, ids: Any, kind: str, *, run: ops.Run) -> Any:
        return (ops.mul_mv_id if len(ids) == 1 else original)(x, blocks, ids, kind, run=run)

    monkeypatch.setattr(ops, "mul_mm_id", by_vector)
    (judged,) = audit_model([replace(tiny_case, model=str(q4_k), kernels="host", dtype="float16")])
    assert judged.comparison.first_failure is not None
    assert judged.comparison.first_failure.probe == "layers.0.moe.gate"


def test_a_changed_bit_of_a_held_block_is_named(tiny_case: Case, q4_k: Path) -> None:
    case = replace(tiny_case, model=str(q4_k), kernels="host")
    loaded = load_engine(case)
    name = "model.layers.1.mlp.experts.down_proj.weight"
    loaded.blocks[name].data[3, 200, 100] ^= 4
    message = audit_case(loaded, case).verdict.message
    assert message.startswith(f"weights: {name}[3,200,"), message
    assert "1 of 262144 elements differ" in message


def test_a_golden_of_it_is_run_through_the_same_kernels_again(tiny_case: Case, q4_k: Path, tmp_path: Path) -> None:
    path = tmp_path / "g.h5"
    regenerate(path, [replace(tiny_case, model=str(q4_k), kernels="host")])
    (judged,) = diff(path)
    assert judged.verdict.outcome == "pass", judged.verdict.message
    workflow.accept(path)
    (judged,) = verify(path)
    assert judged.verdict.outcome == "pass", judged.verdict.message
    assert judged.actual.provenance["kernels"] == judged.expected.provenance["kernels"] != {}
    assert kernel_lines([judged.actual.provenance["kernels"]]) == kernel_lines([judged.expected.provenance["kernels"]])
    assert judged.comparison.logits is not None
    assert judged.comparison.logits.max_abs == 0


def test_layers_that_differ_have_lines_of_their_own() -> None:
    runs = [
        {"layers.0.moe.gate": ["a"], "layers.0.moe.up": ["a"], "layers.10.moe.gate": ["b"], "layers.2.moe.gate": ["b"]},
        {"layers.0.moe.gate": ["c", "a"], "final_norm": ["n"]},
    ]
    assert kernel_lines(runs) == [
        "kernels of the run: final_norm n",
        "kernels of layer 0: gate a + c; up a",
        "kernels of layers 2, 10: gate b",
    ]
    assert kernel_lines([{}, {}]) == []


def test_an_engine_that_says_nonsense_of_its_kernels_is_refused(tiny_case: Case) -> None:
    loaded = load_engine(tiny_case)
    told = {**loaded.provenance, "kernels": {"layers.0.moe.gate": "kernel"}}

    class Claims:
        provenance = told

        def run(self, tokens: Any, *, tap: Any, chunk: Any, decode: Any) -> None:
            loaded.run(tokens, tap=tap, chunk=chunk, decode=decode)

    with pytest.raises(ValueError, match='"kernels" are a dict'):
        audit_case(Claims(), tiny_case)


def test_ids_and_weights_leave_the_router_as_the_probes_have_them(tiny_case: Case, q4_k: Path) -> None:
    """Slots by descending score, equal scores by ascending id: all logits of a row of zeros are equal."""
    loaded = load_engine(replace(tiny_case, model=str(q4_k), kernels="host"))
    moe = loaded.model.model.layers[0].mlp
    moe.gate.e_score_correction_bias = mx.zeros((4,))
    ids, weights = moe.choose(mx.zeros((1, 2, 4)))
    assert np.array_equal(np.array(ids), [[[0, 1, 2]] * 2])
    assert np.allclose(np.array(weights), 1.5 / 3)
