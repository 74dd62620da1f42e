"""quantized_sdpa's contract: its operands are what their codes say, and relations see faults of packed tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audits import affine
from audits.candidate import Candidate, load
from audits.contract import Relation
from audits.contracts.quantized_sdpa import BITS, CONTRACT, GROUPS, quantised
from audits.domain import filled
from audits.sweep import Sweep

FOLDER = Path(__file__).parents[2] / "mutants" / "quantized_sdpa"
HONEST: Callable[..., Any] = load(f"{FOLDER / 'numpy_dequantised.py'}:candidate")


def verdict(function: Callable[..., Any], base: int, **fields: Any) -> Any:
    case = {**filled(CONTRACT.domain, {**CONTRACT.bases[base], "dtype": "float32"}), "relation": "", **fields}
    candidate = Candidate(function=function, framework="numpy", name="test")
    return Sweep(CONTRACT, candidate, shrinking=False).verdict(case)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_codes_stand_for_the_numbers_within_half_a_step(bits: int, group: int) -> None:
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((2, 1, 3, 128))
    codes, scales, biases = quantised(x, group, bits, rng, np.float32)
    assert (codes.shape, scales.shape) == ((2, 1, 3, 128 * bits // 32), (2, 1, 3, 128 // group))
    values, magnitude = affine.decode(codes, scales, biases, bits)
    step = np.repeat(np.abs(scales.astype(np.float64)), group, axis=-1)
    assert (np.abs(values - x) <= step * 0.51).all()
    assert (magnitude >= np.abs(values) - 1e-12).all()
    assert (scales < 0).any()
    assert (scales > 0).any()


def test_mlx_reads_the_same_numbers_from_the_same_words() -> None:
    mx = pytest.importorskip("mlx.core")
    rng = np.random.default_rng(3)
    for bits, group in ((8, 64), (4, 32), (2, 128), (6, 64), (3, 32)):
        packed = quantised(rng.standard_normal((1, 2, 3, 128)), group, bits, rng, np.float32)
        theirs = mx.dequantize(*(mx.array(part) for part in packed), group_size=group, bits=bits)
        ours, _ = affine.decode(*packed, bits)
        assert np.abs(np.array(theirs) - ours).max() < 1e-5


@pytest.mark.parametrize("relation", CONTRACT.relations, ids=lambda relation: relation.name)
def test_honest_code_keeps_every_relation(relation: Relation) -> None:
    bases = [i for i, base in enumerate(CONTRACT.bases) if relation.applies(filled(CONTRACT.domain, base))]
    assert bases
    for base in bases:
        assert verdict(HONEST, base, relation=relation.name, dtype="float16").outcome == "pass"


def test_a_leak_of_hidden_tokens_and_an_unread_word_are_seen() -> None:
    def leaking(q: Any, keys: Any, values: Any, **options: Any) -> Any:
        return HONEST(q, keys, values, **options) + np.float32(1e-2 * keys[1].mean())

    def unread(q: Any, keys: Any, values: Any, **options: Any) -> Any:
        codes = values[0].copy()
        codes[..., -1] = 0
        return HONEST(q, keys, (codes, *values[1:]), **options)

    assert verdict(leaking, 2, relation="masked key").evidence["check"] == "masked key"
    assert verdict(unread, 0, relation="every element counts").evidence["check"] == "every element counts"
    assert verdict(unread, 0).evidence["check"] == "values"


def test_rounding_the_numbers_to_half_first_is_allowed_and_to_eight_bits_again_is_not() -> None:
    def remade(narrow: Callable[[Any], Any]) -> Callable[..., Any]:
        def candidate(q: Any, keys: Any, values: Any, *, scale: float, group_size: int, bits: int) -> Any:
            (k, _), (v, _) = affine.decode(*keys, bits), affine.decode(*values, bits)
            k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, narrow(v)))
            scores = (q.astype(np.float64) * scale) @ k.swapaxes(-1, -2)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            return (weights / weights.sum(-1, keepdims=True) @ v).astype(q.dtype)

        return candidate

    def eight(v: Any) -> Any:
        step = np.abs(v).max(-1, keepdims=True) / 127
        return np.rint(v / step) * step

    assert verdict(remade(lambda v: v.astype(np.float16).astype(np.float64)), 0, dtype="float16").outcome == "pass"
    assert verdict(remade(eight), 0).outcome == "fail"
