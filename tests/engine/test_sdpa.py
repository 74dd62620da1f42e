"""Attention over dense and quantised keys against float64 NumPy, for every form of mask; and what faults would do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine import sdpa as module
from engine.sdpa import quantized_sdpa, sdpa

Array = np.ndarray[Any, np.dtype[Any]]
# Unit roundoffs. The CPU route rounds q·scale, the scores and the weights to the dtype, each once.
ROUNDOFF = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
SHAPES = [(2, 4, 2, 3, 5), (2, 4, 1, 3, 5), (1, 4, 4, 2, 6), (2, 8, 2, 1, 7), (2, 2, 2, 5, 3)]  # B, Hq, Hkv, L, S
MASKS = ["none", "causal", "bsl", "b11s", "1h1s", "bhls", "ls", "s", "hls", "l1", "hidden", "all hidden"]


@pytest.fixture(autouse=True)
def on_the_cpu() -> Any:
    with mx.stream(mx.cpu):
        yield


def expected(q: Array, k: Array, v: Array, scale: float, mask: Any, sinks: Array | None) -> Array:
    """o[b, h, i] by its definition, head by head, in float64."""
    B, Hq, L, _ = q.shape
    S = k.shape[2]
    out = np.zeros((B, Hq, L, v.shape[3]))
    if isinstance(mask, str):
        mask = np.array([[j <= i + S - L for j in range(S)] for i in range(L)])
    full = None if mask is None else np.broadcast_to(mask, (B, Hq, L, S))
    for b, h, i in itertools.product(range(B), range(Hq), range(L)):
        g = h // (Hq // k.shape[1])
        scores = k[b, g] @ q[b, h, i] * scale
        if full is not None:
            row = full[b, h, i]
            scores = np.where(row, scores, -np.inf) if row.dtype == np.bool_ else scores + row
        if np.all(scores < -1e300):
            continue
        sink = -np.inf if sinks is None else float(sinks[h])
        top = max(scores.max(), sink)
        weights = np.exp(scores - top)
        out[b, h, i] = weights @ v[b, g] / (weights.sum() + np.exp(sink - top))
    return out


def made(shape: tuple[int, ...], dtype: mx.Dtype, seed: int, D: int = 64, Dv: int = 32) -> tuple[mx.array, ...]:
    B, Hq, Hkv, L, S = shape
    rng = np.random.default_rng(seed)
    sizes = ((B, Hq, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv))
    return tuple(mx.array(rng.standard_normal(s).astype(np.float32)).astype(dtype) for s in sizes)


def mask_of(name: str, shape: tuple[int, ...], seed: int) -> Any:
    B, H, _, L, S = shape
    sizes = {"bsl": (B, 1, L, S), "b11s": (B, 1, 1, S), "1h1s": (1, H, 1, S), "bhls": (B, H, L, S), "ls": (L, S)}
    sizes |= {"s": (S,), "hls": (H, L, S), "l1": (L, 1), "hidden": (B, 1, L, S), "all hidden": (1, 1, 1, S)}
    if name == "none":
        return None
    if name == "causal":
        return "causal"
    mask = np.random.default_rng(seed).random(sizes[name]) > 0.4
    if name == "hidden":
        mask[-1, :, L // 2] = False
    elif name == "all hidden":
        mask[:] = False
    elif name == "l1":
        mask[-1] = True
    return mask


def wide(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def additive(mask: Array, seed: int) -> Array:
    bias = np.random.default_rng(seed).standard_normal(mask.shape)
    return np.where(mask, bias, -np.inf)


def close(actual: mx.array, wanted: Array, u: float, scale: float = 1.0) -> None:
    """Within a dozen roundings of the largest value: scores here are near 1, so each rounding is worth about u."""
    error = np.abs(wide(actual) - wanted).max()
    allowed = 12 * u * max(np.abs(wanted).max(), 1.0) * scale
    assert error <= allowed, f"off by {error:.2e}, {allowed:.2e} allowed"


Attend = Callable[..., mx.array]


def check(name: str, kind: str, shape: tuple[int, ...], dtype: mx.Dtype, sinks: bool, packed: int | None) -> None:
    q, k, v = made(shape, dtype, 1)
    mask = mask_of(name, shape, 2)
    if kind == "additive" and not isinstance(mask, str) and mask is not None:
        mask = additive(mask, 3)
    given: Any = mask if mask is None or isinstance(mask, str) else mx.array(mask)
    if isinstance(given, mx.array) and given.dtype != mx.bool_:
        given = given.astype(dtype)
        mask = wide(given)
    sigma = mx.array(np.linspace(-1, 2, shape[1]).astype(np.float32)).astype(dtype) if sinks else None
    if packed is None:
        actual = sdpa(q, k, v, scale=0.125, mask=given, sinks=sigma)
    else:
        keys, values = (tuple(mx.quantize(x, group_size=32, bits=packed)) for x in (k, v))
        actual = quantized_sdpa(q, keys, values, scale=0.125, mask=given, sinks=sigma, group_size=32, bits=packed)
        # The values of the codes in float64: dequantised in the dtype, they would be rounded once more.
        exact = [
            [keys[0], *(s.astype(mx.float32) for s in keys[1:])],
            [values[0], *(s.astype(mx.float32) for s in values[1:])],
        ]
        k, v = (mx.dequantize(*x, group_size=32, bits=packed) for x in exact)
    assert (actual.dtype, actual.shape) == (dtype, (*q.shape[:3], v.shape[3]))
    wanted = expected(wide(q), wide(k), wide(v), 0.125, mask, None if sigma is None else wide(sigma))
    # On the CPU the quantised route is in float32 and rounds its result once.
    close(actual, wanted, ROUNDOFF[dtype])
    hidden = wanted == 0
    assert np.all(wide(actual)[hidden] == 0), "a query that sees nothing gives exact zeros"


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("packed", [None, 8])
def test_every_mask(name: str, kind: str, packed: int | None) -> None:
    for shape, sinks, dtype in itertools.product(SHAPES, (False, True), ROUNDOFF):
        check(name, kind, shape, dtype, sinks, packed)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_every_width_of_codes(bits: int) -> None:
    for dtype in ROUNDOFF:
        check("bsl", "bool", SHAPES[0], dtype, True, bits)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_an_additive_mask_keeps_its_own_digits(dtype: mx.Dtype) -> None:
    """Biases such as −37.31 that the dtype of q would round to −37.25: the difference of two of them is the answer."""
    shape = (1, 2, 2, 2, 4)
    q, k, v = made(shape, dtype, 5)
    bias = np.array([-300.3, -300.05, -301.1, -300.7], np.float32)
    keys, values = (tuple(mx.quantize(x, group_size=32, bits=8)) for x in (k, v))
    for other in (mx.float32, mx.bfloat16 if dtype == mx.float16 else mx.float16):
        mask = mx.array(bias).astype(other)
        wanted = expected(wide(q), wide(k), wide(v), 0.125, wide(mask), None)
        close(sdpa(q, k, v, scale=0.125, mask=mask), wanted, ROUNDOFF[dtype])
        packed = quantized_sdpa(q, keys, values, scale=0.125, mask=mask, group_size=32, bits=8)
        assert np.abs(wide(packed) - wanted).max() < 0.05


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("fill", ["-inf", "lowest of float16", "lowest of float32"])
def test_what_hides_in_an_additive_mask(dtype: mx.Dtype, fill: str) -> None:
    fills = {"-inf": (-np.inf, mx.float32), "lowest of float16": (-65504.0, mx.float16)}
    value, own = fills.get(fill, (float(np.finfo(np.float32).min), mx.float32))
    q, k, v = made((2, 4, 2, 3, 5), dtype, 7)
    mask = np.zeros((3, 5), np.float32)
    mask[1], mask[2, 3:] = value, value
    for sinks in (None, mx.array([0.0, -1.0, 2.0, 30.0])):
        y = wide(sdpa(q, k, v, scale=0.125, mask=mx.array(mask).astype(own), sinks=sinks))
        sigma = None if sinks is None else wide(sinks)
        wanted = expected(wide(q), wide(k), wide(v), 0.125, mask > -1, sigma)
        close(mx.array(y), wanted, ROUNDOFF[dtype])
        assert np.all(y[:, :, 1] == 0)


def test_a_large_bias_is_no_mask() -> None:
    """−1e9 in float32 on every key is a shift of the row, which softmax doesn't see."""
    q, k, v = made((1, 2, 2, 1, 4), mx.float32, 8)
    shifted = sdpa(q, k, v, scale=0.0, mask=mx.full((1, 4), -1e9))
    assert np.abs(wide(shifted) - wide(v.mean(axis=2, keepdims=True))).max() < 1e-6


