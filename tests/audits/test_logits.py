"""Agreement of logits: hand-worked values, and that each figure moves when it should."""

import numpy as np
import pytest

from audits.logits import agreement, top_ids


def test_equal_logits_agree_in_everything() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 40))
    found = agreement(logits, logits)
    assert (found.top1, found.top5, found.top20, found.max_abs) == (1.0, 1.0, 1.0, 0.0)
    assert found.kl_max == pytest.approx(0, abs=1e-12)


def test_kl_in_nats_by_hand() -> None:
    expected, actual = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    assert agreement(actual, expected).kl_max == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))


def test_kl_does_not_depend_on_a_constant() -> None:
    logits = np.random.default_rng(1).standard_normal((3, 10))
    assert agreement(logits + 100.0, logits).kl_max == pytest.approx(0, abs=1e-10)


def test_a_top1_change_is_listed_with_its_margin() -> None:
    expected = np.array([[1.0, 0.75, 0.0], [0.0, 1.0, 0.5]])
    actual = expected.copy()
    actual[0, 1] = 1.5
    found = agreement(actual, expected)
    assert found.top1 == 0.5
    assert found.top1_changes == ((0, 1, 0, 0.25),)
    assert (found.smallest_margin, found.smallest_margin_token) == (0.25, 0)


def test_nan_logits_give_nan_and_the_worst_token() -> None:
    expected = np.zeros((3, 4))
    actual = expected.copy()
    actual[1, 2] = np.nan
    found = agreement(actual, expected)
    assert np.isnan(found.kl_max)
    assert found.kl_max_token == 1


def test_ties_go_to_the_lowest_id() -> None:
    assert top_ids(np.array([[1.0, 2.0, 2.0, 2.0]]), 2).tolist() == [[1, 2]]
