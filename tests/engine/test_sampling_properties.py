"""Drawn rows, options and keys: what the sampler picks is what its formula in float64 picks from the same noise."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling import NOTHING, sampler, shift_invariant

Array = np.ndarray[Any, np.dtype[Any]]
# Quarters make ties, and are the same in every dtype; the tenths make thresholds that fall between tokens.
LOGIT = st.one_of(
    st.integers(-24, 24).map(lambda n: n / 4), st.sampled_from([-np.inf, 0.0, -0.0, 40.0]), st.floats(-20, 20, width=16)
)
OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-30, 0.3, 1.0, 1.7, 100.0]),
        "top_k": st.integers(0, 9),
        "top_p": st.sampled_from([1.0, 1e-9, 0.13, 0.5, 0.77, 0.999]),
        "min_p": st.sampled_from([0.0, 0.011, 0.21, 0.63, 1.0]),
    }
)
# A share of mass, or of the largest probability, this close to its threshold may fall on either side of it in float32,
# and so may two scores this close to each other.
NEAR = 1e-5


def choices(x: Array, noise: Array, *, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The ids that may be picked: one, or several where float32 can't tell which."""
    finite = np.flatnonzero(x > -np.inf)
    if not len(finite):
        return {NOTHING}
    order = sorted(finite.tolist(), key=lambda i: (-x[i], i))
    if temperature == 0:
        return {order[0]}
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    before = dict(zip(order, np.cumsum([0.0, *p[order]]), strict=False))
    picked: set[int] = set()
    for slack in (-NEAR, NEAR):
        kept = [
            i
            for rank, i in enumerate(order)
            if (not top_k or rank < top_k)
            and (top_p == 1 or before[i] < top_p + slack or rank == 0)
            and p[i] >= min_p * p.max() * (1 - slack)
        ] or order[:1]
        score = (x[kept] - x.max()) / temperature + noise[kept]
        close = score >= score.max() - NEAR * max(1.0, abs(float(score.max())))
        picked |= {i for i, is_close in zip(kept, close, strict=True) if is_close}
    return picked


@settings(max_examples=100)
@given(data=st.data())
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_every_draw_is_the_formulas(dtype: mx.Dtype, data: st.DataObject) -> None:
    B, V = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 5, 8]))
    rows = data.draw(st.lists(st.lists(LOGIT, min_size=V, max_size=V), min_size=B, max_size=B))
    options = data.draw(st.lists(OPTIONS, min_size=B, max_size=B))
    keys = mx.stack([mx.random.key(seed) for seed in data.draw(st.lists(st.integers(0, 99), min_size=B, max_size=B))])
    logits = mx.array(rows).astype(dtype)
    ids = sampler(logits, key=keys, **{name: [o[name] for o in options] for name in options[0]})
    x = np.array(logits.astype(mx.float32), np.float64)
    for b, chosen in enumerate(ids.tolist()):
        noise = np.array(mx.random.gumbel((V,), key=keys[b]), np.float64)
        may_be = choices(x[b], noise, **options[b])
        assert chosen in may_be, f"row {b} of {x.tolist()} with {options[b]}: {chosen}, not one of {may_be}"


@settings(max_examples=60)
@given(data=st.data())
def test_a_constant_on_a_row_changes_nothing_where_the_rule_says_so(data: st.DataObject) -> None:
    """Log-softmax may be left out exactly there. Quarters and whole constants: the sum is exact."""
    V = 8
    logits = mx.array(data.draw(st.lists(st.integers(-24, 24), min_size=V, max_size=V))) / 4
    options = data.draw(OPTIONS)
    key = mx.random.key(data.draw(st.integers(0, 99)))
    moved = sampler(logits + data.draw(st.integers(-999, 999)), key=key, **options)
    assert shift_invariant(top_p=options["top_p"]) == (options["top_p"] == 1)
    if shift_invariant(top_p=options["top_p"]):
        assert moved.item() == sampler(logits, key=key, **options).item()
