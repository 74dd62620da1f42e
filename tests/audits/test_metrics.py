"""Figures, and that no figure hides a bad element."""

import ml_dtypes
import numpy as np
import pytest

from audits.metrics import measure, ulp_distance


def pair(rows: int = 4, columns: int = 8) -> tuple[np.ndarray, np.ndarray]:
    expected = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    return expected.copy(), expected


def test_hand_worked_figures() -> None:
    actual, expected = np.array([[3.0, 4.0], [0.0, 1.5]]), np.array([[3.0, 2.0], [0.0, 1.0]])
    found = measure(actual, expected, np.full((2, 2), 0.5))
    assert found.max_abs == 2.0
    assert found.rms == pytest.approx(np.sqrt((4 + 0.25) / 4))
    assert found.rel_l2 == pytest.approx(np.sqrt(4.25 / 14))
    assert found.nmse == pytest.approx(4.25 / 14)
    assert (found.outside, found.share_outside, found.ratio) == (1, 0.25, 4.0)
    assert (found.worst.index, found.worst.actual, found.worst.expected) == ((0, 1), 4.0, 2.0)
    assert found.worst_token == 0


def test_one_bad_row_does_not_hide_in_the_average() -> None:
    actual, expected = pair(rows=1000)
    actual[737] *= 1.01
    found = measure(actual, expected, np.abs(expected) * 1e-6)
    assert found.rel_l2 < 1e-3, "the average hides it"
    assert found.worst_token == 737
    assert found.worst_token_rel_l2 == pytest.approx(0.01, rel=1e-3)
    assert found.worst_token_outside == 8
    assert found.outside == 8


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_element_is_outside_every_finite_bound(bad: float) -> None:
    actual, expected = pair()
    actual[2, 3] = bad
    found = measure(actual, expected, np.full(expected.shape, 1e30))
    assert (found.nonfinite, found.outside, found.worst.index) == (1, 1, (2, 3))
    assert found.ratio == np.inf


def test_an_overflow_counts_as_right_only_with_the_right_sign_and_an_infinite_bound() -> None:
    expected = np.array([[1e5, 1.0]])
    bound = np.array([[np.inf, 0.1]])
    assert measure(np.array([[np.inf, 1.0]]), expected, bound).outside == 0
    assert measure(np.array([[-np.inf, 1.0]]), expected, bound).outside == 1
    assert measure(np.array([[np.nan, 1.0]]), expected, bound).outside == 1
    assert measure(np.array([[1e5, np.inf]]), expected, bound).outside == 1


def test_nan_in_the_expected_tensor_is_outside_too() -> None:
    actual, expected = pair()
    expected[1, 1] = np.nan
    assert measure(actual, expected, np.ones(expected.shape)).outside == 1


@pytest.mark.parametrize(
    ("dtype", "step"),
    [(np.float32, 2.0**-23), (np.float16, 2.0**-10), (ml_dtypes.bfloat16, 2.0**-7)],
)
def test_ulps_are_those_of_the_actual_dtype(dtype: type, step: float) -> None:
    one = np.array([[1.0, 1.0]]).astype(dtype)
    next_up = np.array([[1.0, 1.0 + step]]).astype(dtype)
    assert measure(next_up, one).ulp[100] == 1.0


def test_ulps_at_zero_are_those_of_the_smallest_normal() -> None:
    assert ulp_distance(np.array([2.0**-24]), np.array([0.0]), "float16")[0] == 1.0
