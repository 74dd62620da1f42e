"""Judging row by row: one wrong element of one row is seen and named."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from audits.contract import Finding
from audits.errors import CannotJudge
from audits.rows import judge_rows
from reference.bounds import Bounded


def bounded(exact: Any, bound: float | Any = 1e-3) -> Bounded:
    exact = torch.as_tensor(exact, dtype=torch.float64)
    allowed = torch.as_tensor(bound, dtype=torch.float64).expand(exact.shape)
    return Bounded(expected=exact, bound=allowed, likely=allowed)


def wrong(actual: Any, expected: Bounded, **names: str) -> Finding:
    finding = judge_rows(actual, expected, **names)
    assert finding is not None
    json.dumps(finding.evidence, allow_nan=False)
    return finding


EXACT = np.arange(1.0, 25.0).reshape(2, 3, 4)


def test_within_the_bound_is_nothing_wrong() -> None:
    assert judge_rows(EXACT.astype(np.float32), bounded(EXACT)) is None
    assert judge_rows(EXACT + 1e-3 * 0.99, bounded(EXACT)) is None


def test_one_element_of_one_row_is_named() -> None:
    actual = EXACT.copy()
    actual[1, 2, 3] += 0.01
    finding = wrong(actual, bounded(EXACT), name="weights", check="choice")
    assert finding.check == "choice"
    assert finding.message.startswith("weights[1,2,3] is 24.01, expected 24: error 0.01, 10 times the 0.001 allowed")
    assert "1 of 24 elements in 1 of 6 rows are wrong, the first row [1,2]" in finding.message
    assert finding.evidence["first_row"] == [1, 2]
    assert finding.evidence["elements"] == finding.evidence["rows"] == 1


def test_the_worst_element_is_the_one_furthest_beyond_its_own_bound() -> None:
    actual = EXACT.copy()
    actual[0, 0, 0] += 0.5  # 5 times what is allowed there
    actual[1, 0, 0] += 0.1  # 100 times
    allowed = np.full(EXACT.shape, 1e-3)
    allowed[0, 0, 0] = 0.1
    finding = wrong(actual, bounded(EXACT, allowed))
    assert finding.evidence["worst"]["index"] == [1, 0, 0]
    assert finding.evidence["first_row"] == [0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_wrong_and_the_worst(bad: float) -> None:
    actual = EXACT.copy()
    actual[0] += 1.0
    actual[1, 1, 1] = bad
    finding = wrong(actual, bounded(EXACT))
    assert finding.evidence["worst"]["index"] == [1, 1, 1]
    assert finding.evidence["worst"]["actual"] == str(bad)


def test_where_overflow_is_legal_only_nan_is_wrong() -> None:
    expected = bounded(EXACT, np.where(EXACT > 20, np.inf, 1e-3))
    actual = EXACT.copy()
    actual[EXACT > 20] = np.inf
    assert judge_rows(actual, expected) is None
    actual[1, 2, 3] = np.nan
    assert wrong(actual, expected).evidence["elements"] == 1


def test_another_shape_is_told_before_any_value() -> None:
    for actual in (EXACT[0], EXACT[..., :3], np.float64(1.0), EXACT[None], EXACT[:, :1]):
        finding = wrong(np.asarray(actual), bounded(EXACT))
        assert finding.check == "shape"
        assert "expected [2, 3, 4]" in finding.message


def test_a_vector_is_one_row() -> None:
    finding = wrong(np.array([1.0, 9.0]), bounded(np.array([1.0, 2.0])))
    assert "in 1 of 1 rows" in finding.message
    assert finding.evidence["worst"]["index"] == [1]


def test_a_bound_wider_than_every_row_says_nothing() -> None:
    with pytest.raises(CannotJudge, match="wider than the values in every row"):
        judge_rows(EXACT, bounded(EXACT, 1e3))
    some = np.full(EXACT.shape, 1e3)
    some[1, 2] = 1e-3
    assert judge_rows(EXACT, bounded(EXACT, some)) is None, "one row can be judged"
    with pytest.raises(CannotJudge):
        judge_rows(np.zeros((3, 0)), bounded(np.zeros((3, 0))))


def test_what_is_wrong_is_told_however_wide_the_bound() -> None:
    actual = EXACT.copy()
    actual[0, 0, 0] = np.nan
    assert wrong(actual, bounded(EXACT, 1e3)).evidence["elements"] == 1


@pytest.mark.parametrize(("size", "judged"), [(1, True), (2, True), (3, False)])
def test_one_or_two_values_may_cancel_without_a_word(size: int, judged: bool) -> None:
    exact = np.full((size, 1), 1e-4)
    if judged:
        assert judge_rows(exact, bounded(exact)) is None
        assert wrong(exact + 2e-3, bounded(exact)).check == "values"
    else:
        with pytest.raises(CannotJudge):
            judge_rows(exact, bounded(exact))
