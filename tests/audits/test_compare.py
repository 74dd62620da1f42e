"""Comparing Traces: what never passes, which side is blamed, and what is measured without a model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import assay
from audits.cases import Case
from audits.compare import compare
from audits.runs import load_reference, run
from goldens.trace import Trace
from reference.model import Reference

Edit = Callable[[dict[str, np.ndarray]], None]


@pytest.fixture(scope="module")
def traces(tiny_case: Case) -> tuple[Trace, Trace]:
    return run("mlx", tiny_case), run("reference", tiny_case)


@pytest.fixture(scope="module")
def model(tiny_case: Case) -> Reference:
    return load_reference(tiny_case.model, "float32")


def edited(trace: Trace, edit: Edit) -> Trace:
    probes = {name: array.copy() for name, array in trace.probes.items()}
    edit(probes)
    return replace(trace, probes=probes)


def poke(name: str, index: tuple[int, ...], value: float) -> Edit:
    def edit(probes: dict[str, np.ndarray]) -> None:
        probes[name][index] = value

    return edit


def test_the_same_run_twice_is_bit_equal(tiny_case: Case, traces: tuple[Trace, Trace]) -> None:
    again = run("mlx", tiny_case)
    assert all(np.array_equal(again.probes[name], array) for name, array in traces[0].probes.items())


def test_probes_do_not_depend_on_how_the_tokens_were_fed(tiny_case: Case, traces: tuple[Trace, Trace]) -> None:
    whole = run("mlx", replace(tiny_case, chunk=64, decode=0))
    assert whole.probes.keys() == traces[0].probes.keys()
    assert all(whole.probes[name].shape == array.shape for name, array in traces[0].probes.items())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("probe", ["layers.0.attn.v", "layers.1.moe.down", "logits"])
def test_a_non_finite_value_fails_at_its_place(
    traces: tuple[Trace, Trace], model: Reference, value: float, probe: str
) -> None:
    index = (3,) + (1,) * (traces[0].probes[probe].ndim - 1)
    found = compare(edited(traces[0], poke(probe, index, value)), traces[1], model)
    assert found.first_failure is not None
    assert found.first_failure.probe == probe
    assert f"{probe}[{','.join(map(str, index))}]" in found.first_failure.message


def test_one_wrong_value_among_thousands_fails_and_only_its_readers_may_follow(
    traces: tuple[Trace, Trace], model: Reference
) -> None:
    wrong = edited(traces[0], poke("layers.0.attn.k", (7, 1, 2), 3.0))
    failed = {p.probe for p in compare(wrong, traces[1], model).probes if p.outcome == "fail"}
    assert failed == {"layers.0.attn.k", "layers.0.attn.context"}


def test_a_missing_probe_fails_and_what_reads_it_is_skipped_with_the_reason(
    traces: tuple[Trace, Trace], model: Reference
) -> None:
    found = compare(edited(traces[0], lambda probes: probes.pop("layers.0.moe.act")), traces[1], model)
    by_name = {p.probe: p for p in found.probes}
    assert by_name["layers.0.moe.act"].outcome == "fail"
    assert by_name["layers.0.moe.down"].outcome == "skipped"
    assert "layers.0.moe.act is missing" in by_name["layers.0.moe.down"].message


def test_an_extra_probe_fails(traces: tuple[Trace, Trace], model: Reference) -> None:
    extra = edited(traces[0], lambda probes: probes.update({"layers.9.attn.q": np.zeros((20, 1))}))
    failure = compare(extra, traces[1], model).first_failure
    assert failure is not None
    assert failure.probe == "layers.9.attn.q"


def test_a_mis_shaped_probe_fails(traces: tuple[Trace, Trace], model: Reference) -> None:
    def drop_a_token(probes: dict[str, np.ndarray]) -> None:
        probes["final_norm"] = probes["final_norm"][:-1]

    failure = compare(edited(traces[0], drop_a_token), traces[1], model).first_failure
    assert failure is not None
    assert failure.probe == "final_norm"
    assert "shape" in failure.message


def test_expert_ids_out_of_range_fail_and_do_not_crash(traces: tuple[Trace, Trace], model: Reference) -> None:
    found = compare(edited(traces[0], poke("layers.0.moe.experts", (2, 0), 99)), traces[1], model)
    assert found.first_failure is not None
    assert found.first_failure.probe == "layers.0.moe.experts"


def test_a_wrong_value_in_the_expected_trace_is_blamed_on_it(traces: tuple[Trace, Trace], model: Reference) -> None:
    found = compare(traces[0], edited(traces[1], poke("layers.1.attn.q", (0, 0, 0), 9.0)), model)
    assert found.first_failure is not None
    assert found.first_failure.message.startswith("expected trace: layers.1.attn.q[0,0,0]")


def test_a_wrong_token_fails(traces: tuple[Trace, Trace], model: Reference) -> None:
    found = compare(edited(traces[0], poke("token", (4,), 1)), traces[1], model)
    assert found.first_failure is not None
    assert found.first_failure.message.startswith("token[4]: chose 1")


def test_different_tokens_are_refused(traces: tuple[Trace, Trace], model: Reference) -> None:
    with pytest.raises(ValueError, match="other tokens"):
        compare(replace(traces[0], tokens=traces[0].tokens + 1), traces[1], model)


def test_inherited_error_is_measured_apart_from_own(traces: tuple[Trace, Trace], model: Reference) -> None:
    found = {p.probe: p for p in compare(*traces, model).probes}
    logits = found["logits"]
    assert logits.own is not None
    assert logits.own.metrics is not None
    assert logits.drift is not None
    assert logits.inherited is not None
    assert logits.own.metrics.max_abs < logits.inherited <= logits.drift.max_abs + logits.own.metrics.max_abs + 1e-5


def test_the_public_compare_finds_the_model_by_provenance(traces: tuple[Trace, Trace]) -> None:
    assert assay.compare(*traces).ok
    wrong = edited(traces[0], poke("layers.0.attn.q", (0, 0, 0), 9.0))
    failure = assay.bisect(wrong, traces[1])
    assert failure is not None
    assert failure.probe == "layers.0.attn.q"


def test_the_public_compare_refuses_another_model(traces: tuple[Trace, Trace], tmp_path: Path) -> None:
    from tests.engine.tiny import make_checkpoint

    other = make_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"tensor model\.embed_tokens\.weight changed"):
        assay.compare(*traces, model=other)


def plain(**probes: np.ndarray) -> Trace:
    return Trace(case="x", tokens=np.arange(2, dtype=np.int32), probes=probes)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ({"a": np.ones((2, 3))}, {"a": np.ones((2, 3)) + 1e-3}),
        ({"a": np.full((2, 3), np.nan)}, {"a": np.full((2, 3), np.nan)}),
        ({"a": np.ones((2, 3))}, {"a": np.ones((2, 4))}),
        ({"a": np.ones((2, 3))}, {}),
        ({}, {"a": np.ones((2, 3))}),
        ({"a": np.ones((2, 0))}, {"a": np.ones((2, 0))}),
        ({"a": np.array([1, 2])}, {"a": np.array([1, 3])}),
    ],
)
def test_without_a_model_differences_fail(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    found = assay.compare(plain(**actual), plain(**expected))
    assert not found.ok
    assert found.first_failure is not None


def test_without_a_model_equal_traces_pass_and_say_how_they_were_judged() -> None:
    found = assay.compare(plain(a=np.ones((2, 3))), plain(a=np.ones((2, 3))))
    assert found.ok
    assert "tolerance" in found.judged_by


def test_two_empty_traces_are_not_a_pass() -> None:
    assert assay.compare(plain(), plain()).outcome == "could-not-judge"


def test_experts_in_another_slot_order_are_neither_wrong_nor_drift(
    traces: tuple[Trace, Trace], model: Reference
) -> None:
    def swap_slots(probes: dict[str, np.ndarray]) -> None:
        for name in probes:
            if traces[0].dims(name)[:2] == ("T", "K"):
                probes[name] = probes[name][:, ::-1].copy()

    found = compare(edited(traces[0], swap_slots), traces[1], model)
    assert found.ok, found.message
    gate = next(p for p in found.probes if p.probe == "layers.0.moe.gate")
    assert gate.drift is not None
    assert gate.drift.rel_l2 < 1e-5
