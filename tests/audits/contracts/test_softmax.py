"""softmax's contract: what a row of nothing but −inf may give, and arrays of any number of axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from audits.candidate import Candidate
from audits.contracts.softmax import CONTRACT
from audits.domain import filled
from audits.sweep import Sweep

Array = Any


def honest(x: Array, blind: float = np.nan) -> Array:
    wide = x.astype(np.float64)
    hidden = np.isneginf(wide).all(-1, keepdims=True)
    e = np.exp(np.where(hidden, 0, wide - wide.max(-1, keepdims=True)))
    return np.where(hidden, blind, e / e.sum(-1, keepdims=True)).astype(x.dtype)


def outcome(function: Callable[[Array], Array], relation: str = "", **fields: Any) -> tuple[str, Any]:
    case = {**filled(CONTRACT.domain, {"dtype": "float32", **fields}), "relation": relation}
    candidate = Candidate(function=function, framework="numpy", name="test")
    verdict = Sweep(CONTRACT, candidate, shrinking=False).verdict(case)
    return verdict.outcome, verdict.evidence.get("check")


@pytest.mark.parametrize(("blind", "expected"), [(np.nan, "pass"), (0.0, "pass"), (1 / 40, "pass"), (1.0, "fail")])
def test_a_row_of_nothing_is_nan_zeros_or_even(blind: float, expected: str) -> None:
    assert outcome(lambda x: honest(x, blind), rows=4, S=40, values="blind")[0] == expected


def test_two_conventions_in_one_output_or_over_lengths_or_dtypes_are_a_finding() -> None:
    def mixed(x: Array) -> Array:
        return np.where(np.arange(len(x))[:, None] > 1, honest(x, 0.0), honest(x))

    def lengths(x: Array) -> Array:
        return honest(x, 0.0 if x.shape[-1] < 128 else np.nan)

    def dtypes(x: Array) -> Array:
        return honest(x, 0.0 if x.dtype == np.float16 else np.nan)

    found = ("fail", "fully masked rows")
    with np.errstate(invalid="ignore"):
        assert outcome(mixed, rows=5, S=40, values="blind") == found
        for faulty in (lengths, dtypes):
            assert outcome(faulty, "fully masked rows", rows=2, S=33, values="masked") == found
        assert outcome(honest, "fully masked rows", rows=2, S=33, values="masked") == ("pass", None)


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_the_last_axis_is_normalised_whatever_lies_before_it(axes: int) -> None:
    def over_two(x: Array) -> Array:
        return honest(x) / (honest(x).sum(-2, keepdims=True) if x.ndim > 1 else 2)

    rows = 1 if axes == 1 else 2
    assert outcome(honest, rows=rows, S=9, axes=axes)[0] == "pass"
    assert outcome(over_two, rows=rows, S=9, axes=axes)[0] == "fail"
