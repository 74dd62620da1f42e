"""Bounds of softmax and attention: honest code of every shape is inside, one rounding too many is outside."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reference import bounds, ops
from reference.arithmetic import Arithmetic, round_to
from tests.reference.honest import DTYPES, STYLES, Style, excess, flash, rounded, softmax, unfused

KINDS = ("normal", "flat", "peaked", "x30", "shifted", "ties", "ascending", "tiny", "huge", "constant")


@dataclass(frozen=True, kw_only=True)
class Case:
    """The arguments of one attention, exact in their dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Tensor
    sinks: Tensor | None

    def bounded(self, arith: Arithmetic) -> bounds.Bounded:
        return bounds.attention(self.q, self.k, self.v, self.scale, self.mask, self.sinks, arith)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, float, Tensor, Tensor | None]:
        return self.q, self.k, self.v, self.scale, self.mask, self.sinks


def case(
    kind: str,
    dtype: str,
    seed: int,
    *,
    heads: tuple[int, int] = (4, 2),
    L: int = 3,
    S: int = 33,
    Dh: int = 16,
    Dv: int = 12,
    sink: bool = False,
    mask: str = "causal",
) -> Case:
    """One attention of one kind of trouble; V has mean zero, so that some outputs cancel."""
    g = torch.Generator().manual_seed(seed)
    hq, hkv = heads
    q, k, v = (
        torch.randn(h, n, d, generator=g, dtype=torch.float64) for h, n, d in [(hq, L, Dh), (hkv, S, Dh), (hkv, S, Dv)]
    )
    sinks = torch.randn(hq, generator=g, dtype=torch.float64) * 2 if sink else None
    if kind == "flat":
        q = 0 * q if seed % 2 else q * 0.01
    elif kind == "peaked":
        q = q * 8
    elif kind == "x30":
        q, v = q * 30, v * 30
    elif kind == "shifted":  # all scores near −1e5: softmax does not care, an accumulator started too high does
        q[..., 0], k[..., 0] = -1000.0, 100.0 * Dh**0.5
    elif kind == "ties":
        k, v = k[:, torch.arange(S) % 3], v
    elif kind == "ascending":  # every key raises the running maximum of an online softmax
        q[..., 1:], k[..., 1:] = 0, 0
        q[..., 0], k[..., 0] = 1.0, torch.linspace(-1, 1, S).double() * Dh**0.5
    elif kind == "tiny":
        q, v = q * 1e-3, v * {"float16": 1e-6, "bfloat16": 1e-38, "float32": 1e-38}[dtype]
    elif kind == "huge":  # near overflow; in float32, as near as sums that are normalised at the end can go
        v = v.sign() * {"float16": 65504.0, "bfloat16": 1e36, "float32": 1e36}[dtype]
    elif kind == "constant":
        v = torch.full_like(v, 0.7)
    visible = ops.causal_mask(L, S, 9 if mask == "window" else None)
    if mask == "random":
        visible = torch.rand(hq, L, S, generator=g) < 0.5
        visible[:, 0] = False
        visible[0, -1, 1:] = False
    elif mask == "all":
        visible = torch.ones(L, S, dtype=torch.bool)
    q, k, v = (rounded(x, dtype) for x in (q, k, v))
    return Case(q=q, k=k, v=v, scale=Dh**-0.5, mask=visible, sinks=None if sinks is None else rounded(sinks, dtype))


SHAPES: list[dict[str, Any]] = [
    {"S": 1, "L": 1},
    {"S": 2, "L": 2, "heads": (1, 1)},
    {"S": 33, "L": 3, "sink": True},
    {"S": 61, "L": 2, "heads": (3, 1), "Dh": 24, "Dv": 5, "mask": "window"},
    {"S": 40, "L": 4, "mask": "random", "sink": True},
    {"S": 40, "L": 4, "mask": "random"},
    {"S": 203, "L": 1, "heads": (2, 1), "Dv": 7, "mask": "all"},
]


