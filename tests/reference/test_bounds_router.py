"""Bounds of router scores and weights: honest code is inside, one rounding too many is outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference import bounds, ops
from reference.arithmetic import Arithmetic, round_to
from tests.reference.honest import STYLES, Style, divide, excess, exp, rounded, sigmoid, softmax, total

ARITH = Arithmetic.claim("float32")
KINDS = ("normal", "cold", "hot", "mixed", "equal")


def logits(kind: str, seed: int, E: int = 33) -> Tensor:
    """[12, E] float32 logits; cold rows are where 1 + eˣ rounds to 1, hot ones where softplus(x) is x."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(12, E, generator=g, dtype=torch.float64) * 2
    if kind == "cold":
        x = x - 17
        x[0] -= 60
        x[1] -= 90  # eˣ is subnormal
    elif kind == "hot":
        x = x + 20
    elif kind == "mixed":
        x = x * 4
    elif kind == "equal":
        x = x[:, :1].expand(-1, E).clone()
    return rounded(x, "float32")


def scores(x: Tensor, scoring: str, style: Style, stable: bool = False) -> Tensor:
    """Router scores in float32; stable: softplus as max(x, 0) + log1p(exp(−|x|)), without branches."""
    y = x.float()
    if scoring == "topk_softmax":
        return y
    if scoring == "softmax":
        return softmax(x, "float32", style)
    if scoring == "sigmoid":
        return sigmoid(y, style)
    if stable:
        softplus = y.clamp(min=0) + torch.log1p(exp(-y.abs(), style))
    else:
        e = exp(y.clamp(max=20), style)
        softplus = torch.where(y > 20, y, torch.where(y < -20, e, torch.log1p(e)))
    if style.flush:
        softplus = torch.where(softplus < 2.0**-126, torch.zeros_like(softplus), softplus)
    return torch.sqrt(softplus) if style.sloppy == 0 else (softplus.double().sqrt() * (1 + 4 * 2.0**-24)).float()


def weights(chosen: Tensor, scoring: str, norm: bool, scale: float, style: Style) -> Tensor:
    """Weights [T, K] in float32 from the scores of the chosen experts."""
    factor = torch.tensor(scale).float()
    if scoring == "topk_softmax":
        return softmax(chosen.double(), "float32", style) * factor
    if not norm:
        return chosen * factor
    whole = total(chosen, style)[..., None]
    whole = whole.clamp(min=6.1e-5) if scoring == "sqrtsoftplus" else whole + (1e-20 if scoring == "sigmoid" else 0)
    return divide(chosen, whole, style) * factor


@pytest.mark.parametrize("scoring", ops.SCORINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_honest_scores_and_weights_are_inside(kind: str, scoring: str) -> None:
    for seed in range(3):
        x = logits(kind, seed)
        bound = bounds.router_scores(x, scoring, ARITH)
        ids = ops.top_k(bound.expected, 6)
        for norm, scale in ((True, 1.5), (True, 1.0), (False, 2.5)):
            expected = bounds.router_weights(x, ids, scoring, None, norm, scale, ARITH)
            for style in STYLES:
                for stable in (False, True):
                    actual = scores(x, scoring, style, stable)
                    assert excess(actual, bound).max() <= 1, (style, stable)
                    found = weights(actual.gather(-1, ids), scoring, norm, scale, style)
                    assert excess(found, expected).max() <= 1, (style, stable, norm, scale)


@pytest.mark.parametrize("scoring", ops.SCORINGS)
@pytest.mark.parametrize("kind", ["normal", "mixed", "equal"])
def test_a_rounding_too_many_in_the_router_is_outside(kind: str, scoring: str) -> None:
    x = logits(kind, 4)
    bound = bounds.router_scores(x, scoring, ARITH)
    ids = ops.top_k(bound.expected, 6)
    expected = bounds.router_weights(x, ids, scoring, None, True, 1.5, ARITH)
    narrow = rounded(bound.expected, "bfloat16")
    if scoring != "topk_softmax":
        assert excess(narrow, bound).max() > 100
        tf32 = ops.router_scores(round_to(x, "tf32"), scoring)
        # A softmax forgives what all its logits share.
        assert excess(tf32, bound).max() > 10 or (kind, scoring) == ("equal", "softmax")
    chosen = narrow.gather(-1, ids).float()
    if kind != "equal":  # equal weights are 1/6 each, whatever their scores were rounded to
        assert excess(weights(chosen, scoring, True, 1.5, Style()), expected).max() > 100
    once = rounded(expected.expected, "bfloat16")
    if kind != "equal":  # 1/6·1.5 is exact in bfloat16
        assert excess(once, expected).max() > 100
    assert excess(expected.expected / 1.5, expected).max() > 1e3


def test_softplus_without_log1p_is_outside_for_cold_rows() -> None:
    x = logits("cold", 0)
    bound = bounds.router_scores(x, "sqrtsoftplus", ARITH)
    naive = torch.sqrt(torch.log(1 + torch.exp(x.float())))
    assert (naive[(x < -16.7) & (x > -20)] == 0).all()
    assert excess(naive, bound).max() > 1e5


def test_weights_belong_to_the_ids_given() -> None:
    x = logits("normal", 1)
    ids = ops.top_k(ops.router_scores(x, "sigmoid"), 4)
    one = bounds.router_weights(x, ids, "sigmoid", None, True, 1.0, ARITH)
    other = bounds.router_weights(x, ids.flip(-1), "sigmoid", torch.ones(33).double(), True, 1.0, ARITH)
    assert torch.allclose(one.expected, other.expected.flip(-1), atol=1e-15)
    assert torch.allclose(one.expected, ops.router(x, 4, "sigmoid")[1], atol=1e-15)


def test_an_unknown_scoring_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"unknown scoring 'relu'.*sqrtsoftplus"):
        bounds.router_scores(logits("normal", 0), "relu", ARITH)
