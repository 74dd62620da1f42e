"""The input domain of contracts: what cases may hold, what is drawn, and how a failing case is made smaller."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import Phase, given, seed, settings

from audits.domain import Case, Choice, Range, filled, residues, shrink, strategy

FIELDS = {"kind": Choice(("plain", "odd", "wild")), "K": Range(1, 300), "N": Range(0, 9), "limit": Choice((None, 7.0))}


def anything(case: Case) -> bool:
    return True


@pytest.mark.parametrize("modulus", [8, 32, 128])
def test_residues_give_every_length_every_residue_of_every_divisor(modulus: int) -> None:
    lengths = residues(modulus, 3, seed=0)
    assert len(lengths) == 3
    for length in lengths:
        assert sorted(length) == list(range(1, modulus + 1))
        for divisor in (8, 16, 32, 64, 128):
            if modulus % divisor == 0:
                assert {n % divisor for n in length} == set(range(divisor))
    assert len({tuple(length) for length in lengths}) == 3, "the lengths don't go in step"
    assert len({(a - b) % modulus for a, b in zip(*lengths[:2], strict=True)}) > modulus // 2, "differences vary too"


def test_residues_depend_on_the_seed_alone() -> None:
    assert residues(16, 2, seed=3) == residues(16, 2, seed=3)
    assert residues(16, 2, seed=3) != residues(16, 2, seed=4)
    assert min(residues(16, 1, seed=0, start=0)[0]) == 0


def test_filling_takes_the_simplest_value_in_the_order_of_the_fields() -> None:
    assert filled(FIELDS, {"N": 5}) == {"kind": "plain", "K": 1, "N": 5, "limit": None}
    assert list(filled(FIELDS, {"N": 5})) == list(FIELDS)
    assert filled(FIELDS, {"K": 32769, "limit": 10.0})["K"] == 32769, "a corpus goes beyond what is drawn"


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ({"rows": 3}, "no field 'rows'; the fields are kind, K, N, limit"),
        ({"kind": "tame"}, "kind can't be 'tame'; it is one of 'plain', 'odd', 'wild'"),
        ({"kind": 3}, "kind can't be 3"),
        ({"K": "3"}, "K can't be '3'; it is an integer from 1 to 300"),
        ({"K": 3.0}, "K can't be 3.0"),
        ({"K": True}, "K can't be True"),
        ({"K": None}, "K can't be None"),
        ({"K": 0}, "K can't be 0"),
        ({"N": -1}, "N can't be -1"),
        ({"limit": float("nan")}, "limit can't be nan"),
        ({"limit": [7.0]}, "limit can't be"),
    ],
)
def test_filling_refuses_what_no_case_holds(case: Case, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        filled(FIELDS, case)


def test_shrinking_finds_the_smallest_case_each_time_the_same() -> None:
    def fails(case: Case) -> bool:
        return case["K"] >= 37 and case["kind"] != "plain"

    found = [
        shrink(FIELDS, {"kind": "wild", "K": 291, "N": 8, "limit": 7.0}, fails, anything, attempts=1000)
        for _ in range(2)
    ]
    assert found[0] == {"kind": "odd", "K": 37, "N": 0, "limit": None}
    assert found[0] == found[1]


def test_shrinking_tries_valid_cases_alone_and_only_so_many() -> None:
    tried: list[int] = []

    def fails(case: Case) -> bool:
        tried.append(case["K"])
        return True

    def even(case: Case) -> bool:
        return bool(case["K"] % 2 == 0)

    small = shrink({"K": Range(1, 300)}, {"K": 200}, fails, even)
    assert all(K % 2 == 0 for K in tried)
    assert small["K"] % 2 == 0
    assert small["K"] < 200
    tried.clear()
    shrink(FIELDS, {"kind": "wild", "K": 300, "N": 9, "limit": 7.0}, lambda case: fails(case) and False, anything, 5)
    assert len(tried) == 5


def test_a_case_that_cannot_be_smaller_stays() -> None:
    case = filled(FIELDS, {})
    assert shrink(FIELDS, case, anything, anything) == case
    stubborn = {"kind": "wild", "K": 300, "N": 9, "limit": 7.0}
    assert shrink(FIELDS, stubborn, lambda _: False, anything) == stubborn


def draws(start: int, valid: Callable[[Case], bool] = anything) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    @seed(start)
    @settings(max_examples=60, database=None, derandomize=False, phases=[Phase.generate])
    @given(strategy(FIELDS, valid))
    def collect(case: dict[str, Any]) -> None:
        found.append(case)

    collect()
    return found


def test_drawn_cases_are_valid_and_lie_in_the_domain() -> None:
    for case in draws(0, lambda case: case["N"] < 5):
        assert filled(FIELDS, case) == case
        assert 1 <= case["K"] <= 300
        assert case["N"] < 5
    assert len({case["K"] for case in draws(0)}) > 20


def test_a_seed_draws_the_same_whatever_modules_are_loaded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis takes numbers from the source of modules that aren't installed."""
    before = [draws(start) for start in range(5)]
    source = tmp_path / "full_of_numbers.py"
    source.write_text("\n".join(f"x{n} = {n}" for n in range(101, 300)), encoding="utf-8")
    module = ModuleType("full_of_numbers")
    module.__file__ = str(source)
    exec(compile(source.read_text(), str(source), "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "full_of_numbers", module)
    assert [draws(start) for start in range(5)] == before
    assert draws(0) != draws(1)
