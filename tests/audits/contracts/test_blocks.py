"""Blocks as weights: decoded exactly, and given to candidates that take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from audits.blocks import FORMATS, decode, random_blocks
from audits.candidate import Candidate, load
from audits.contracts.moe_matmul import CONTRACT
from audits.verdict import Verdict
from engine.kquants import dequantize

Array = Any
MUTANTS = Path(__file__).parents[2] / "mutants" / "moe_matmul"
SMALL = replace(CONTRACT, corpus=lambda full: iter(()), examples=0)
honest = load(f"{MUTANTS}/numpy_blocks.py:candidate")


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_are_decoded_exactly(kind: str) -> None:
    blocks = random_blocks(kind, (2, 3), 512, np.random.default_rng(0))
    values, magnitude = decode(blocks, kind)
    assert values.shape == magnitude.shape == (2, 3, 512)
    rounded = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(values.astype(np.float32), rounded)
    np.testing.assert_array_equal(dequantize(blocks, kind), rounded)
    assert (magnitude >= np.abs(values)).all()
    assert bool((magnitude > np.abs(values)).any()) == (FORMATS[kind].dmin is not None)


@pytest.mark.parametrize("kind", FORMATS)
def test_random_blocks_vary_in_every_byte(kind: str) -> None:
    blocks = random_blocks(kind, (64,), FORMATS[kind].elements, np.random.default_rng(0))
    assert all(len(np.unique(column)) > 1 for column in blocks.T)


def judged(function: Callable[..., Any]) -> list[Verdict]:
    return list(SMALL.audit(Candidate(function=function, framework="numpy", name="test")))


def formats(verdicts: list[Verdict]) -> set[str]:
    return {v.case["format"] for v in verdicts if v.outcome == "pass" and v.case["format"]}


def test_a_candidate_that_knows_of_no_blocks_is_given_none() -> None:
    verdicts = judged(lambda x, w, ids: honest(x, w, ids))
    assert {v.outcome for v in verdicts} == {"pass", "skipped"}
    assert not formats(verdicts)
    assert [v.message for v in verdicts if v.outcome == "skipped"] == [
        "the candidate takes no format: what needs it is left out"
    ]


def test_formats_that_a_candidate_refuses_are_left_out_and_said() -> None:
    def only_q4_k(x: Array, w: Array, ids: Array, *, format: str | None = None) -> Array:
        if format not in (None, "Q4_K"):
            raise ValueError(f"no {format} here")
        return honest(x, w, ids, format=format)

    verdicts = judged(only_q4_k)
    assert formats(verdicts) == {"Q4_K"}
    said = [v.message for v in verdicts if v.outcome == "skipped"]
    assert said[0] == "format=Q8_0 is left out in float32: the candidate raised ValueError: no Q8_0 here"
    assert len(said) == 9, "three formats in three dtypes"


def test_dtypes_that_are_not_the_first_get_ordered_pairs_too() -> None:
    candidate = Candidate(function=honest, framework="numpy", name="test", dtypes=("float16",))
    assert any(v.case["relation"].startswith("after ") for v in SMALL.audit(candidate))


def test_a_case_of_blocks_tells_its_elements_and_replays_with_them() -> None:
    def scaled(x: Array, w: Array, ids: Array, *, format: str | None = None) -> Array:
        return honest(x, w, ids, format=format) * (1.5 if format == "Q4_K" else 1)

    candidate = Candidate(function=scaled, framework="numpy", name="test", dtypes=("float32",))
    verdicts = list(SMALL.audit(candidate))
    assert {v.case["K"] % FORMATS[v.case["format"]].elements for v in verdicts if v.case.get("format")} == {0}
    shrunk = next(v for v in verdicts if v.evidence.get("shrunk"))
    assert (shrunk.case["format"], shrunk.case["K"], shrunk.case["M"]) == ("Q4_K", 256, 1)
    again = CONTRACT.replay(shrunk.case, candidate)
    assert (again.message, again.evidence["digest"]) == (shrunk.message, shrunk.evidence["digest"])