def some_styles(seed: int) -> list[tuple[int, Style]]:
    """Every third style, which third by seed: all of them over the shapes of a kind."""
    return [(i, style) for i, style in enumerate(STYLES) if (i + seed) % 3 == 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_honest_attention_is_inside(kind: str, dtype: str) -> None:
    for seed, shape in enumerate(SHAPES):
        c = case(kind, dtype, seed, **shape)
        result = c.bounded(Arithmetic.claim(dtype))
        for i, style in some_styles(seed):
            for actual in (
                flash(*c.arguments(), dtype, style, block=(1, 4, 32)[i % 3], splits=(1, 1, 3)[i % 3]),
                unfused(*c.arguments(), dtype, style, where=("q", "s", "log2")[seed % 3], late=i % 4 < 2),
                unfused(*c.arguments(), dtype, style, online=True),
            ):
                assert excess(actual, result).max() <= 1, (shape, style)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_honest_fallback_that_stores_every_step_in_half_is_inside(kind: str, dtype: str) -> None:
    if (kind, dtype) == ("shifted", "float16"):
        kind = "normal"  # a score of −1e5 is beyond float16
    for seed, shape in enumerate(SHAPES):
        c = case(kind, dtype, seed, **shape)
        result = c.bounded(Arithmetic.claim(dtype, intermediate="input"))
        for i, style in some_styles(seed):
            # "huge" leaves no room for a numerator that is not yet normalised.
            late = i % 4 < 2 and kind != "huge"
            actual = unfused(*c.arguments(), dtype, style, stored=True, where=("q", "s")[i % 3 % 2], late=late)
            assert excess(actual, result).max() <= 1, (shape, style)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_honest_tensor_core_operands_are_inside(kind: str, dtype: str) -> None:
    for seed, shape in enumerate(SHAPES):
        c = case(kind, dtype, seed, **shape)
        result = c.bounded(Arithmetic.claim(dtype, operand="input"))
        for i, style in some_styles(seed):
            actual = flash(*c.arguments(), dtype, style, block=(1, 16)[i % 2], splits=(1, 1, 3)[i % 3], operand=dtype)
            assert excess(actual, result).max() <= 1, (shape, style)


@pytest.mark.parametrize("kind", ["normal", "flat", "peaked", "x30", "ties"])
def test_honest_tf32_and_half_accumulators_are_inside_when_claimed(kind: str) -> None:
    for seed, shape in enumerate(SHAPES):
        c = case(kind, "float32", seed, **shape)
        tf32 = flash(*c.arguments(), "float32", STYLES[seed], operand="tf32")
        assert excess(tf32, c.bounded(Arithmetic.claim("float32", operand="tf32"))).max() <= 1, shape
        c = case(kind, "float16", seed, **shape)
        half = Style(order=STYLES[seed].order, accumulate=torch.float16)
        low = c.bounded(Arithmetic.claim("float16", accumulate="input", intermediate="input"))
        assert excess(unfused(*c.arguments(), "float16", half, stored=True), low).max() <= 1, shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_is_inside(dtype: str) -> None:
    """A third party's fused attention, whose order of operations nobody here chose."""
    for kind in ("normal", "peaked", "ties"):
        c = case(kind, dtype, 3, S=130, L=7, heads=(4, 4), Dh=32, Dv=32)
        q, k, v = (x.to(DTYPES[dtype])[None] for x in (c.q, c.k, c.v))
        actual = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=c.mask, scale=c.scale)[0]
        # On a CPU its bfloat16 and float16 kernels feed matrix units with rounded probabilities.
        claims = {} if dtype == "float32" else {"operand": "input"}
        assert excess(actual, c.bounded(Arithmetic.claim(dtype, **claims))).max() <= 1, kind


def test_a_row_without_visible_keys_is_exactly_zero() -> None:
    for sink in (False, True):
        c = case("normal", "float16", 1, S=20, L=3, mask="random", sink=sink)
        result = c.bounded(Arithmetic.claim("float16"))
        assert (result.expected[:, 0] == 0).all()
        assert torch.isfinite(result.bound).all()
        assert torch.equal((result.bound > 0).all(-1), c.mask.any(-1))


# --- planted faults ---------------------------------------------------------------------------------------------------

NARROW = {"float32": "tf32", "float16": "bfloat16"}  # nothing in use is narrower than bfloat16
HALF = {"float32": "bfloat16", "float16": "float16", "bfloat16": "bfloat16"}
BETWEEN = {"float32": "bfloat16", "float16": "bfloat16", "bfloat16": "float16"}
FAULTS = ("scaled query", "query", "scores", "probabilities", "value", "accumulator", "output", "leaked key", "no sink")
REGIMES = ("normal", "flat", "peaked", "x30")


