"""The quantisers against the gguf package's dequantiser, against a direct search, and at the edges of float16.

gguf decides what a block's bytes mean; whether the search is a good one is decided by comparing it with simple rounding
and, for small cases, with all there is to choose from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import IQ2_XXS, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.quantize import QUANTIZERS, fit, quantize
from engine.quantize import main as print_losses
from engine.quantize_k import ordered_sum

Array = np.ndarray[Any, np.dtype[Any]]

# Relative L2 on Gaussian values: measured 0.0049, 0.0697, 0.2620, 0.3271 (engine/quantize.py's table) plus 2%.
LOSSES = {"Q8_0": 0.0050, "Q4_K": 0.0711, "Q2_K": 0.2672, "IQ2_XXS": 0.3337}
KINDS = tuple(QUANTIZERS)


def decode(blocks: Array, kind: str) -> Array:
    values: Array = dequantize(blocks, GGMLQuantizationType[kind])
    return values


def gaussian(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def loss(actual: Array, expected: Array) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.02, 3e-6, 1e4])
def test_blocks_decode_to_what_was_meant(kind: str, scale: float) -> None:
    x = gaussian(1, 3, 5, 512) * np.float32(scale)
    found = fit(x, kind)
    assert found.blocks.dtype == np.uint8
    assert found.blocks.shape == (3, 5, 512 // QUANTIZERS[kind][0] * QUANTIZERS[kind][1])
    assert found.values.dtype == np.float32
    assert np.array_equal(decode(found.blocks, kind), found.values)
    assert np.array_equal(quantize(x, kind), found.blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_what_is_stated(kind: str) -> None:
    x = gaussian(2, 256, 1024)
    assert loss(fit(x, kind).values, x) < LOSSES[kind]
    # Values of any magnitude lose the same until their scales come near float16's subnormals (d < 2⁻¹⁴).
    assert loss(fit(x[:16] * np.float32(2.0**12), kind).values, x[:16] * np.float32(2.0**12)) < 1.02 * LOSSES[kind]


def rounded_to_nearest(x: Array, kind: str) -> Array:
    """No search: the run's range cut into equal steps, in exact arithmetic with scales of unlimited precision."""
    run, top = {"Q4_K": (32, 15), "Q2_K": (16, 3)}[kind]
    runs = x.reshape(-1, run).astype(np.float64)
    low = np.minimum(runs.min(axis=-1, keepdims=True), 0)
    step = (runs.max(axis=-1, keepdims=True) - low) / top
    return np.asarray((np.rint((runs - low) / step) * step + low).reshape(x.shape))


@pytest.mark.parametrize("kind", ["Q4_K", "Q2_K"])
def test_the_search_beats_rounding_with_exact_scales(kind: str) -> None:
    x = gaussian(3, 64, 1024)
    assert loss(fit(x, kind).values, x) < 0.97 * loss(rounded_to_nearest(x, kind), x)


def test_q8_0_loses_no_more_than_the_gguf_packages() -> None:
    x = gaussian(4, 64, 1024)
    expected = dequantize(_gguf_q8_0(x), GGMLQuantizationType.Q8_0)
    assert loss(fit(x, "Q8_0").values, x) <= loss(expected, x)


def _gguf_q8_0(x: Array) -> Array:
    from gguf.quants import quantize as gguf_quantize

    blocks: Array = gguf_quantize(x, GGMLQuantizationType.Q8_0)
    return blocks


def test_iq2_xxs_takes_the_nearest_point_and_signs() -> None:
    """Against every one of 256 points × 128 sets of signs, at the scale of each block's own result."""
    x = gaussian(5, 2, 256)
    found = fit(x, "IQ2_XXS")
    IQ2_XXS.init_grid()
    assert IQ2_XXS.grid is not None
    signs = 1.0 - 2 * np.unpackbits(np.frombuffer(IQ2_XXS.ksigns, np.uint8)[:, None], axis=1, bitorder="little")
    choices = (IQ2_XXS.grid.reshape(256, 1, 8) * signs).reshape(-1, 8)
    words = found.blocks[:, 2:].copy().view(np.uint32).reshape(2, 8, 2)[..., 1]
    d = found.blocks[:, :2].copy().view(np.float16).astype(np.float64)
    step = np.repeat((d * (0.5 + (words >> 28)) * 0.25).ravel(), 4)
    for h, vector, chosen in zip(step, x.reshape(-1, 8), found.values.reshape(-1, 8), strict=True):
        best = np.square(h * choices - vector).sum(axis=-1).min()
        assert np.square(chosen - vector).sum() <= best * (1 + 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_values_stay_as_they_are(kind: str) -> None:
    x = gaussian(6, 64, 1024) * np.float32(0.02)
    once = fit(x, kind).values
    assert np.array_equal(fit(once, kind).values, once)


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1 << 16),
    exponent=st.integers(-30, 9),
    sparse=st.sampled_from([0.0, 0.5, 0.95]),
    levels=st.sampled_from([0, 1, 2, 5]),
    shift=st.sampled_from([0.0, 1.0, -3.0]),
)
@settings(max_examples=150)
def test_any_values_are_described(
    kind: str, seed: int, exponent: int, sparse: float, levels: int, shift: float
) -> None:
    """Sparse rows, rows of few levels, one-sided rows, scales down to float16's subnormals and below."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 256)) + shift
    x = np.rint(x * levels) if levels else x
    x = np.where(rng.random(x.shape) < sparse, 0, x) * 2.0**exponent
    once = fit(x.astype(np.float32), kind)
    assert np.array_equal(decode(once.blocks, kind), once.values)
    # Zeros, few distinct values and scales near float16's subnormals have many near descriptions: those may move.
    if not sparse and not levels and exponent > -8:
        assert np.array_equal(fit(once.values, kind).values, once.values)
    # Never worse than all zeros, which every format can say.
    assert np.square(once.values - x).sum() <= np.square(x).sum() * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: str) -> None:
    x = np.zeros((2, 256), np.float32)
    assert not fit(x, kind).values.any()
    x[1] = gaussian(7, 256)
    found = fit(x, kind).values
    assert not found[0].any()
    assert found[1].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.7, -0.7, 3e-4, -2e3])
def test_constant_blocks_keep_their_value(kind: str, value: float) -> None:
    """To float16's precision; IQ2_XXS has no constant vector of odd sign and only its grid, but no sign is lost."""
    found = fit(np.full((1, 256), value, np.float32), kind).values
    if kind == "IQ2_XXS":
        assert np.array_equal(np.sign(found), np.full((1, 256), np.sign(value)))
        return
    # Half an ulp of d in float16 where that is normal; Q8_0 and the K-quants keep d at |value|/945 or more.
    assert np.abs(found / value - 1).max() <= max(2.0**-11, 2.0**-25 * 945 / abs(value))


