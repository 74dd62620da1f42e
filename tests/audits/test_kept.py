"""Operands that are kept between candidates: made once, read-only, dropped for want of room, and never poisoned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from audits.candidate import Candidate
from audits.catalogue import contract
from audits.contract import Call, built
from audits.contracts.softmax import CONTRACT as SOFTMAX
from audits.domain import Case, filled
from audits.kept import ENTRY, Kept

CASE = {**filled(SOFTMAX.domain, {"rows": 3, "S": 7, "dtype": "float32", "seed": 5}), "relation": ""}


def test_a_result_is_made_once_and_the_longest_unused_is_dropped_first() -> None:
    kept, made = Kept(room=3 * (ENTRY + 800)), []

    def array(name: str) -> np.ndarray[Any, Any]:
        return kept.once(name, lambda: made.append(name) or np.zeros(100))  # type: ignore[func-returns-value]

    for name in "abcadab":
        array(name)
    assert made == list("abcdb"), "b was dropped for d, as a had been asked for since"
    assert kept.held == 3 * (ENTRY + 800) and len(kept.results) == 3


def test_a_result_that_would_push_out_many_is_not_kept_and_stays_writable() -> None:
    kept = Kept(largest=ENTRY + 100)
    first, second = (kept.once("x", lambda: np.zeros(100)) for _ in range(2))
    assert first is not second and first.flags.writeable and not kept.results


def test_what_is_kept_is_read_only_and_counted_once() -> None:
    kept = Kept()
    call = kept.once("call", lambda: Call({"a": np.zeros(100), "b": (np.zeros(50), None)}))
    kept.once("other", lambda: call.with_(b=np.zeros(25)))
    assert kept.held == 2 * ENTRY + 8 * (100 + 50 + 25)
    with pytest.raises(ValueError, match="read-only"):
        call.args["b"][0][0] = 1


def test_a_case_has_the_same_operands_whatever_is_asked_of_them() -> None:
    call = SOFTMAX.call(CASE)
    assert SOFTMAX.call({**CASE, "layout": "sliced", "operand": "x", "relation": "rerun"}) is call
    assert SOFTMAX.call({**CASE, "seed": 6}) is not call
    assert SOFTMAX.call(CASE).args["x"].tobytes() == SOFTMAX.build(CASE).args["x"].tobytes()


def test_contracts_of_other_builds_share_nothing() -> None:
    def zeros(case: Case) -> Call:
        return Call({"x": np.zeros((case["rows"], case["S"]), np.float32)})

    assert replace(SOFTMAX, build=zeros).call(CASE).args["x"].any() != SOFTMAX.call(CASE).args["x"].any()


def test_nothing_is_kept_of_a_call_that_follows_from_nothing_known() -> None:
    counted = iter(range(9))
    changed = built(SOFTMAX.build, CASE).with_(x=np.ones(3, np.float32))
    assert [changed.once("n", lambda: next(counted)) for _ in range(2)] == [0, 1]
    kept = built(SOFTMAX.build, CASE)
    assert [kept.once("n", lambda: next(counted)) for _ in range(2)] == [2, 2]


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("name", ["softmax", "sdpa", "quantized_sdpa"])
def test_a_candidate_that_writes_into_its_inputs_is_found_and_poisons_no_other(name: str, framework: str) -> None:
    op = contract(name)
    case = {**filled(op.domain, op.bases[0]), "relation": ""}  # type: ignore[union-attr]
    before = op.build(case).args  # type: ignore[union-attr]

    def writes(*operands: Any, **options: Any) -> Any:
        for x in (part for operand in operands for part in (operand if isinstance(operand, tuple) else (operand,))):
            x[...] = 0
        return operands[0]

    for _ in range(2):
        verdict = op.replay(case, Candidate(function=writes, framework=framework, name="writes"))
        assert verdict.outcome == "fail" and verdict.evidence["check"] == "inputs unchanged"
    after = op.call(case).args  # type: ignore[union-attr]
    for key, value in before.items():
        pairs = zip(value, after[key], strict=True) if isinstance(value, tuple) else [(value, after[key])]
        assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