def faulty(fault: str, c: Case, dtype: str) -> Tensor:
    """Attention in float32, but for one rounding (or defect) named by `fault`, in the narrowest dtype at hand."""
    style, low = Style(), DTYPES[dtype]
    q, k, v, scale, mask, sinks = c.arguments()
    if fault == "scaled query":
        return unfused(round_to(q * scale, HALF[dtype]), k, v, 1.0, mask, sinks, dtype, style)
    if fault == "query":
        return unfused(round_to(q, NARROW[dtype]), k, v, scale, mask, sinks, dtype, style)
    if fault == "value":
        return unfused(q, k, round_to(v, NARROW[dtype]), scale, mask, sinks, dtype, style)
    if fault == "probabilities":
        return unfused(*c.arguments(), dtype, style, probabilities=HALF[dtype])
    if fault == "accumulator":
        return unfused(*c.arguments(), dtype, Style(accumulate=DTYPES[HALF[dtype]]))
    if fault == "output":
        return round_to(unfused(*c.arguments(), "float32", style).double(), BETWEEN[dtype]).to(low)
    if fault == "leaked key":
        return unfused(q, k, v, scale, torch.ones_like(mask), sinks, dtype, style)
    if fault == "no sink":
        return unfused(q, k, v, scale, mask, None, dtype, style)
    scores = round_to(ops.attention_scores(q, k, scale, mask), HALF[dtype])
    values = ops.repeat_heads(v, q.shape[0])
    return (ops.attention_probabilities(scores, sinks) @ values).to(low)


# With flat scores (|s| ≈ 0.01 here) a rounding of the score moves pⱼ by u·|s|·pⱼ, a hundredth of u, and of V's mean
# zero only 1/√S is left: below the output's own rounding in half, and within a few u of float32's sums. Nothing of
# q, k or s can be seen there, and need not be. A key that leaks into 33 or a sink of weight 1/33 can.
INVISIBLE = {("scaled query", "flat"), ("query", "flat"), ("scores", "flat")}


VISIBLE = [
    (fault, regime, dtype)
    for fault in FAULTS
    for regime in REGIMES
    for dtype in DTYPES
    if (fault, regime) not in INVISIBLE and (fault not in ("query", "value") or dtype in NARROW)
]


@pytest.mark.parametrize(("fault", "regime", "dtype"), VISIBLE)
def test_a_rounding_too_many_in_attention_is_outside(fault: str, regime: str, dtype: str) -> None:
    c = case(regime, dtype, 2, heads=(8, 2), L=4, S=33, Dh=24, Dv=64, sink=fault == "no sink")
    if fault == "no sink" and regime in ("peaked", "x30"):  # a sink of logit 2 stands up to few keys of logit 8 or 30
        c = case(regime, dtype, 2, heads=(8, 2), L=8, S=8, Dh=24, Dv=64, sink=True)
    result = c.bounded(Arithmetic.claim(dtype))
    assert excess(faulty(fault, c, dtype), result).max() > 1.05
    assert excess(faulty(fault, c, dtype), result, "likely").max() > 1.05


@pytest.mark.parametrize("fault", [f for f, regime in sorted(INVISIBLE)])
def test_what_flat_scores_hide_stays_inside_and_shows_when_they_are_less_flat(fault: str) -> None:
    hidden = case("flat", "float16", 2, heads=(8, 2), L=4, S=300, Dh=24, Dv=64)
    assert excess(faulty(fault, hidden, "float16"), hidden.bounded(Arithmetic.claim("float16"))).max() <= 1
    shown = case("normal", "float16", 2, heads=(8, 2), L=4, S=300, Dh=24, Dv=64)
    assert excess(faulty(fault, shown, "float16"), shown.bounded(Arithmetic.claim("float16"))).max() > 1.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("regime", ["normal", "flat"])
