"""RMSNorm, softmax, RoPE, SwiGLU, router and one-query attention on the host, against float64 with derived bounds.

Inputs are rounded to the kernel's type first, so a bound holds the kernel's own arithmetic (float32, a few roundoffs a
function) and one rounding to its output type: a second one would leave it in float16 and bfloat16.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engine.metal.kernels import host, ops
from tests.engine.metal.kernel_oracle import U32, assert_within

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
# Unit roundoff of the output, and half the smallest subnormal.
OUT = {"f32": (2.0**-24, 2.0**-150), "f16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-134)}
NAMES = tuple(DTYPES)


def draw(seed: object, name: str, *shape: int, scale: float = 1.0) -> tuple[Array, Array]:
    """Gaussian values in the kernel's type, and the same in float64."""
    x = (scale * np.random.default_rng(seed).standard_normal(shape)).astype(DTYPES[name])  # type: ignore[arg-type]
    return x, x.astype(np.float64)


def stored(name: str, expected: Array, computed: Array | float) -> Array:
    """The bound `computed` of float32 arithmetic, plus one rounding to the output type."""
    u, least = OUT[name]
    bound: Array = computed + u * (np.abs(expected) + computed) + least
    return bound


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("D", [1, 31, 64, 127, 128, 129, 256, 1000])
def test_rms_norm(name: str, D: int) -> None:
    x, x64 = draw([1, D], name, 5, D, scale=3.0)
    x[1] *= 0
    x64[1] = 0
    weight, w64 = draw([2, D], name, D)
    actual = host.rms_norm(x, weight, 1e-6, schedule_seed=D)
    expected = x64 / np.sqrt(np.square(x64).mean(axis=-1, keepdims=True) + 1e-6) * w64
    # γ/2 from the sum under the root; root, division, eps in float32 and two products. Fact sheet: RMSNorm.
    assert_within(actual, expected, stored(name, expected, (D / 2 + 8) * U32 * np.abs(expected)), f"{name} D {D}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("S", [1, 31, 32, 33, 127, 128, 129, 300])
def test_softmax(name: str, S: int) -> None:
    x, x64 = draw([3, S], name, 6, S, scale=4.0)
    mask = np.random.default_rng(S).random((6, S)) < 0.7
    mask[0] = False
    mask[1] = True
    for shown, scale in ((None, 1.0), (mask, 0.125)):
        actual = host.softmax(x, shown, scale)
        expected, bound = softmax64(x64, np.ones_like(mask) if shown is None else shown, scale)
        assert_within(actual, expected, stored(name, expected, bound), f"{name} S {S}")
        if shown is not None:
            assert not actual[~shown].any()


def softmax64(x: Array, shown: Array, scale: float) -> tuple[Array, Array]:
    """Softmax over what is shown, and the bound: score and difference round, exp, sum and quotient."""
    s = np.where(shown, x * scale, -np.inf)
    largest = np.where(shown.any(axis=-1, keepdims=True), s.max(axis=-1, keepdims=True), 0.0)
    e = np.exp(s - largest)
    total = e.sum(axis=-1, keepdims=True)
    expected = np.divide(e, total, out=np.zeros_like(e), where=total > 0)
    shift = np.where(shown, np.abs(x * scale) + 2 * np.abs(largest), 0.0)
    return expected, (2 * shift.max(axis=-1, keepdims=True) + 2 * x.shape[-1] + 8) * U32 * expected


@pytest.mark.parametrize("offset", [0.0, -1e5, 1e5, 3e38])
def test_softmax_of_a_shifted_row(offset: float) -> None:
    """A row moved as a whole by any amount: equal scores stay equal, and the largest finite ones don't overflow."""
    x = np.full((2, 40), offset, np.float32)
    x[1, 7:] = -3e38
    expected = np.full((2, 40), 1 / 40)
    expected[1] = np.where(np.arange(40) < 7, 1 / 7, 0.0)
    assert_within(host.softmax(x), expected, 1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("heads", "D", "positions"), [(1, 2, [0]), (2, 64, [5, 6, 7]), (3, 66, [300, 2]), (1, 130, [40000, -3])]
)
def test_rope(name: str, heads: int, D: int, positions: list[int]) -> None:
    """Positions in any order, as a batch of rows has them; below 0 in a row's padding."""
    x, x64 = draw([4, D], name, len(positions), heads, D)
    theta = 10000.0
    at = np.array(positions, np.int32)
    actual = host.rope(x, at, theta)
    half = D // 2
    angle = at[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x64[..., :half], x64[..., half:]
    expected = np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], axis=-1)
    # The exponent rounds (times ln theta), pow and the product with the position: an error of the angle. Then sines
    # and three operations, of the pair's length.
    relative = (np.log(theta) + 4) * U32
    length = np.tile(np.hypot(a, b), 2)
    bound = length * (np.abs(np.tile(np.broadcast_to(angle, a.shape), 2)) * relative + 8 * U32)
    assert_within(actual, expected, stored(name, expected, bound), f"{name} D {D} positions {positions}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("F", [1, 127, 128, 129, 300])
def test_swiglu(name: str, F: int) -> None:
    gate, g = draw([5, F], name, 2, 3, F, scale=6.0)
    up, u = draw([6, F], name, 2, 3, F, scale=6.0)
    gate.reshape(-1)[0] = g.reshape(-1)[0] = -100.0
    weights = np.random.default_rng(F).random((2, 3)).astype(np.float32)
    for limit, weight in ((None, None), (7.0, None), (2.5, weights)):
        actual = host.swiglu(gate, up, limit, weight)
        c, d = (g, u) if limit is None else (np.minimum(g, limit), np.clip(u, -limit, limit))
        expected = c / (1 + np.exp(-c)) * d * (1.0 if weight is None else weight[..., None].astype(np.float64))
        # exp (1), sum, quotient and three products; e^-100 is subnormal in float32.
        bound = 10 * U32 * np.abs(expected) + 2.0**-149 * 1e4
        assert_within(actual, expected, stored(name, expected, bound), f"{name} F {F} limit {limit}")


def scores64(logits: Array, scoring: str) -> Array:
    x = logits.astype(np.float64)
    if scoring == "sqrtsoftplus":
        return np.sqrt(np.logaddexp(0, x))
    if scoring == "sigmoid":
        return 1 / (1 + np.exp(-x))
    if scoring == "softmax":
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return np.asarray(e / e.sum(axis=-1, keepdims=True))
    return x


def route64(
    logits: Array, bias: Array | None, K: int, scoring: str, normalise: bool, factor: float
) -> tuple[Array, Array]:
    scores = scores64(logits, scoring)
    selected = scores if bias is None else scores + bias
    ids = np.argsort(-selected, axis=-1, kind="stable")[:, :K]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if scoring == "topk_softmax":
        weights = np.exp(weights - weights[:, :1])
        return ids, weights / weights.sum(axis=-1, keepdims=True) * factor
    if normalise:
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / (np.maximum(total, 6.1e-5) if scoring == "sqrtsoftplus" else total + 1e-20)
    return ids, weights * factor


@pytest.mark.parametrize("scoring", ops.SCORING)
@pytest.mark.parametrize(("E", "K"), [(1, 1), (16, 6), (32, 32), (33, 8), (256, 6), (1000, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_router(scoring: str, E: int, K: int, biased: bool) -> None:
    rng = np.random.default_rng([E, K])
    logits = (4 * rng.standard_normal((9, E))).astype(np.float32)
    # Cold rows: float32 loses 1 + eˣ below −16.6, so scores that go through it tie.
    logits[0] = rng.uniform(-30, -15, E)
    logits[1] = rng.uniform(-80, -60, E)
    logits[2] = rng.uniform(15, 30, E)
    bias = (0.1 * rng.standard_normal(E)).astype(np.float32) if biased else None
    for normalise, factor in ((True, 1.5), (False, 1.0)):
        ids, weights = host.route(logits, bias, K, scoring, normalise=normalise, factor=factor)
        expected_ids, expected = route64(logits, bias, K, scoring, normalise, factor)
        assert ids.dtype == np.int32
        scores = scores64(logits, scoring)
        selected = scores if bias is None else scores + bias
        # Selected scores are those of the expected ids to rounding; where none is that close, so are the ids.
        close = 16 * U32 * np.maximum(np.abs(selected).max(axis=-1, keepdims=True), 1e-30)
        picked, best = (np.take_along_axis(selected, i, axis=-1) for i in (ids, expected_ids))
        assert (np.abs(picked - best) <= close).all()
        clear = np.diff(np.sort(selected, axis=-1), axis=-1).min(axis=-1, initial=np.inf) > 2 * close[:, 0]
        assert np.array_equal(ids[clear], expected_ids[clear])
        assert all(len(set(row)) == K for row in ids.tolist())
        same = (ids == expected_ids).all(axis=-1)
        assert same.mean() > 0.5
        # Softmax: exponents' roundoff; the sum of E or K terms; a few operations.
        spread = np.ptp(logits, axis=-1)[same, None] if "softmax" in scoring else 0.0
        bound = (2 * spread + E + K + 24) * U32 * np.abs(expected[same])
        assert_within(weights[same], expected[same], bound, f"{scoring} E {E}")


def test_cold_experts_keep_their_order() -> None:
    """Logits below −16.6 differ, so their softplus scores do: 1 + eˣ taken in float32 would make them one tie."""
    logits = np.linspace(-40, -20, 64, dtype=np.float32)[None, :]
    ids, weights = host.route(logits, None, 6, "sqrtsoftplus", normalise=False)
    assert ids[0].tolist() == [63, 62, 61, 60, 59, 58]
    assert_within(weights, np.exp(logits[:, ids[0]].astype(np.float64) / 2), 1e-6 * weights)


@pytest.mark.parametrize("scoring", ops.SCORING)
def test_ties_go_to_the_lowest_id(scoring: str) -> None:
    E = 70
    logits = np.zeros((3, E), np.float32)
    logits[1, [5, 37, 69, 2, 40]] = 1.0
    logits[2, ::2] = -0.0
    ids, weights = host.route(logits, None, 8, scoring)
    assert ids[0].tolist() == list(range(8))
    assert ids[1].tolist() == [2, 5, 37, 40, 69, 0, 1, 3]
    assert ids[2].tolist() == list(range(8))
    assert_within(weights[0], np.full(8, 1 / 8), 1e-6)
    # A bias that makes unequal scores equal, exactly: 1 + 0 and 0.5 + 0.5.
    if scoring == "topk_softmax":
        logits[0, :] = -5
        logits[0, [60, 3]] = 1.0, 0.5
        bias = np.zeros(E, np.float32)
        bias[3] = 0.5
        assert host.route(logits[:1], bias, 2, scoring)[0].tolist() == [[3, 60]]


def test_logits_that_are_no_numbers_rank_last() -> None:
    logits = np.full((2, 40), np.nan, np.float32)
    logits[0, [39, 11]] = -np.inf, 2.0
    ids, _ = host.route(logits, None, 4, "topk_softmax")
    assert ids[0, 0] == 11
    assert all(len(set(row)) == 4 and 0 <= min(row) <= max(row) < 40 for row in ids.tolist())


def attention64(q: Array, k: Array, v: Array, scale: float, shown: Array, sinks: Array | None) -> tuple[Array, Array]:
    """(B, Hq, Dv) and its bound. Fact sheet: attention, centred on the output.

    A score is off by γ of Dk (+ the query's scaling) of Σ|q||k|·scale. Each key rescales the running sums once, so a
    term meets up to 2S + 8 roundoffs.
    """
    r = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, r, axis=1), np.repeat(v, r, axis=1)
    S = k.shape[2]
    s = np.einsum("bhd,bhsd->bhs", q, k) * scale
    delta = (q.shape[2] + 3) * U32 * np.einsum("bhd,bhsd->bhs", np.abs(q), np.abs(k)) * scale
    s = np.where(shown[:, None], s, -np.inf)
    sink = np.full(q.shape[:2], -np.inf) if sinks is None else np.broadcast_to(sinks.astype(np.float64), q.shape[:2])
    largest = np.maximum(s.max(axis=-1), sink)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    e = np.exp(s - largest[..., None])
    total = e.sum(axis=-1) + np.exp(sink - largest)
    p = np.divide(e, total[..., None], out=np.zeros_like(e), where=total[..., None] > 0)
    o = np.einsum("bhs,bhsd->bhd", p, v)
    away = np.abs(v - o[..., None, :])
    # exp's argument rounds too: |s − largest| roundoffs of the weight.
    off = delta + U32 * np.where(p > 0, np.abs(np.where(p > 0, s, 0) - largest[..., None]) + 4, 0)
    bound = np.einsum("bhs,bhsd->bhd", p * off, away) * (1 + off.max(axis=-1, initial=0))[..., None]
    return o, 1.1 * bound + (2 * S + 8) * U32 * np.einsum("bhs,bhsd->bhd", p, np.abs(v))


ATTENTION = [
    # B, Hq, Hkv, S, Dk, Dv
    (1, 1, 1, 1, 64, 64),
    (2, 8, 2, 3, 64, 64),
    (2, 4, 4, 33, 32, 48),
    (1, 4, 1, 70, 128, 128),
    (3, 6, 3, 129, 72, 40),
    (1, 2, 1, 40, 256, 256),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention(name: str, shape: tuple[int, int, int, int, int, int]) -> None:
    B, Hq, Hkv, S, Dk, Dv = shape
    rng = np.random.default_rng(shape)
    (q, q64), (k, k64), (v, v64) = (
        draw([*shape, i], name, *dims) for i, dims in enumerate([(B, Hq, Dk), (B, Hkv, S, Dk), (B, Hkv, S, Dv)])
    )
    scale = float(np.float32(Dk**-0.5))
    mask = rng.random((B, S)) < 0.6
    mask[0, : S // 2] = False
    sinks = (2 * rng.standard_normal(Hq)).astype(np.float32)
    everything = np.ones((B, S), bool)
    for given, sink, window in (
        (None, None, None),
        (mask, None, None),
        (mask, sinks, None),
        (None, sinks, 1),
        (mask, sinks, 7),
        (None, None, S + 5),
        (~everything, None, None),
        (~everything, sinks, None),
    ):
        shown = (everything if given is None else given) & (np.arange(S) > S - 1 - (window or S))
        actual = host.attention(q, k, v, scale=scale, mask=given, sinks=sink, window=window, schedule_seed=S)
        expected, bound = attention64(q64, k64, v64, scale, shown, sink)
        assert_within(actual, expected, stored(name, expected, bound), f"{name} {shape} window {window}")


def test_a_strong_sink_takes_all_and_a_weak_one_nothing() -> None:
    q, _ = draw(7, "f32", 1, 2, 32)
    k, _ = draw(8, "f32", 1, 1, 9, 32)
    v, _ = draw(9, "f32", 1, 1, 9, 32)
    plain = host.attention(q, k, v, scale=0.2)
    sinks = np.array([-1e30, 1e30], np.float32)
    actual = host.attention(q, k, v, scale=0.2, sinks=sinks)
    assert np.array_equal(actual[:, 0], plain[:, 0])
    assert not actual[:, 1].any()
    # A sink of 0 is a key of score 0, which is not nothing.
    assert not np.array_equal(host.attention(q, k, v, scale=0.2, sinks=np.zeros(2, np.float32)), plain)


def test_scores_far_below_zero_are_still_a_softmax() -> None:
    """All scores below −33000: a running maximum that starts at float16's least would drop every key."""
    q = np.full((1, 1, 32), 100.0, np.float32)
    k = np.full((1, 1, 6, 32), -100.0, np.float32)
    v, v64 = draw(10, "f32", 1, 1, 6, 32)
    actual = host.attention(q, k, v, scale=1.0)
    assert_within(actual, v64.mean(axis=2), 1e-6)


def test_keys_outside_window_and_mask_do_not_matter() -> None:
    q, _ = draw(11, "f32", 2, 4, 64)
    k, _ = draw(12, "f32", 2, 2, 20, 64)
    v, _ = draw(13, "f32", 2, 2, 20, 64)
    mask = np.ones((2, 20), bool)
    mask[1, 17] = False
    before = host.attention(q, k, v, scale=0.1, mask=mask, window=6)
    k[:, :, :14] = v[:, :, :14] = np.nan
    k[1, :, 17] = v[1, :, 17] = np.nan
    assert np.array_equal(host.attention(q, k, v, scale=0.1, mask=mask, window=6), before)
    k[:, :, 14] += 1
    assert not np.array_equal(host.attention(q, k, v, scale=0.1, mask=mask, window=6), before)


def test_checked_runs_are_clean() -> None:
    """Rows of two lengths, so that some threads of a threadgroup have nothing to do."""
    x, _ = draw(14, "f32", 3, 70)
    host.rms_norm(x, x[0], 1e-6, checked=True, schedule_seed=1)
    host.softmax(x, x > -1, checked=True, schedule_seed=1)
    host.swiglu(x, x, 1.0, x[:, 0], checked=True)
    host.rope(x.reshape(3, 1, 70), np.arange(3, 6), 10000.0, checked=True)
    host.route(x, x[0], 6, "softmax", checked=True, schedule_seed=1)
    k, _ = draw(15, "f32", 3, 1, 9, 70)
    mask = np.arange(9) != 3
    sinks = np.zeros(1, np.float32)
    host.attention(x[:, None], k, k, scale=0.1, mask=np.tile(mask, (3, 1)), sinks=sinks, checked=True, schedule_seed=1)


def test_what_does_not_fit_is_refused() -> None:
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="weight"):
        host.rms_norm(x, x[0, :3], 1e-6)
    with pytest.raises(ValueError, match="is not of the shape of x"):
        host.softmax(x, np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="head_dim is 3; RoPE pairs its halves"):
        host.rope(np.zeros((1, 1, 3), np.float32), np.zeros(1), 1e4)
    with pytest.raises(ValueError, match="one for each of 2 tokens"):
        host.rope(np.zeros((2, 1, 4), np.float32), np.zeros(1), 1e4)
    with pytest.raises(ValueError, match="are not one a row"):
        host.swiglu(x, x, weights=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="top_k is 5 of 4 experts"):
        host.route(x, None, 5, "softmax")
    with pytest.raises(ValueError, match="1025 experts; kernel_router has room for 1024"):
        host.route(np.zeros((1, 1025), np.float32), None, 5, "softmax")
    with pytest.raises(ValueError, match="heads of 257 and 8; kernel_attention has room for 256"):
        host.attention(
            np.zeros((1, 1, 257), "f"), np.zeros((1, 1, 2, 257), "f"), np.zeros((1, 1, 2, 8), "f"), scale=1.0
        )
    with pytest.raises(ValueError, match="float64 operands have no kernel"):
        host.softmax(x.astype(np.float64))
