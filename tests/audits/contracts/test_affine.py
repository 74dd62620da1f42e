"""MLX's affine quantisation in NumPy: the same words and weights as MLX's own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from audits.affine import BITS, GROUPS, decode, pack, unpack


@pytest.mark.parametrize("bits", BITS)
def test_codes_come_back(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 64))
    words = pack(codes, bits)
    assert words.dtype == np.uint32
    assert words.shape == (3, 64 * bits // 32)
    assert (unpack(words, bits) == codes).all()


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    assert pack(np.array([1, 2, 0, 0, 0, 0, 0, 15]), 4).tolist() == [0xF0000021]
    three = np.zeros(32, np.int64)
    three[10] = 7  # bits 30, 31 of one word and bit 0 of the next
    assert pack(three, 3).tolist() == [0xC0000000, 1, 0]


def test_codes_that_fill_no_words_are_refused() -> None:
    with pytest.raises(ValueError, match="7 codes of 4 bits don't fill whole 32-bit words"):
        pack(np.zeros(7, np.int64), 4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_words_and_weights_are_those_of_mlx(bits: int, group: int) -> None:
    w = np.random.default_rng(group).standard_normal((4, 256)).astype(np.float32)
    words, scales, biases = (np.array(part) for part in mx.quantize(mx.array(w), group_size=group, bits=bits))
    weights, magnitude = decode(words, scales, biases, bits)
    told = np.array(
        mx.dequantize(mx.array(words), mx.array(scales), mx.array(biases), group_size=group, bits=bits), np.float64
    )
    # One product and one sum in float32.
    assert (np.abs(weights - told) <= 2 * 2.0**-24 * magnitude).all()
    assert (np.abs(weights) <= magnitude).all()
    assert (pack(unpack(words, bits), bits) == words).all()
