"""The router's arithmetic: order of slots, ties, accuracy far from zero, weights."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.config import parse_config
from engine.router import route, sqrtsoftplus, top_k
from tests.engine import oracle
from tests.engine.tiny import CONFIG

Array = np.ndarray[Any, np.dtype[Any]]
SCORING = ("sqrtsoftplus", "sigmoid", "softmax", "topk_softmax")


def stable_top_k(scores: Array, k: int) -> Array:
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def test_ties_go_to_the_lowest_id() -> None:
    scores = np.float32(
        [[1, 2, 2, 1, 2, 0], [0, 0, 0, 0, 0, 0], [-1, -3, -1, -2, -3, -1], [0.0, -0.0, 0.0, -0.0, 1, 1]]
    )
    assert np.array(top_k(mx.array(scores), 4)).tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [0, 2, 5, 3], [4, 5, 0, 1]]


@pytest.mark.parametrize("experts", [1, 2, 7, 64, 257])
def test_order_is_that_of_a_stable_sort(experts: int) -> None:
    rng = np.random.default_rng(experts)
    # Few distinct values, so that most rows have ties; then neighbours one ulp apart; then all magnitudes and signs.
    few = rng.integers(-3, 4, (50, experts)).astype(np.float32) / 3
    near = np.nextafter(np.float32(1), np.float32(2)) ** rng.integers(0, 2, (50, experts)).astype(np.float32)
    wide = (rng.standard_normal((50, experts)) * 10.0 ** rng.integers(-38, 38, (50, experts))).astype(np.float32)
    for scores in (few, near, wide):
        for k in {1, (experts + 1) // 2, experts}:
            assert np.array_equal(np.array(top_k(mx.array(scores), k)), stable_top_k(scores, k))


def test_ids_are_int32() -> None:
    assert top_k(mx.zeros((2, 3)), 2).dtype == mx.int32


def test_sqrtsoftplus_is_accurate_from_minus_90_to_90() -> None:
    x = np.concatenate([np.linspace(-100, 100, 4001), [-90, -88.5, -20, -16.7, 0, 20, np.nextafter(20, 21)]])
    x = x.astype(np.float32)
    actual = np.array(sqrtsoftplus(mx.array(x))).astype(np.float64)
    expected = np.sqrt(np.logaddexp(x.astype(np.float64), 0))
    # The CPU's exp is off by (1.25|x| + 2) u; a root, or the halved argument, keeps half; the rest adds a few u.
    allowed = (0.625 * np.maximum(-x, 0) + 6) * 2.0**-24
    assert (np.abs(actual - expected) / expected <= allowed).all()
    assert (actual > 0).all()


def test_cold_logits_keep_their_order() -> None:
    """1 + eˣ is 1 in float32 below −16.6: a router that adds before it takes the logarithm sees ties at 0."""
    logits = np.linspace(-90, -17, 64, dtype=np.float32)[None]
    config = parse_config(CONFIG | {"n_routed_experts": 64, "num_experts_per_tok": 6})
    ids, weights = route(mx.array(logits), mx.zeros((64,)), config)
    assert np.array(ids).tolist() == [[63, 62, 61, 60, 59, 58]]
    assert (np.array(weights) > 0).all()


@pytest.mark.parametrize("scoring", SCORING)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_ids_and_weights_agree_with_the_formulas(scoring: str, norm: bool, spread: float) -> None:
    raw = CONFIG | {"n_routed_experts": 16, "num_experts_per_tok": 5, "scoring_func": scoring, "norm_topk_prob": norm}
    rng = np.random.default_rng(3)
    logits = (spread * rng.standard_normal((400, 16))).astype(np.float32)
    biased = scoring in ("sqrtsoftplus", "sigmoid")
    bias = (0.5 * rng.standard_normal(16)).astype(np.float32) if biased else None
    ids, weights = route(mx.array(logits), None if bias is None else mx.array(bias), parse_config(raw))
    expected_ids, expected_weights = oracle.route(logits.astype(np.float64), bias, raw)
    # In float32 distinct scores can round to the same one, for sigmoid above all: those rows are ties, not faults.
    same = (np.array(ids) == expected_ids).all(axis=-1)
    assert same.mean() > (0.98 if spread == 1.0 or scoring != "sigmoid" else 0.3)
    assert weights.dtype == mx.float32
    error = np.abs(np.array(weights) - expected_weights)[same]
    assert (error <= 4e-6 * np.abs(expected_weights[same]) + 1e-12).all()


def test_the_bias_selects_and_does_not_weigh() -> None:
    config = parse_config(CONFIG | {"n_routed_experts": 3, "num_experts_per_tok": 1, "norm_topk_prob": False})
    logits = mx.array([[3.0, 2.0, 1.0]])
    ids, weights = route(logits, mx.array([0.0, 0.0, 9.0]), config)
    assert ids.tolist() == [[2]]
    assert abs(weights.item() - 1.5 * np.sqrt(np.log1p(np.exp(1.0)))) < 1e-6