def test_no_keys_at_all() -> None:
    q, k, v = made((1, 2, 2, 3, 4), mx.float32, 9)
    y = sdpa(q, k[:, :, :0], v[:, :, :0], scale=1.0, sinks=mx.zeros(2))
    assert (y.shape, float(mx.abs(y).sum())) == ((1, 2, 3, 32), 0.0)


def test_rows_before_the_first_key_see_nothing() -> None:
    q, k, v = made((1, 2, 1, 5, 2), mx.float32, 10)
    packed = [tuple(mx.quantize(x, group_size=32, bits=8)) for x in (k, v)]
    for y in (
        sdpa(q, k, v, scale=1.0, mask="causal"),
        quantized_sdpa(q, *packed, scale=1.0, mask="causal", group_size=32, bits=8),
    ):
        assert [bool(mx.any(y[:, :, i] != 0)) for i in range(5)] == [False] * 3 + [True] * 2


def test_none_all_true_zeros_and_causal_agree_in_decode() -> None:
    """The same attention by four masks: on the CPU bit for bit, whichever branch each takes."""
    q, k, v = made((2, 4, 2, 1, 9), mx.float16, 11)
    packed = [tuple(mx.quantize(x, group_size=32, bits=8)) for x in (k, v)]
    masks = [None, "causal", mx.ones((1, 9), dtype=mx.bool_), mx.zeros((2, 1, 1, 9), dtype=mx.float16)]
    dense = [np.array(sdpa(q, k, v, scale=0.1, mask=m)) for m in masks]
    coded = [np.array(quantized_sdpa(q, *packed, scale=0.1, mask=m, group_size=32, bits=8)) for m in masks]
    for found in (dense, coded):
        assert all(np.array_equal(found[0], x) for x in found[1:])


