"""Anybody's engine through the public API: what it may tap, what it must say, and what it can't talk its way out of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
import torch

import assay
from audits.cases import Case
from audits.runs import load_engine, load_reference, run
from goldens.arrays import as_numpy
from goldens.trace import Recorder
from tests.engine.tiny import make_checkpoint

Convert = Callable[[np.ndarray], Any]


class Wrapped:
    """The MLX engine behind a tap that changes what passes, and another provenance."""

    def __init__(self, case: Case, convert: Callable[[str, np.ndarray], Any], **provenance: Any) -> None:
        self._engine = load_engine(case)
        self._convert = convert
        self.provenance: Mapping[str, Any] = {**self._engine.provenance, **provenance}

    def run(self, tokens: Sequence[int], *, tap: Any, chunk: int | None, decode: int) -> None:
        self._engine.run(tokens, tap=lambda n, a: tap(n, self._convert(n, a)), chunk=chunk, decode=decode)


def outcome(case: Case, engine: Any) -> Any:
    return assay.compare(run(engine, case), run("reference", case))


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.tolist(),
        lambda a: a.astype(np.float64) if a.dtype.kind == "f" else a,
        lambda a: torch.from_numpy(a.copy()),
        lambda a: torch.from_numpy(a.copy()).requires_grad_() if a.dtype.kind == "f" else torch.from_numpy(a.copy()),
        lambda a: mx.array(a),
        lambda a: np.asfortranarray(a),
    ],
    ids=["list", "float64", "torch", "requires_grad", "mlx", "fortran"],
)
def test_any_kind_of_array_may_be_tapped(tiny_case: Case, convert: Convert) -> None:
    found = outcome(tiny_case, Wrapped(tiny_case, lambda _, a: convert(a)))
    assert found.ok, found.message


def test_bfloat16_arrives_whole_from_every_framework() -> None:
    values = np.array([[1.0, -2.5, 3.140625]]).astype(ml_dtypes.bfloat16)
    bits = values.view(np.uint16)
    for given in (
        values,
        torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16),
        mx.array(bits).view(mx.bfloat16),
    ):
        array = as_numpy("x", given)
        assert array.dtype == ml_dtypes.bfloat16
        assert np.array_equal(array.view(np.uint16), bits)


def test_a_reused_buffer_is_copied() -> None:
    recorder, buffer = Recorder(), np.zeros((1, 2), np.float32)
    for step in range(3):
        buffer[:] = step
        recorder("x", buffer)
    assert recorder.trace(case="c", tokens=[1, 2, 3]).probes["x"].tolist() == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize(
    "value", [3.0, None, "abc", np.ones((2, 2), np.complex64), np.array([object()]), [[1], [1, 2]]]
)
def test_what_is_no_array_of_real_numbers_is_refused_with_the_probe(value: Any) -> None:
    with pytest.raises(ValueError, match="probe some\\.name"):
        Recorder()("some.name", value)


def test_steps_that_do_not_fit_are_refused_with_the_probe() -> None:
    recorder = Recorder()
    recorder("some.name", np.ones((2, 3)))
    recorder("some.name", np.ones((1, 4)))
    with pytest.raises(ValueError, match=r"probe some\.name: steps of shapes \(2, 3\), \(1, 4\)"):
        recorder.trace(case="c", tokens=[1, 2, 3])


@pytest.mark.parametrize("name", ["layers.0.moe.experts", "token"])
def test_ids_as_floats_fail_at_their_probe(tiny_case: Case, name: str) -> None:
    found = outcome(tiny_case, Wrapped(tiny_case, lambda n, a: a.astype(np.float32) if n == name else a))
    assert found.first_failure is not None
    assert found.first_failure.probe == name
    assert "integers" in found.first_failure.message


@pytest.mark.parametrize(
    ("provenance", "told"),
    [
        ({"dtype": None}, "dtype"),
        ({"dtype": "float8"}, "float8"),
        ({"arithmetic": "float32"}, "arithmetic"),
        ({"arithmetic": {"linearr": {}}}, "linearr"),
        ({"arithmetic": {"linear": {"accumulator": "float32"}}}, "accumulator"),
        ({"arithmetic": {"linear": {"accumulate": "float31"}}}, "float31"),
    ],
)
def test_what_an_engine_says_of_itself_is_checked(tiny_case: Case, provenance: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        run(Wrapped(tiny_case, lambda _, a: a, **provenance), tiny_case)


def test_an_engine_cannot_overwrite_where_a_trace_comes_from(tiny_case: Case) -> None:
    lying = Wrapped(tiny_case, lambda _, a: a, model="other", model_hash="0", seed=9, date="then")
    told = run(lying, tiny_case).provenance
    assert (told["model"], told["seed"]) == (tiny_case.model, tiny_case.seed)
    assert told["model_hash"] == run("mlx", tiny_case).provenance["model_hash"]


@pytest.mark.parametrize("engine", [object(), "metal", None, 3])
def test_what_is_no_engine_is_refused(tiny_case: Case, engine: Any) -> None:
    with pytest.raises(ValueError, match="run"):
        run(engine, tiny_case)


def test_an_engine_whose_run_takes_other_arguments_is_refused(tiny_case: Case) -> None:
    class Narrow:
        provenance: Mapping[str, Any] = {"dtype": "float32"}  # a test's constant

        def run(self, tokens: Sequence[int], tap: Any) -> None: ...

    with pytest.raises(ValueError, match="tap="):
        run(Narrow(), tiny_case)


@pytest.mark.parametrize(
    "case",
    [
        "abc",
        {},
        {"tokens": "139"},
        {"tokens": [1.9, 2.0]},
        {"tokens": [True]},
        {"tokens": []},
        {"tokens": [1], "options": None},
        {"tokens": [1], "options": {"chunk": 0}},
        {"tokens": [1], "options": {"decode": -1}},
        {"tokens": [1], "options": {"decode": 2}},
        {"tokens": [1], "options": {"dtyp": "float32"}},
        {"tokens": [1], "prompt": "x"},
    ],
    ids=str,
)
def test_a_case_that_makes_no_sense_is_refused(case: Any) -> None:
    with pytest.raises(ValueError, match=r"case|tokens|chunk|decode"):
        run("reference", case)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_can_be_stated(tiny_case: Case, dtype: str) -> None:
    """Weights rounded to half, computed with in float32: the reference does just that."""

    class Mixed:
        provenance: Mapping[str, Any] = {"dtype": "float32", "weights_dtype": dtype}  # as above

        def run(self, tokens: Sequence[int], *, tap: Any, chunk: int | None, decode: int) -> None:
            load_reference(tiny_case.model, dtype).run(tokens, tap)

    found = outcome(replace(tiny_case, dtype=dtype), Mixed())
    assert found.ok, found.message


@pytest.mark.parametrize("garbage", [1.0, 1.5, 0.0])
def test_weak_claims_buy_no_pass(tmp_path: Path, garbage: float) -> None:
    """256 terms in a bfloat16 accumulator are bounded by nothing: that is said, and is no pass."""
    folder = make_checkpoint(tmp_path / "m", hidden_size=256, head_dim=64, moe_intermediate_size=64)
    case = Case(name="x", tokens=(1, 2, 3, 4), model=str(folder), dtype="bfloat16", device="cpu")
    weak = {**load_engine(case).provenance["arithmetic"], "logits": {"accumulate": "bfloat16"}}
    wrong = Wrapped(case, lambda n, a: (a * garbage).astype(a.dtype) if n == "logits" else a, arithmetic=weak)
    found = outcome(case, wrong)
    assert found.outcome != "pass"
    logits = next(p for p in found.probes if p.probe == "logits")
    assert logits.outcome == "could-not-judge"
    assert "wider than the values" in logits.message


def test_a_model_that_changes_under_the_same_name_is_read_again(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    case = Case(name="x", tokens=(1, 2, 3), model=str(folder), device="cpu")
    first = run("mlx", case).provenance["model_hash"]
    make_checkpoint(folder, seed=1)
    found = outcome(case, "mlx")
    assert found.ok, found.message
    assert run("mlx", case).provenance["model_hash"] != first
