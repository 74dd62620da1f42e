"""Choices and flips: which are right, which are ties, which are defects."""

import numpy as np
import pytest

from audits.routing import flips, slot_order, wrong_choices

SCORES = np.array([[0.9, 0.5, 0.4999, 0.1], [0.1, 0.2, 0.3, 0.4]])
TIGHT = np.full(SCORES.shape, 1e-6)


def test_the_right_choice_in_any_slot_order_passes() -> None:
    assert not wrong_choices(np.array([[0, 1], [3, 2]]), SCORES, TIGHT)
    assert not wrong_choices(np.array([[1, 0], [2, 3]]), SCORES, TIGHT)


def test_a_tie_may_fall_either_way_within_the_bound_only() -> None:
    other = np.array([[0, 2], [3, 2]])
    assert not wrong_choices(other, SCORES, np.full(SCORES.shape, 1e-4))
    (wrong,) = wrong_choices(other, SCORES, TIGHT)
    assert (wrong.token, wrong.slot, wrong.chosen, wrong.missed) == (0, 1, 2, 1)
    assert wrong.margin == pytest.approx(1e-4)


@pytest.mark.parametrize("ids", [[0, 0], [0, 4], [0, -1]])
def test_ids_twice_or_out_of_range_are_wrong(ids: list[int]) -> None:
    (wrong,) = wrong_choices(np.array([ids, [3, 2]]), SCORES, TIGHT)
    assert (wrong.token, wrong.slot) == (0, 1)


def test_nan_scores_never_pass() -> None:
    scores = SCORES.copy()
    scores[1, 0] = np.nan
    assert wrong_choices(np.array([[0, 1], [3, 2]]), scores, TIGHT)


def test_a_flip_is_explained_by_scores_that_moved_and_by_nothing_else() -> None:
    before = SCORES
    now = before.copy()
    now[0, 1] -= 2e-4
    picked, drifted = np.array([[0, 1], [3, 2]]), np.array([[0, 2], [3, 2]])
    (flip,) = flips("experts", drifted, picked, (now, before), TIGHT)
    assert (flip.token, flip.slot, flip.old, flip.new, flip.explained) == (0, 1, 1, 2, True)
    assert flip.margin == pytest.approx(1e-4)
    (unmoved,) = flips("experts", drifted, picked, (before, before), TIGHT)
    assert not unmoved.explained


def test_slot_order_is_no_flip() -> None:
    assert not flips("experts", np.array([[1, 0]]), np.array([[0, 1]]), (SCORES[:1], SCORES[:1]), TIGHT[:1])


def test_a_choice_without_an_axis_of_slots_works_as_one_slot() -> None:
    (flip,) = flips("token", np.array([0, 2]), np.array([0, 3]), (SCORES, SCORES), TIGHT)
    assert (flip.token, flip.slot, flip.old, flip.new) == (1, 0, 3, 2)


def test_slots_are_matched_by_expert_and_flipped_ones_take_what_is_left() -> None:
    actual, expected = np.array([[4, 2, 7], [1, 2, 3]]), np.array([[2, 4, 9], [3, 1, 2]])
    assert slot_order(actual, expected).tolist() == [[1, 0, 2], [1, 2, 0]]