def test_a_fault_shows_through_half_intermediates(regime: str, dtype: str) -> None:
    """Values of one sign: partial sums of zero-mean values stay near o/√S, and adding them in half rounds to about what
    storing the probabilities does, which is allowed."""
    c = case(regime, dtype, 2, heads=(8, 2), L=4, S=300, Dh=24, Dv=64)
    c = replace(c, v=c.v.abs())
    result = c.bounded(Arithmetic.claim(dtype, intermediate="input"))
    assert excess(unfused(*c.arguments(), dtype, Style(), stored=True), result).max() <= 1
    half = Style(accumulate=DTYPES[dtype])
    assert excess(unfused(*c.arguments(), dtype, half, stored=True), result).max() > 1.2
    assert excess(faulty("leaked key", c, dtype), result).max() > 1.05


def test_probabilities_rounded_for_300_flat_keys_exceed_the_likely_level() -> None:
    """Flat over 300 keys, sums and rescalings in float32 may at worst cost as much as p rounded to float16."""
    c = case("flat", "float16", 2, heads=(8, 2), L=4, S=300, Dh=24, Dv=64, mask="all")
    actual, result = faulty("probabilities", c, "float16"), c.bounded(Arithmetic.claim("float16"))
    assert excess(actual, result, "likely").max() > 1.2
    assert excess(flash(*c.arguments(), "float16", Style(), block=1), result, "likely").max() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_tightness_of_attention(dtype: str) -> None:
    """Honest errors fill a good part of the bound: one loosened twofold would fail here."""
    c = case("normal", dtype, 1, S=2, L=2, heads=(8, 8), Dv=64)
    found = max(
        excess(unfused(*c.arguments(), dtype, style), c.bounded(Arithmetic.claim(dtype))).max() for style in STYLES
    )
    assert found > (0.9 if dtype != "float32" else 0.5)


# --- softmax ----------------------------------------------------------------------------------------------------------


def logits(kind: str, S: int, dtype: str, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(6, S, generator=g, dtype=torch.float64)
    if kind == "flat":
        x = x * 0
    elif kind == "peaked":
        x = x * 30
    elif kind == "shifted":
        x = x - (1e5 if dtype != "float16" else 6e4)
    elif kind == "ascending":
        x = x.sort(dim=-1).values
    elif kind == "masked":
        x[:, ::2] = -torch.inf
        x[0] = -torch.inf
    return rounded(x, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "flat", "peaked", "shifted", "ascending", "masked"])
def test_honest_softmax_is_inside(kind: str, dtype: str) -> None:
    for seed, S in enumerate((1, 2, 33, 300)):
        x = logits(kind, S, dtype, seed)
        result = bounds.softmax(x, Arithmetic.claim(dtype))
        stored = bounds.softmax(x, Arithmetic.claim(dtype, intermediate="input"))
        finite = x[~torch.isneginf(x).all(-1)]
        rows = ~torch.isneginf(x).all(-1)
        for _, style in some_styles(seed):
            for online in (False, True) if kind != "masked" else (False,):
                actual = torch.zeros(x.shape, dtype=DTYPES[dtype])
                actual[rows] = softmax(finite, dtype, style, online=online)
                assert excess(actual, result).max() <= 1, (S, style, online)
            actual[rows] = softmax(finite, dtype, style, stored=True)
            assert excess(actual, stored).max() <= 1, (S, style)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "peaked", "flat"])
def test_a_rounding_too_many_in_softmax_is_outside(kind: str, dtype: str) -> None:
    x = logits(kind, 33, dtype, 1)
    result = bounds.softmax(x, Arithmetic.claim(dtype))
    low = HALF[dtype]
    # e and t are exact when all scores are equal; the total, 33, and its quotients are not.
    total = round_to(torch.exp(x - x.amax(-1, keepdim=True)).sum(-1, keepdim=True) * 1.01, low)
    assert excess((torch.exp(x - x.amax(-1, keepdim=True)) / total).to(DTYPES[dtype]), result).max() > 1.5
    between = round_to(ops.softmax(x).float().double(), BETWEEN[dtype]).to(DTYPES[dtype])
    if kind != "flat" or dtype != "bfloat16":  # all quotients equal 1/33, which float16 does not put on a tie
        assert excess(between, result).max() > 1.02
    if kind != "flat":
        stored = softmax(x, low, Style(), stored=True).to(DTYPES[dtype])
        assert excess(stored, result).max() > 1.2
