"""The engine's own dequantisers against the gguf package's, bit for bit, on random and on extreme blocks."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as expected_values

from engine.kquants import FORMATS, dequantize
from tests.engine.tiny import BLOCKS, random_blocks


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("scale", [2e-3, 30.0, 6e-8])
def test_values_equal_the_gguf_packages(kind: str, scale: float) -> None:
    elements = BLOCKS[kind][0]
    blocks = random_blocks(np.random.default_rng(1), kind, (5, 3), 4 * elements, scale)
    actual = dequantize(blocks, kind)
    assert actual.shape == (5, 3, 4 * elements)
    assert actual.dtype == np.float32
    assert np.array_equal(actual, expected_values(blocks, GGMLQuantizationType[kind]))
    assert len(np.unique(actual)) > 100 or scale < 1e-6


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_bit_of_a_block_matters(kind: str) -> None:
    """Setting any bit but a scale's own moves some value, and the gguf package agrees which."""
    _, size, halves = BLOCKS[kind]
    base = random_blocks(np.random.default_rng(2), kind, (1,), BLOCKS[kind][0])
    flipped = np.repeat(base, 8 * size, axis=0)
    for bit in range(8 * size):
        flipped[bit, bit // 8] ^= 1 << bit % 8
    scales = [bit for bit in range(8 * size) if any(start <= bit // 8 < start + 2 for start in halves)]
    flipped = np.delete(flipped, scales, axis=0)
    actual = dequantize(flipped, kind)
    assert np.array_equal(actual, expected_values(flipped, GGMLQuantizationType[kind]))
    moved = (actual != dequantize(base, kind)).any(axis=-1)
    # A scale that multiplies zeros alone may hide a bit of its own, no more than that.
    assert moved.mean() > 0.99


def test_what_is_no_row_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="IQ1_S blocks can't be read; one of Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ2"):
        dequantize(np.zeros((1, 50), np.uint8), "IQ1_S")
    with pytest.raises(ValueError, match="Q4_K: rows of 143 uint8 are not whole blocks of 144 bytes"):
        dequantize(np.zeros((1, 143), np.uint8), "Q4_K")
    with pytest.raises(ValueError, match="rows of 144 int8 are not"):
        dequantize(np.zeros((1, 144), np.int8), "Q4_K")


def test_formats_have_ggmls_block_sizes() -> None:
    assert {kind: size for kind, (size, _) in FORMATS.items()} == {kind: size for kind, (_, size, _) in BLOCKS.items()}