@pytest.mark.parametrize("kind", KINDS)
def test_scales_below_float16_lose_all_but_never_grow(kind: str) -> None:
    x = gaussian(8, 4, 256) * np.float32(1e-9)
    found = fit(x, kind).values
    assert np.array_equal(found, np.zeros_like(x))


@pytest.mark.parametrize("kind", KINDS)
def test_subnormal_scales_are_used(kind: str) -> None:
    """d of 2⁻²⁴ to 2⁻¹⁵: coarse steps, still far from nothing."""
    x = gaussian(9, 8, 256) * np.float32(2.0**-13)
    found = fit(x, kind)
    assert loss(found.values, x) < {"Q8_0": 0.2, "Q4_K": 0.2, "Q2_K": 0.4, "IQ2_XXS": 0.4}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_importance_draws_the_error_away(kind: str) -> None:
    x = gaussian(10, 64, 256)
    importance = np.where(np.arange(256) % 4 == 0, 30.0, 1.0)
    plain, weighed = (fit(x, kind, w).values - x for w in (None, importance))
    assert np.square(weighed[:, ::4]).sum() < 0.9 * np.square(plain[:, ::4]).sum()
    assert (importance * np.square(weighed)).sum() < (importance * np.square(plain)).sum()
    assert np.array_equal(fit(x[:4], kind, np.ones(256)).blocks, fit(x[:4], kind).blocks)


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ValueError, match="Q3_K blocks can't be written; one of Q8_0, Q4_K, Q2_K, IQ2_XXS is expected"):
        fit(np.zeros((1, 256)), "Q3_K")
    with pytest.raises(ValueError, match=r"Q4_K: a row of shape \(2, 255\) is not a whole number of blocks of 256"):
        fit(np.zeros((2, 255)), "Q4_K")
    x = np.zeros((2, 256), np.float32)
    x[1, 7] = np.nan
    with pytest.raises(ValueError, match=r"element \(1, 7\) is nan; only finite values can be quantised"):
        fit(x, "Q2_K")
    x[1, 7] = 1e7
    for kind in ("Q8_0", "Q4_K", "Q2_K"):
        with pytest.raises(ValueError, match=r"element \(1, 7\) is 10000000.0; beyond ±"):
            fit(x, kind)
    with pytest.raises(ValueError, match="importance has entries that are negative or not finite"):
        fit(np.ones((1, 256)), "Q4_K", -np.ones(256))


@pytest.mark.parametrize(("kind", "largest"), [("Q8_0", 8.3e6), ("Q4_K", 4.1e6), ("Q2_K", 9.8e5), ("IQ2_XXS", 5e6)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_magnitudes_still_fit(kind: str, largest: float, sign: int) -> None:
    x = np.zeros((1, 256), np.float32)
    x[0, :64] = sign * np.float32(largest)
    found = fit(x, kind)
    assert np.isfinite(found.values).all()
    assert np.array_equal(decode(found.blocks, kind), found.values)
    # IQ2_XXS's grid has no point near a constant vector of eight.
    assert loss(found.values, x) < (0.5 if kind == "IQ2_XXS" else 0.001)


def test_losses_can_be_measured_anew(capsys: pytest.CaptureFixture[str]) -> None:
    print_losses([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(KINDS)
    for line in lines[1:]:
        kind, measured = line.split()[:2]
        assert 0.9 * LOSSES[kind] < float(measured) < LOSSES[kind]


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 32, 256])
def test_sums_are_added_by_halves_whatever_the_processor(n: int) -> None:
    values = np.random.default_rng(n).standard_normal((3, n, 5)).astype(np.float32)

    def halves(row: list[np.float32]) -> np.float32:
        while len(row) > 1:
            half, odd = len(row) // 2, row[len(row) // 2 * 2 :]
            row = [a + b for a, b in zip(row[:half], row[half : 2 * half], strict=True)] + odd
        return row[0]

    expected = [[halves(list(values[i, :, j])) for j in range(5)] for i in range(3)]
    assert np.array_equal(ordered_sum(values, 1)[:, 0], np.array(expected))
