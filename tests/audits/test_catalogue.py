"""`assay.audit`, `assay.replay` and `assay.contracts`: picking candidates, refusing bad input, one report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import assay
from audits import catalogue, listing

Array = Any


def softmax(x: Array) -> Array:
    y = np.exp((x - x.max(-1, keepdims=True)).astype(np.float32))
    return (y / y.sum(-1, keepdims=True)).astype(x.dtype)


def matmul(a: Array, b: Array) -> Array:
    return (a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype)


def wrong(x: Array) -> Array:
    """Wrong from the 40th key on."""
    out = softmax(x)
    out[..., 40:] = 0
    return out


HONEST = """
import numpy as np
def softmax(x):
    y = np.exp((x - x.max(-1, keepdims=True)).astype(np.float32))
    return (y / y.sum(-1, keepdims=True)).astype(x.dtype)
"""
WRONG = HONEST.replace("    return (", "    y[..., 40:] = 0\n    return (")


def test_every_contract_says_what_it_is() -> None:
    found = assay.contracts()
    assert set(found) == set(catalogue.names())
    assert {"softmax", "sdpa", "kv_cache", "decoder", "sampler"} <= set(found)
    for name, one in found.items():
        assert one.name == name
        assert one.signature.startswith(f"{name}(")
        assert one.arguments or name == "kv_cache"
        assert all(a.name and isinstance(a.optional, bool) for a in one.arguments)
        assert one.relations
        assert len(one.doc) > 20


def test_the_list_has_a_line_for_every_contract() -> None:
    rows = dict(dict(listing.sections())["contracts"])
    assert set(rows) == set(catalogue.names())
    for name, text in rows.items():
        assert text.startswith(assay.contracts()[name].signature + ": ")
        assert "\n" not in text


def test_candidates_by_contract() -> None:
    report = assay.audit(["softmax", "matmul"], candidate={"softmax": softmax, "matmul": matmul}, dtypes="float32")
    assert report.ok
    assert {verdict.audit for verdict in report.verdicts} == {"softmax", "matmul"}
    assert {verdict.case["dtype"] for verdict in report.verdicts} == {"float32"}
    assert report.verdicts[0].case["candidate"].endswith(":softmax")


def test_the_same_call_gives_equal_reports() -> None:
    first, second = (assay.audit("softmax", wrong, seed=5, dtypes=["float16"]) for _ in range(2))
    assert first == second
    assert first.exit_code == 1
    assert all("digest" in verdict.evidence for verdict in first.verdicts)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"names": "softmaxx"}, "no contract 'softmaxx'; there is attention_mask, "),
        ({"names": []}, "name the contract that the candidate is judged by"),
        ({"names": ["softmax", "matmul"], "candidate": {"softmax": softmax}}, "candidate has nothing for 'matmul'"),
        ({"candidate": {"softmax": softmax, "matmull": matmul}}, "no contract 'matmull'"),
        ({"framework": "jax"}, "no framework 'jax'; there is numpy, mlx, torch"),
        ({"dtypes": ["float8"]}, "no dtype 'float8'; there is float32, float16, bfloat16"),
        ({"claims": {"accumulator": "float32"}}, "no claim 'accumulator'; the claims are operand, accumulate, "),
        ({"claims": {"accumulate": "float8"}}, "accumulate='float8' is no dtype; use one of float64, float32, "),
        ({"claims": {"accumulate": 3}}, "claims are names of dtypes by name"),
        ({"claims": "accumulate=float32"}, "claims are names of dtypes by name"),
        ({"candidate": "nowhere.py:softmax"}, "there is no file nowhere.py"),
        ({"candidate": "softmax"}, "FILE.py:NAME is expected"),
        ({"candidate": "kernels.toml"}, "describes Metal kernels, which moe_matmul judges; softmax takes Python"),
        ({"candidate": 3}, "which can't be called"),
        ({"candidate": lambda: 0}, "takes 0 arguments by position; the contract passes x"),
        ({"candidate": None, "framework": "numpy"}, "the engine's own softmax is in mlx"),
        ({"framework": "torch", "device": "tpu"}, "torch can't use the device 'tpu'"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as error:
        assay.audit(**{"names": "softmax", "candidate": softmax, **arguments})
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_input_shows_before_anything_runs() -> None:
    ran: list[str] = []
    with pytest.raises(ValueError, match="can't be called"):
        catalogue.audit(["softmax", "matmul"], {"softmax": softmax, "matmul": 3}, advance=ran.append)
    assert not ran


def test_a_failing_verdict_replays_to_the_same(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(WRONG, encoding="utf-8")
    place = f"{path}:softmax"
    report = assay.audit("softmax", place, dtypes=["float32"])
    failed = next(verdict for verdict in report.verdicts if verdict.evidence.get("shrunk"))
    case = json.loads(json.dumps(dict(failed.case)))
    (again,) = assay.replay(case).verdicts
    assert (again.message, again.evidence["digest"]) == (failed.message, failed.evidence["digest"])
    assert again.case == failed.case
    (stored,) = assay.replay({"case": case, "message": "what a file of assay-failures/ holds"}).verdicts
    assert stored.message == failed.message
    path.write_text(HONEST, encoding="utf-8")
    assert assay.replay(case).ok, "mended since"


def test_a_function_of_a_program_is_passed_again() -> None:
    failed = next(v for v in assay.audit("softmax", wrong, dtypes=["float32"]).verdicts if v.outcome == "fail")
    with pytest.raises(ValueError, match="was a function of another program: pass it again as candidate"):
        assay.replay(failed.case)
    assert assay.replay(failed.case, wrong).verdicts[0].message == failed.message
    assert assay.replay(failed.case, {"softmax": wrong}).exit_code == 1
    assert assay.replay(failed.case, softmax).ok


def test_claims_are_part_of_the_case() -> None:
    claims = {"accumulate": "float16"}
    report = assay.audit("softmax", wrong, claims=claims, dtypes=["float16"])
    failed = next(verdict for verdict in report.verdicts if verdict.outcome == "fail")
    assert failed.case["claims"] == claims
    assert assay.replay(failed.case, wrong).verdicts[0].message == failed.message


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ([], 'has a "contract"'),
        ("softmax", 'has a "contract"'),
        (None, 'has a "contract"'),
        ({}, "this one has None"),
        ({"contract": "softmaxx"}, "this one has 'softmaxx'"),
        ({"contract": ["softmax"]}, "this one has ['softmax']"),
        ({"case": 3}, "this one has None"),
        ({"case": {"contract": "softmax", "S": "x"}}, "S can't be 'x'"),
        ({"contract": "softmax", "s": 3}, "a case has no field 's'; the fields are dtype, rows, S, values, "),
        ({"contract": "softmax", "claims": 3}, "claims are names"),
        ({"contract": "softmax", "claims": {"accumulate": []}}, "claims are names"),
        ({"contract": "softmax", "claims": {"x": "float32"}}, "no claim 'x'"),
        ({"contract": "softmax", "framework": 3}, "no framework 3"),
        ({"contract": "softmax", "framework": ["numpy"]}, "no framework"),
    ],
)
def test_what_is_no_case_is_one_clear_line(case: Any, told: str) -> None:
    with pytest.raises(ValueError) as error:
        assay.replay(case, softmax)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", [3, None, ["x.py:f"], {"a": 1}, "somebody:f"])
def test_a_candidate_that_is_no_file_is_asked_for(place: Any) -> None:
    with pytest.raises(ValueError, match="pass it again as candidate"):
        assay.replay({"contract": "softmax", "candidate": place})


@pytest.mark.parametrize("name", sorted(assay.contracts()))
def test_nonsense_in_any_contracts_case_is_one_clear_line(name: str) -> None:
    for nonsense in ({"dtype": "float8"}, {"dtype": 3}, {"seed": "x"}, {"seed": -1}, {"program": 3, "n": "x"}):
        try:
            report = assay.replay({"contract": name, **nonsense}, lambda *a, **k: None)
        except ValueError as error:
            assert "\n" not in str(error), nonsense
        else:
            assert not report.ok, nonsense


def test_the_engines_own_is_found_again() -> None:
    report = assay.replay({"contract": "softmax", "candidate": "built-in", "S": 5, "rows": 2})
    assert report.ok
    assert report.verdicts[0].case["framework"] == "mlx"