def test_the_quantised_product_sums_in_float32() -> None:
    """512 equal weights of values 1: a running sum in bfloat16 sticks at 256 of them, or at half of the result."""
    S = 512
    q, k = mx.zeros((1, 1, 1, 32), dtype=mx.bfloat16), mx.zeros((1, 1, S, 32), dtype=mx.bfloat16)
    v = mx.ones((1, 1, S, 32), dtype=mx.bfloat16)
    keys, values = (tuple(mx.quantize(x, group_size=32, bits=8)) for x in (k, v))
    y = quantized_sdpa(q, keys, values, scale=1.0, group_size=32, bits=8)
    assert np.abs(wide(y) - 1).max() < 2.0**-7
    weights = mx.full((1, 1, 1, S), 1 / S, dtype=mx.bfloat16)
    naive = mx.quantized_matmul(weights, *values, transpose=False, group_size=32, bits=8)
    assert np.abs(wide(naive) - 1).max() > 0.1, "MLX's own sum has become exact: the widening isn't needed any more"


@pytest.mark.parametrize("mask", [mx.ones((3, 1, 5)) > 0, mx.ones((1, 1, 1, 1, 5)) > 0], ids=str)
def test_a_mask_that_does_not_fit_is_refused(mask: mx.array) -> None:
    q, k, v = made((1, 4, 2, 1, 5), mx.float32, 12)
    packed = [tuple(mx.quantize(x, group_size=32, bits=8)) for x in (k, v)]
    with pytest.raises(ValueError):
        mx.eval(sdpa(q, k, v, scale=1.0, mask=mask))
    with pytest.raises(ValueError, match="the mask has"):
        quantized_sdpa(q, *packed, scale=1.0, mask=mask, group_size=32, bits=8)


def test_other_names_and_odd_groups_are_refused() -> None:
    q, k, v = made((1, 4, 2, 1, 5), mx.float32, 13)
    with pytest.raises(ValueError, match="has a name"):
        sdpa(q, k, v, scale=1.0, mask="casual")
    packed = [tuple(mx.quantize(x, group_size=32, bits=8)) for x in (k, v)]
    with pytest.raises(ValueError, match="evenly"):
        quantized_sdpa(q[:, :3], *packed, scale=1.0, group_size=32, bits=8)


# Faults of published engines, planted: each must be seen by `check`.


def bool_mask_is_added(patch: pytest.MonkeyPatch) -> None:
    original = module._weights

    def wrong(scores: mx.array, mask: mx.array | None, *rest: Any) -> mx.array:
        return original(scores, None if mask is None else mask.astype(mx.float32), *rest)

    patch.setattr(module, "_weights", wrong)


def sinks_ignored(patch: pytest.MonkeyPatch) -> None:
    original = module._weights
    patch.setattr(module, "_weights", lambda scores, mask, sinks, how: original(scores, mask, None, how))


def first_rows_mask_for_all(patch: pytest.MonkeyPatch) -> None:
    original = module._grouped
    patch.setattr(module, "_grouped", lambda mask, *heads: original(mask[:1] if mask.ndim == 4 else mask, *heads))


def heads_mixed(patch: pytest.MonkeyPatch) -> None:
    original = module._grouped

    def wrong(mask: mx.array, Hkv: int, r: int) -> mx.array:
        grouped = original(mask, Hkv, r)
        return (
            grouped.reshape(grouped.shape[0], r, Hkv, *grouped.shape[3:]).swapaxes(1, 2)
            if mask.shape[1] > 1
            else grouped
        )

    patch.setattr(module, "_grouped", wrong)


def hidden_rows_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "_sees", lambda mask: mx.array(True))


def top_left_causal(patch: pytest.MonkeyPatch) -> None:
    original = module._fused

    def wrong(q: mx.array, k: mx.array, v: mx.array, *, mask: Any, **how: Any) -> mx.array:
        if isinstance(mask, str):
            mask = mx.arange(k.shape[2]) <= mx.arange(q.shape[2])[:, None]
        return original(q, k, v, mask=mask, **how)

    patch.setattr(module, "_fused", wrong)


@pytest.mark.parametrize(
    ("fault", "name", "sinks", "packed"),
    [
        (bool_mask_is_added, "bsl", False, 8),
        (sinks_ignored, "none", True, 8),
        (first_rows_mask_for_all, "bsl", False, 8),
        (heads_mixed, "1h1s", False, 8),
        (hidden_rows_left, "hidden", False, 8),
        (hidden_rows_left, "hidden", False, None),
        (top_left_causal, "causal", False, None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_seen(
    fault: Callable[[pytest.MonkeyPatch], None],
    name: str,
    sinks: bool,
    packed: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = (2, 8, 2, 3, 5)
    check(name, "bool", shape, mx.float32, sinks, packed)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check(name, "bool", shape, mx.float32, sinks, packed)
